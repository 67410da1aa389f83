"""Greedy tokens of Lilliput's engine against transformers on the same dequantised weights: 64 prompts x 64 tokens.

    make bench X=greedy_vs_transformers            (ARGS="--model smollm2-135m --runner native --prompts 64 --new 64" by default)

Every mode does something else with the same requests: one at a time, 4 and 16 at once, prompts in chunks of 24 tokens, prompts that are
found in the cache, a cache so small that requests are preempted, by swap and by recomputation, and guesses by prompt lookup and by the
model's own first layers. The oracle reads each of our answers in one
forward: if every token of it is transformers' best one after those before, then greedy search there says the same. Two correct fp32 programs
may part where the two best logits are nearly equal; so at the first different token the oracle's top-2 gap is printed, and a gap of 1e-4 or
more is a failure (exit code 1).
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from twins import transformers_twin

from lilliput.base import hardware
from lilliput.base.job import Job
from lilliput.base.show import Show
from lilliput.models.load import load_model, load_to_serve
from lilliput.ops import native
from lilliput.serve.engine import Engine
from lilliput.serve.request import Sampling

GAP = 1e-4
QUESTIONS = (
    "What is the capital of France?", "Why is the sky blue?", "Write a haiku about rain.", "How many legs does a spider have?",
    "Explain photosynthesis to a child.", "Translate 'good morning' into Spanish.", "What is 17 + 25?", "Name three prime numbers.",
    "Who wrote Hamlet?", "Give me a recipe for pancakes.", "How do I boil an egg?", "Explain gravity to a child.", "Name three rivers.",
    "Tell me a story about a fox.", "List the planets.", "What does a compiler do?", "What is photosynthesis?", "Describe the sea.",
    "How far is the Moon?", "What is a prime number?", "Suggest a name for a cat.", "How do birds fly?", "Say something kind.",
    "What is the largest ocean?", "How is glass made?", "Why do leaves fall?", "What is a verb?", "Who was Marie Curie?", "How old is the Earth?",
    "What do bees make?", "Give three uses of salt.", "How does a bicycle stay upright?",
)  # fmt: skip
BEGINNINGS = (
    "Once upon a time, there was a", "The three laws of motion state that", "def fibonacci(n):\n", "It is a truth universally acknowledged, that",
    "The quick brown fox", "In 1969, the first humans", "1, 2, 3, 4, 5,", "Water boils at", "Dear Sir or Madam,\n\nI am writing to",
    "The main difference between a virus and a bacterium is", "The recipe calls for", "In the beginning", "import numpy as np\n\n", "She opened the door and",
    "The train from London", "According to the report,", "The mitochondria are", "SELECT name FROM", "Roses are red,", "The old man looked at the sea",
    "A good teacher", "To install the package, run", "The year 1984", "Mathematics is", "My favourite colour is", "On the third day,",
    "The theorem follows from", "<html>\n<head>", "Monday, Tuesday,", "The company announced that", "He had never seen", "In conclusion,",
)  # fmt: skip
SMALL = {"kv_tokens": 512}  # of 16 requests of 64 new tokens about five fit
MODES: dict[str, tuple[int, dict[str, Any], int]] = {  # prompts at once, the engine's settings, how often all prompts are asked
    "1 at a time": (1, {}, 1),
    "4 at once": (4, {}, 1),
    "16 at once": (16, {}, 1),
    "16, chunks of 24": (16, {"max_batch_tokens": 24}, 1),
    "16, found in the cache": (16, {"kv_tokens": 16384}, 2),
    "16, preempted by swap": (16, SMALL | {"preemption": "swap", "swap_tokens": 4096}, 1),
    "16, preempted by recomputation": (16, SMALL | {"preemption": "recompute"}, 1),
    "1, guessed by prompt lookup": (1, {"draft": "ngram"}, 1),
    "16, guessed by prompt lookup": (16, {"draft": "ngram"}, 1),
    "4, guessed by the first layers": (4, {"draft": "layers:15"}, 1),
}


@dataclass(frozen=True)
class Finding:
    """One prompt in one mode. `at`: the first different token, or None; `gap`: the oracle's top-2 logit gap there."""

    mode: str
    prompt: int
    at: int | None
    gap: float | None


def divergence(twin: transformers.PreTrainedModel, prompt: list[int], answer: tuple[int, ...]) -> tuple[int | None, float | None]:
    """The first token of the answer that is not the oracle's best, and how far its two best logits are apart there; (None, None): all are."""
    with torch.inference_mode():
        logits_TV = twin(torch.tensor([prompt + list(answer)])).logits[0, len(prompt) - 1 : -1]
    at = next((i for i, pair in enumerate(zip(logits_TV.argmax(-1).tolist(), answer)) if pair[0] != pair[1]), None)
    if at is None:
        return None, None
    first, second = logits_TV[at].topk(2).values.tolist()
    return at, first - second


def compare(model_name: str, new: int, runner: str = "native", count: int = 64) -> list[Finding]:
    """Every prompt in every mode against the oracle. AssertionError where a mode did not do what it is named for."""
    eager, tokenizer, _ = load_model(model_name, device="cpu")
    chats = [tokenizer.apply_chat([{"role": "user", "content": question}]) for question in QUESTIONS]
    texts = [text for pair in zip(chats, BEGINNINGS) for text in pair][:count]
    prompts = [tokenizer.encode(text) for text in texts]
    twin = transformers_twin(eager)
    judged: dict[tuple[int, tuple[int, ...]], tuple[int | None, float | None]] = {}
    model = eager if runner == "eager" else load_to_serve(model_name, Job.load(serve={"runner": "native", "weights": "fp32"}).serve, "cpu")[0]
    how, findings = Sampling(new, ignore_eos=True), []
    for mode, (at_once, settings, rounds) in MODES.items():
        engine = Engine(model, tokenizer, **({"kv_tokens": 4096} | settings))
        for _ in range(rounds):
            before = engine.stats().prefix_hits
            got = [done.tokens for i in range(0, len(prompts), at_once) for done in engine.generate(prompts[i : i + at_once], how)]
        stats = engine.stats()
        assert "swap" not in mode or stats.preempted_swap > 0, "nothing was swapped"
        assert "recomputation" not in mode or stats.preempted_recompute > 0, "nothing was computed again"
        assert "guessed" not in mode or stats.accepted > 0, "no guess was taken"
        assert "found" not in mode or stats.prefix_hits > before, "nothing was found"
        for number, (prompt, ours) in enumerate(zip(prompts, got)):
            if (number, ours) not in judged:
                judged[number, ours] = divergence(twin, prompt, ours)
            findings.append(Finding(mode, number, *judged[number, ours]))
    return findings


def main() -> int:
    """Compare, print, and fail where a divergence is no near tie."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--model", default="smollm2-135m")
    options.add_argument("--runner", default="native", choices=("native", "eager"))
    options.add_argument("--prompts", type=int, default=64)
    options.add_argument("--new", type=int, default=64)
    options.add_argument("--threads", type=int, default=hardware.cpus())
    options.add_argument("--json", action="store_true")
    args = options.parse_args()
    show = Show(json=args.json)
    torch.set_num_threads(args.threads)
    native.threads(args.threads)
    findings = compare(args.model, args.new, args.runner, args.prompts)
    parted = [finding for finding in findings if finding.at is not None]
    rows = []
    for mode in MODES:
        same = sum(f.at is None for f in findings if f.mode == mode)
        rows.append({"mode": mode, "prompts": args.prompts, "identical": same, "new tokens": args.new})
    show.data({"model": args.model, "runner": args.runner, "rows": rows, "divergences": [vars(f) for f in parted]})
    show.table(rows, tuple(rows[0]), f"{args.model}, {args.runner}: greedy tokens identical to transformers {transformers.__version__}")
    for f in parted:
        show.line(f"{f.mode}, prompt {f.prompt}: token {f.at} differs, top-2 gap {f.gap:.2g}")
    return int(any(f.gap is not None and f.gap >= GAP for f in parted))


if __name__ == "__main__":
    sys.exit(main())
