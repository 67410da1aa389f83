"""Greedy tokens of Lilliput's engine against transformers' generate on the same dequantised weights: 20 prompts x 64 tokens.

    make bench X=greedy_vs_transformers            (ARGS="--model smollm2-135m --new 64" by default)

Runs ours one prompt at a time, all 20 in one batch, and all 20 in chunks of 24 tokens. Two correct fp32 programs may
part where the two best logits are nearly equal; so at the first different token the oracle's top-2 gap is printed, and a
gap of 1e-4 or more is a failure (exit code 1).
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass

import torch
import transformers
from twins import greedy, transformers_twin

from lilliput.base import hardware
from lilliput.base.show import Show
from lilliput.models.load import load_model
from lilliput.serve.engine import Engine
from lilliput.serve.request import Sampling

GAP = 1e-4
QUESTIONS = (
    "What is the capital of France?", "Why is the sky blue?", "Write a haiku about rain.", "How many legs does a spider have?",
    "Explain photosynthesis to a child.", "Translate 'good morning' into Spanish.", "What is 17 + 25?", "Name three prime numbers.",
    "Who wrote Hamlet?", "Give me a recipe for pancakes.",
)  # fmt: skip
BEGINNINGS = (
    "Once upon a time, there was a", "The three laws of motion state that", "def fibonacci(n):\n", "It is a truth universally acknowledged, that",
    "The quick brown fox", "In 1969, the first humans", "1, 2, 3, 4, 5,", "Water boils at", "Dear Sir or Madam,\n\nI am writing to",
    "The main difference between a virus and a bacterium is",
)  # fmt: skip
MODES = {"one at a time": (1, 512), "batch of 20": (20, 512), "batch of 20, chunks of 24": (20, 24)}  # prompts at once, tokens of a step


@dataclass(frozen=True)
class Finding:
    """One prompt in one mode. `at`: the first different token, or None; `gap`: the oracle's top-2 logit gap there."""

    mode: str
    prompt: int
    at: int | None
    gap: float | None


def top2_gap(twin: transformers.PreTrainedModel, tokens: list[int]) -> float:
    """The distance of the two largest logits after the tokens."""
    with torch.inference_mode():
        first, second = twin(torch.tensor([tokens])).logits[0, -1].topk(2).values.tolist()
    return first - second


def compare(model_name: str, new: int) -> list[Finding]:
    """Every prompt in every mode against the oracle."""
    model, tokenizer, _ = load_model(model_name, device="cpu")
    chats = [tokenizer.apply_chat([{"role": "user", "content": question}]) for question in QUESTIONS]
    prompts = [tokenizer.encode(text) for text in (*chats, *BEGINNINGS)]
    twin = transformers_twin(model)
    expected = [greedy(twin, [prompt], new)[0] for prompt in prompts]
    how, findings = Sampling(new, ignore_eos=True), []
    for mode, (at_once, budget) in MODES.items():
        engine = Engine(model, tokenizer, kv_tokens=20 * 16 * -(-(max(map(len, prompts)) + new) // 16), max_batch_tokens=budget)
        got = [done.tokens for i in range(0, len(prompts), at_once) for done in engine.generate(prompts[i : i + at_once], how)]
        for number, (prompt, right, ours) in enumerate(zip(prompts, expected, got)):
            at = next((i for i, pair in enumerate(zip(right, ours)) if pair[0] != pair[1]), None)
            findings.append(Finding(mode, number, at, None if at is None else top2_gap(twin, prompt + right[:at])))
    return findings


def main() -> int:
    """Compare, print, and fail where a divergence is no near tie."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--model", default="smollm2-135m")
    options.add_argument("--new", type=int, default=64)
    options.add_argument("--threads", type=int, default=hardware.cpus())
    options.add_argument("--json", action="store_true")
    args = options.parse_args()
    show = Show(json=args.json)
    torch.set_num_threads(args.threads)
    findings = compare(args.model, args.new)
    parted = [finding for finding in findings if finding.at is not None]
    rows = [{"mode": m, "prompts": 20, "identical": sum(f.at is None for f in findings if f.mode == m), "new tokens": args.new} for m in MODES]
    show.data({"model": args.model, "rows": rows, "divergences": [vars(f) for f in parted]})
    show.table(rows, tuple(rows[0]), f"{args.model}: greedy tokens identical to transformers {transformers.__version__}")
    for f in parted:
        show.line(f"{f.mode}, prompt {f.prompt}: token {f.at} differs, top-2 gap {f.gap:.2g}")
    return int(any(f.gap is not None and f.gap >= GAP for f in parted))


if __name__ == "__main__":
    sys.exit(main())
