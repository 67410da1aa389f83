"""Trained models through the engine: the default one against transformers (benchmarks/greedy_vs_transformers.py), stories260K against its text."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from lilliput.ops import native

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("runner, prompts", [("native", 64), ("eager", 16)])
def test_greedy_tokens_of_the_default_model(runner: str, prompts: int, smollm2: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In every mode. A divergence is allowed only where the oracle's two best logits are less than 1e-4 apart."""
    monkeypatch.setattr(sys, "path", [str(BENCHMARKS), *sys.path])
    import greedy_vs_transformers as bench

    if runner == "native" and native.module() is None:
        pytest.skip(str(native.missing()))
    findings = bench.compare(str(smollm2), 64, runner, prompts)
    assert len(findings) == prompts * len(bench.MODES)
    parted = [finding for finding in findings if finding.at is not None]
    assert all(finding.gap is not None and finding.gap < bench.GAP for finding in parted), parted


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.skipif(native.module() is None, reason=str(native.missing()))
def test_native_fp32_says_what_the_eager_runner_says(smollm2: Path) -> None:
    """20 prompts x 64 tokens. A divergence is allowed only where the eager model's two best logits are less than 1e-4 apart."""
    import torch

    from lilliput.base.job import Job
    from lilliput.models.load import load_to_serve
    from lilliput.serve.engine import Engine
    from lilliput.serve.request import Sampling

    eager, tokenizer, _ = load_to_serve(smollm2, Job.load(serve={"runner": "eager"}).serve)
    ours, _, _ = load_to_serve(smollm2, Job.load(serve={"runner": "native", "weights": "fp32"}).serve)
    prompts = [tokenizer.encode(tokenizer.apply_chat([{"role": "user", "content": text}])) for text in QUESTIONS]
    how = Sampling(64, ignore_eos=True)
    theirs, mine = (Engine(model, tokenizer, kv_tokens=20 * 160).generate(prompts, how) for model in (eager, ours))
    for prompt, a, b in zip(prompts, theirs, mine):
        parted = next((i for i, (x, y) in enumerate(zip(a.tokens, b.tokens)) if x != y), None)
        if parted is not None:
            with torch.inference_mode():
                best = eager(torch.tensor([[*prompt, *a.tokens[:parted]]]))[0, -1].topk(2).values
            assert float(best[0] - best[1]) < 1e-4, f"token {parted}: {a.tokens[parted]} against {b.tokens[parted]}, gap {float(best[0] - best[1])}"


QUESTIONS = ["What is the capital of France?", "Write a haiku about rain.", "How do I boil an egg?", "Explain gravity to a child.", "Name three rivers.",
             "What is 17 plus 25?", "Tell me a story about a fox.", "Why is the sky blue?", "List the planets.", "Translate good morning into Spanish.",
             "What does a compiler do?", "Give me a recipe for pancakes.", "Who wrote Hamlet?", "What is photosynthesis?", "Describe the sea.",
             "How far is the Moon?", "What is a prime number?", "Suggest a name for a cat.", "How do birds fly?", "Say something kind."]  # fmt: skip


def test_the_default_model_knows_the_capital_of_france(smollm2: Path) -> None:
    from lilliput.models.load import load_model
    from lilliput.serve.engine import Engine
    from lilliput.serve.request import Sampling

    model, tokenizer, _ = load_model(str(smollm2))
    prompt = tokenizer.encode(tokenizer.apply_chat([{"role": "user", "content": "What is the capital of France?"}]))
    (done,) = Engine(model, tokenizer, kv_tokens=256).generate([prompt], Sampling(40))
    assert "Paris" in done.text and done.finish_reason == "stop"


@pytest.mark.shared
@pytest.mark.parametrize("budget", [512, 5])
def test_stories260k_tells_its_documented_story(shared_data: Path, budget: int) -> None:
    from lilliput.models.load import load_model
    from lilliput.serve.engine import Engine
    from lilliput.serve.request import Sampling

    model, tokenizer, _ = load_model(shared_data / "stories260K" / "stories260K.bin")
    engine = Engine(model, tokenizer, kv_tokens=512, max_batch_tokens=budget)
    (done,) = engine.generate([[tokenizer.bos_id]], Sampling(256, ignore_eos=True))
    expected = (shared_data / "stories260K" / "greedy.expected.txt").read_text()
    assert done.text.strip() == expected.strip()
