"""Speculation in the engine: the same tokens as without, whoever guesses, in batches, chunks, tight caches; nothing is left behind."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from served import engine_of, model_of, prompts_of

from lilliput.base.errors import UserError
from lilliput.models import hub
from lilliput.models.decoder import Decoder
from lilliput.models.load import load_model
from lilliput.models.native import NativeDecoder
from lilliput.ops import native
from lilliput.serve.engine import Engine
from lilliput.serve.request import Sampling
from lilliput.serve.speculative import expected_tokens

needs_native = pytest.mark.skipif(native.module() is None, reason=str(native.missing()))
TIGHT = dict(kv_tokens=160)
WAYS: list[dict[str, Any]] = [
    {}, dict(max_batch_tokens=9), dict(sharing=False), TIGHT | dict(preemption="recompute"), TIGHT | dict(preemption="swap", swap_tokens=1024)
]  # fmt: skip
HOW = [Sampling(32, ignore_eos=True), Sampling(32, temperature=0.3, top_p=0.95, seed=4), Sampling(24, temperature=0.3, n=3, seed=8),
       Sampling(20, repetition_penalty=1.3), Sampling(24, temperature=0.3, stop=("e",), seed=1)]  # fmt: skip


def lowered(model: Decoder) -> NativeDecoder:
    return NativeDecoder(model.spec, lambda name: model.get_parameter(name).detach(), weights="fp32")  # type: ignore[arg-type]


def near(model: Decoder) -> Decoder:
    """The model with its weights disturbed: often of the same opinion."""
    other, generator = model_of("llama"), torch.Generator().manual_seed(9)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter += torch.randn(parameter.shape, generator=generator) * 0.02
    return other


def always(engine: Engine, gamma: int = 4) -> Engine:
    """The controller asks for gamma guesses whatever it has seen."""
    assert engine.guesses is not None
    engine.guesses.control.fixed = gamma
    return engine


def said(engine: Engine, how: Sampling) -> list[Any]:
    prompts = [ids + ids[:9] for ids in prompts_of(6)]  # their own beginning comes again: something to look up
    return [(done.tokens, done.text, done.finish_reason) for done in engine.generate(prompts, how)]


@pytest.mark.parametrize("settings", WAYS, ids=str)
@pytest.mark.parametrize("how", HOW, ids=lambda how: f"T{how.temperature:g}n{how.n}r{how.repetition_penalty:g}")
def test_certain_guesses_change_nothing(how: Sampling, settings: dict[str, Any]) -> None:
    model = model_of("llama")
    plain = said(engine_of(model, **settings), how)
    engine = always(engine_of(model, draft="ngram", **settings))
    assert said(engine, how) == plain
    stats = engine.stats()
    assert (stats.drafted > 0) == (how.repetition_penalty == 1), "requests that look back are not guessed for"
    assert stats.generated == sum(len(tokens) for tokens, *_ in plain)
    assert engine.pool.free_count == engine.pool.total and not engine.guesses.drafter._upto  # type: ignore[union-attr]


@needs_native
@pytest.mark.parametrize("settings", WAYS, ids=str)
@pytest.mark.parametrize("draft", ["ngram", "layers:1", "itself", "other"])
def test_greedy_answers_on_the_native_runner(draft: str, settings: dict[str, Any]) -> None:
    model = model_of("llama")
    drafter: Any = {"itself": lowered(model), "other": lowered(near(model))}.get(draft, draft)
    plain = said(engine_of(lowered(model), **settings), HOW[0])
    engine = always(engine_of(lowered(model), draft=drafter, **settings))
    assert said(engine, HOW[0]) == plain
    stats = engine.stats()
    assert stats.drafted > 0
    if draft == "itself":
        assert stats.accepted > 0.85 * stats.drafted, "what ends an answer cuts its last guesses"


def test_a_drafter_that_is_the_model_is_always_right_when_sampled() -> None:
    """p = q: each guess is accepted, and a step gives gamma + 1 tokens."""
    model = model_of("llama")
    engine = always(engine_of(model, draft=model), 3)
    done = engine.generate(prompts_of(4), Sampling(41, temperature=1.0, top_k=20, ignore_eos=True, seed=5))
    stats = engine.stats()
    assert all(len(one.tokens) == 41 for one in done)
    assert stats.accepted == stats.drafted == 4 * 30, "one token after the prompt, then ten steps of three guesses and one more"


LATE: list[dict[str, Any]] = [
    {}, dict(max_batch_tokens=9), dict(kv_tokens=320, preemption="recompute"), dict(kv_tokens=320, preemption="swap", swap_tokens=1024)
]  # fmt: skip


@needs_native
@pytest.mark.parametrize("settings", LATE, ids=str)
def test_a_drafter_reads_late_what_it_has_not_read(settings: dict[str, Any]) -> None:
    """Guesses come and go while answers lose and regain their blocks, find those of others, and fork: they are what the drafter says by itself."""
    model, rng, seen = model_of("llama"), random.Random(3), []
    other = near(model)
    engine = engine_of(lowered(model), draft=lowered(other), **settings)
    assert engine.guesses is not None
    control, drafter, fill = engine.guesses.control, engine.guesses.drafter, engine.guesses.drafter.fill

    def watched(chunks: Any, draw: Any) -> Any:
        assert control.fixed, "where nothing is guessed nothing is read"
        made = fill(chunks, draw)
        seen.extend(([*drafter._tokens[chunk.id]], [*chunk.ids[-chunk.draft :]]) for chunk in chunks if chunk.draft)  # type: ignore[attr-defined]
        return made

    drafter.fill = watched  # type: ignore[method-assign]
    prompts = [(ids * 3)[:60] for ids in prompts_of(4)]
    for n in (1, 3):
        for ids in (*prompts, *prompts):
            engine.add(ids, Sampling(40, n=n, ignore_eos=True))
        while engine.busy:
            control.fixed = rng.choice([0, 0, 0, 2, 4])
            engine.step()
    stats, alone = engine.stats(), engine_of(lowered(other))
    assert stats.drafted > stats.accepted > 20
    for tokens, guesses in rng.sample(seen, 40):
        assert list(alone.generate([tokens], Sampling(len(guesses), ignore_eos=True))[0].tokens) == guesses
    assert "preemption" not in settings or stats.preempted_swap + stats.preempted_recompute > 0


def test_sampled_guesses_of_another_model_keep_the_distribution() -> None:
    """The second token of many answers, against the same from plain sampling: a chi-square of two samples."""
    model = model_of("llama")
    other = near(model)
    prompt, counts = prompts_of(1)[0], []
    for draft in ("", other):
        engine = engine_of(model, draft=draft, kv_tokens=64 * 48)
        engine = always(engine, 2) if draft else engine
        how = [Sampling(3, temperature=1.2, top_k=6, ignore_eos=True, n=48, seed=seed) for seed in range(25)]
        tokens = [done.tokens[2] for one in how for done in engine.generate([prompt], one)]
        counts.append(torch.bincount(torch.tensor(tokens), minlength=model.facts.vocab).double())
        assert not draft or 0 < engine.stats().accepted < engine.stats().drafted
    a, b = counts
    seen = (a + b) > 0
    statistic = float(((a - b)[seen] ** 2 / (a + b)[seen]).sum())
    freedom = int(seen.sum()) - 1
    p = float(torch.special.gammaincc(torch.tensor(freedom / 2), torch.tensor(statistic / 2)))
    assert p > 0.001, (statistic, freedom)


@pytest.mark.parametrize("gamma", [1, 2, 4])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_narrower_sibling_guesses_as_the_formula_says(temperature: float, gamma: int) -> None:
    """Two trained models of one tokenizer: tokens a pass are (1 - alpha^(gamma + 1)) / (1 - alpha) within 3 %, alpha = accepted guesses of those judged."""
    model, draft = (load_model(name, "cpu")[0] for name in ("lilliput-tiny", "lilliput-tiny-draft"))
    tokenizers = [(hub.SHIPPED / name / "tokenizer.json").read_bytes() for name in ("lilliput-tiny", "lilliput-tiny-draft")]
    assert tokenizers[0] == tokenizers[1]
    if native.module() is not None:
        model, draft = lowered(model), lowered(draft)  # type: ignore[assignment]
    tokenizer = load_model("lilliput-tiny", "cpu")[1]
    prompts = ["The king", "O my lord, I", "Come, come, and", "What is the", "Enter", "My good", "To be, or", "Where is"]
    how = Sampling(160, temperature=temperature, ignore_eos=True, n=4 if temperature else 1, seed=3)
    engine, seen = always(Engine(model, tokenizer, kv_tokens=8192, draft=draft), gamma), []
    assert engine.guesses is not None
    engine.guesses.control.observe = lambda proposed, accepted: seen.append((proposed, accepted))  # type: ignore[method-assign]
    said = engine.generate(prompts, how)
    accepted = [count for proposed, count in seen if proposed == gamma]  # not those that the end of an answer cut short
    alpha = sum(accepted) / sum(min(count + 1, gamma) for count in accepted)
    assert 0.3 < alpha < 0.95 and len(accepted) > 300
    assert sum(accepted) / len(accepted) + 1 == pytest.approx(expected_tokens(alpha, gamma), rel=0.03)
    if not temperature:
        assert [one.tokens for one in said] == [one.tokens for one in Engine(model, tokenizer, kv_tokens=8192).generate(prompts, how)]


def test_what_cannot_guess_says_why() -> None:
    model = model_of("llama")
    with pytest.raises(UserError, match="no argument"):
        engine_of(model, draft="ngram:3")
    with pytest.raises(UserError, match="native runner"):
        engine_of(model, draft="layers:1")
    with pytest.raises(UserError, match="unknown drafter"):
        engine_of(model, draft="crystal ball")
    with pytest.raises(UserError, match="vocabulary"):
        engine_of(model, draft=load_model("lilliput-tiny", "cpu")[0])
