"""The same tokens whatever the engine does with a request: batches, chunks, found prefixes, preemption; on the native runner the same bits."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from served import FAMILIES, engine_of, model_of, oracle, prompts_of

from lilliput.models.decoder import Decoder
from lilliput.models.load import load_model
from lilliput.models.native import NativeDecoder
from lilliput.ops import native
from lilliput.serve.engine import Engine
from lilliput.serve.request import Sampling
from lilliput.serve.scheduler import Chunk

needs_native = pytest.mark.skipif(native.module() is None, reason=str(native.missing()))
NEW = Sampling(32, ignore_eos=True)
TIGHT = dict(kv_tokens=160)  # of six requests of up to 91 tokens two fit
WAYS: dict[str, dict[str, Any]] = {
    "plain": dict(),
    "chunks of 7": dict(max_batch_tokens=7),
    "no sharing": dict(sharing=False),
    "recomputed": TIGHT | dict(preemption="recompute"),
    "recomputed, no sharing": TIGHT | dict(preemption="recompute", sharing=False),
    "swapped": TIGHT | dict(preemption="swap", swap_tokens=1024),
    "swapped, chunks of 7, no sharing": TIGHT | dict(preemption="swap", swap_tokens=1024, max_batch_tokens=7, sharing=False),
    "static": dict(batching="static"),
    "short steps": dict(step_ms=1e-3),
}


def lowered(model: Decoder, weights: str = "fp32") -> NativeDecoder:
    return NativeDecoder(model.spec, lambda name: model.get_parameter(name).detach(), weights=weights)  # type: ignore[arg-type]


def check_ways(model: Decoder | NativeDecoder, prompts: list[list[int]], expected: list[list[int]]) -> None:
    for name, settings in WAYS.items():
        engine = engine_of(model, **settings)  # type: ignore[arg-type]
        for round in ("cold", "warm"):
            assert [list(done.tokens) for done in engine.generate(prompts, NEW)] == expected, f"{name}, {round}"
        stats = engine.stats()
        assert ("recomputed" in name) == (stats.preempted_recompute > 0) and ("swapped" in name) == (stats.preempted_swap > 0), name
        if "kv_tokens" not in settings:  # in a tight cache others may have taken the blocks before the second round
            assert (stats.prefix_hits > 0) == ("no sharing" not in name), name
        assert engine.pool.free_count == engine.pool.total and engine.pool.swap_free == engine.pool.swap_total


@pytest.mark.parametrize("family", FAMILIES)
def test_every_way_gives_transformers_tokens(family: str) -> None:
    model, prompts = model_of(family), prompts_of(6)
    check_ways(model, prompts, oracle(model, prompts, NEW.max_tokens))


@needs_native
@pytest.mark.parametrize("family", FAMILIES)
def test_every_way_gives_transformers_tokens_natively(family: str) -> None:
    model, prompts = model_of(family), prompts_of(6)
    check_ways(lowered(model), prompts, oracle(model, prompts, NEW.max_tokens))


@pytest.mark.parametrize("batch", [1, 4, 16])
def test_lilliput_tiny_says_what_transformers_says(batch: int) -> None:
    model, tokenizer, _ = load_model("lilliput-tiny", "cpu")
    prompts = [tokenizer.encode(text) for text in ("The ", "She said that", "In the morning", "He ") * 4]
    expected = oracle(model, prompts[:4], 32) * 4
    runners = [model] if native.module() is None else [model, lowered(model)]
    for runner in runners:
        for settings in (dict(), dict(max_batch_tokens=5 + batch), dict(kv_tokens=96, preemption="swap", swap_tokens=1024)):
            engine = Engine(runner, tokenizer, **({"kv_tokens": 1024} | settings))  # type: ignore[arg-type]
            got = [list(done.tokens) for at in range(0, 16, batch) for done in engine.generate(prompts[at : at + batch], NEW)]
            assert got == expected, settings


def forks(model: Decoder | NativeDecoder, **settings: Any) -> list[tuple[int, ...]]:
    engine = engine_of(model, **settings)  # type: ignore[arg-type]
    prompts = prompts_of(3, seed=12)
    return [done.tokens for done in engine.generate(prompts, Sampling(24, 0.9, seed=3, n=3, ignore_eos=True))]


def test_forked_answers_are_the_same_under_preemption() -> None:
    model = model_of("llama")
    expected = forks(model)
    assert len(set(expected)) == 9
    for settings in (dict(preemption="recompute"), dict(preemption="swap", swap_tokens=2048)):
        for sharing in (True, False):
            assert forks(model, kv_tokens=288, sharing=sharing, **settings) == expected, settings


class Recorder:
    """A runner that keeps the logits of each sampled row of some sequences."""

    def __init__(self, runner: Any) -> None:
        self.runner, self.move = runner, runner.move
        self.rows: dict[tuple[int, int], torch.Tensor] = {}

    def forward(self, chunks: Sequence[Chunk], mass: object = None) -> torch.Tensor:
        logits = self.runner.forward(chunks).clone()
        wanted = [(chunk.id, position) for chunk in chunks for position in range(chunk.stop - chunk.wants, chunk.stop)]
        self.rows |= dict(zip(wanted, logits))
        return logits


def recorded(engine: Engine, prompt: list[int], others: Sequence[list[int]] = (), draw: random.Random | None = None) -> list[torch.Tensor]:
    """Logits of the request's rows, the others arriving before, after and while it runs."""
    engine.runner = recorder = Recorder(engine.runner)
    order: list[list[int] | None] = [None, *others]
    if draw is not None:
        draw.shuffle(order)
    mine = -1
    for other in order:
        if other is None:
            mine = engine._requests[engine.add(prompt, NEW)].answers[0].id
        else:
            engine.add(other, Sampling(draw.randrange(1, 32) if draw else 32, ignore_eos=True))
        if draw is not None and draw.random() < 0.3:
            engine.step()
    while engine.busy:
        engine.step()
    engine.runner = recorder.runner
    return [recorder.rows[key] for key in sorted(recorder.rows) if key[0] == mine]


@needs_native
@pytest.mark.parametrize("weights, kv", [("fp32", "fp32"), ("w8", "int8"), ("q4", "int4"), ("fp32", "fp16")])
def test_logits_are_bit_equal_alone_and_in_random_batches(weights: str, kv: str) -> None:
    """16 random batches, each with a cold and a warm prefix cache, with and without preemption of either kind."""
    model, prompts = lowered(model_of("wide"), weights), prompts_of(8, seed=6)
    prompt = (prompts[0] * 4)[:52]
    alone = recorded(engine_of(model, kv=kv), prompt)  # type: ignore[arg-type]
    assert len(alone) == NEW.max_tokens
    seen = [0, 0, 0]
    for trial in range(16):
        draw = random.Random(trial)
        others = [[*prompt[: draw.randrange(53)], *draw.choice(prompts)][:90] for _ in range(draw.randrange(1, 9))]
        pressure = draw.choice([dict(), dict(kv_tokens=192), dict(kv_tokens=192, preemption="swap", swap_tokens=1024)])
        engine = engine_of(model, kv=kv, max_batch_tokens=draw.choice([9, 32, 512]), **pressure)  # type: ignore[arg-type]
        for round in ("cold", "warm"):
            rows = recorded(engine, prompt, others, draw)
            assert len(rows) == len(alone) and all(map(torch.equal, rows, alone)), f"batch {trial}, {round}"
        stats = engine.stats()
        seen = [a + b for a, b in zip(seen, (stats.prefix_hits, stats.preempted_swap, stats.preempted_recompute))]
    assert min(seen) > 0, seen
