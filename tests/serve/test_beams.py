"""Beam search: the answers and scores of transformers, under preemption too, and nothing is left behind."""

from __future__ import annotations

import asyncio
import warnings

import pytest
import torch
from served import engine_of, model_of, prompts_of, twin_of

from lilliput.base.errors import UserError
from lilliput.models.decoder import Decoder
from lilliput.serve.async_engine import AsyncEngine
from lilliput.serve.beams import Beam
from lilliput.serve.request import Completion, Delta, Sampling


def theirs(model: Decoder, prompt: list[int], beam: Beam, eos: int | None) -> tuple[list[list[int]], list[float]]:
    from transformers import GenerationConfig

    how = GenerationConfig(max_new_tokens=beam.max_tokens, do_sample=False, num_beams=beam.width, num_return_sequences=beam.width, eos_token_id=eos,
                           pad_token_id=0, length_penalty=beam.length_penalty, early_stopping=beam.early_stopping, return_dict_in_generate=True,
                           output_scores=True)  # fmt: skip
    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("ignore")
        out = twin_of(model).generate(torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), generation_config=how)
    rows = []
    for row in out.sequences[:, len(prompt) :].tolist():
        rows.append(row[: row.index(eos) + 1] if eos in row else row)
    return rows, out.sequences_scores.tolist()


def score(done: Completion, beam: Beam) -> float:
    return sum(done.logprobs) / len(done.tokens) ** beam.length_penalty


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
@pytest.mark.parametrize(
    "beam",
    [Beam(3, 20), Beam(4, 20, length_penalty=2.0), Beam(4, 20, length_penalty=0.5), Beam(3, 20, early_stopping=True), Beam(5, 1)],
    ids=lambda beam: f"{beam.width}-{beam.max_tokens}-{beam.length_penalty}-{beam.early_stopping}",
)
def test_answers_and_scores_are_those_of_transformers(family: str, beam: Beam) -> None:
    """Without an end token, and with one that the model likes to say."""
    model = model_of(family)
    for prompt in prompts_of(3, seed=9):
        liked = engine_of(model).generate([prompt], Sampling(6, ignore_eos=True))[0].tokens[3]
        for eos in (None, liked):
            engine = engine_of(model)
            engine._eos = frozenset() if eos is None else frozenset({eos})
            found = engine.generate([prompt], beam)
            tokens, scores = theirs(model, prompt, beam, eos)
            assert [list(done.tokens) for done in found] == tokens
            assert [score(done, beam) for done in found] == pytest.approx(scores, abs=1e-4)
            assert {done.finish_reason for done in found} <= {"stop", "length"}
            assert engine.pool.free_count == engine.pool.total and not engine._answers


def test_one_beam_is_greedy_search() -> None:
    engine, prompts = engine_of(model_of("gpt2")), prompts_of(3)
    greedy = engine.generate(prompts, Sampling(20, ignore_eos=True))
    assert [done.tokens for done in engine.generate(prompts, Beam(1, 20, ignore_eos=True))] == [done.tokens for done in greedy]


def test_beams_are_the_same_under_preemption() -> None:
    model, prompts = model_of("llama"), prompts_of(4, seed=2)
    beam = Beam(3, 30, ignore_eos=True)
    expected = [done.tokens for done in engine_of(model, kv_tokens=8192).generate(prompts, beam)]
    assert len(expected) == 12
    for settings in (dict(preemption="recompute"), dict(preemption="recompute", sharing=False), dict(preemption="swap", swap_tokens=2048)):
        engine = engine_of(model, kv_tokens=288, max_batch_tokens=24, **settings)
        assert [done.tokens for done in engine.generate(prompts, beam)] == expected, settings
        stats = engine.stats()
        assert stats.preempted_recompute + stats.preempted_swap > 0 and engine.pool.free_count == engine.pool.total


def test_n_of_them_come_at_the_end_beside_other_requests() -> None:
    model, (first, second) = model_of("llama"), prompts_of(2, seed=4)
    beam = Beam(4, 12, n=2, ignore_eos=True)
    alone = [done.tokens for done in engine_of(model).generate([first], beam)]
    engine = engine_of(model)
    search, other = engine.add(first, beam), engine.add(second, Sampling(20, ignore_eos=True))
    deltas: list[Delta] = []
    while engine.busy:
        deltas += engine.step()
    mine = [delta for delta in deltas if delta.id == search]
    assert [tuple(delta.token for delta in mine if delta.index == index) for index in (0, 1)] == alone
    assert [delta.finish_reason for delta in deltas if delta.id == other][-1] == "length"


def test_cancel_and_failures_end_the_whole_search() -> None:
    engine = engine_of(model_of("llama"))
    id = engine.add([1, 2, 3], Beam(3, 30, n=2, ignore_eos=True))
    for _ in range(5):
        engine.step()
    assert len(engine._answers) == 3 and engine.cancel(id)
    assert [(d.index, d.finish_reason) for d in engine.step()] == [(0, "cancelled"), (1, "cancelled")]
    assert engine.pool.free_count == engine.pool.total and not engine.busy

    runner = engine.runner

    class Broken:
        move = runner.move

        def forward(self, chunks: list, mass: object = None) -> torch.Tensor:
            logits = runner.forward(chunks).clone()
            if len(chunks) == 3:
                logits[1, 5] = float("nan")
            return logits

    engine.runner = Broken()
    engine.add([1, 2, 3], Beam(3, 30, ignore_eos=True))
    deltas: list[Delta] = []
    while engine.busy:
        deltas += engine.step()
    assert [(d.index, d.finish_reason) for d in deltas] == [(i, "error") for i in range(3)] and "not finite" in deltas[0].message
    assert engine.pool.free_count == engine.pool.total


def test_beams_through_asyncio() -> None:
    model = model_of("llama")
    expected = [done.tokens for done in engine_of(model).generate([[5, 6]], Beam(3, 9))]

    async def main() -> None:
        served = AsyncEngine(engine_of(model))
        served.start()
        deltas = [delta async for delta in served.stream([5, 6], Beam(3, 9))]
        assert [tuple(d.token for d in deltas if d.index == i) for i in range(3)] == expected
        await served.stop()

    asyncio.run(asyncio.wait_for(main(), 30))


@pytest.mark.parametrize("values", [dict(width=0), dict(max_tokens=0), dict(width=2, n=3)], ids=str)
def test_values_out_of_range_are_named(values: dict) -> None:
    with pytest.raises(UserError, match="out of range"):
        Beam(**values)


def test_a_beam_wider_than_the_vocabulary_is_refused() -> None:
    with pytest.raises(UserError, match="too wide"):
        engine_of(model_of("llama"), kv_tokens=4096).request([1], Beam(128, 1, stop_ids=(1, 2)))
