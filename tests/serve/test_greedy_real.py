"""Trained models through the engine: the default one against transformers (benchmarks/greedy_vs_transformers.py), stories260K against its text."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_greedy_tokens_of_the_default_model(smollm2: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A divergence is allowed only where the oracle's two best logits are less than 1e-4 apart."""
    monkeypatch.setattr(sys, "path", [str(BENCHMARKS), *sys.path])
    import greedy_vs_transformers as bench

    findings = bench.compare(str(smollm2), 64)
    assert len(findings) == 60
    parted = [finding for finding in findings if finding.at is not None]
    assert all(finding.gap is not None and finding.gap < bench.GAP for finding in parted), parted


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
