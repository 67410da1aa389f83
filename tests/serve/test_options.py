"""Every option of Sampling does in the engine what it says, against plain arithmetic on the model's own logits."""

from __future__ import annotations

import math

import pytest
import torch
from served import GREEDY, Dice, engine_of, model_of, prompts_of

from lilliput.base.errors import UserError
from lilliput.models.decoder import Decoder
from lilliput.serve.request import Completion, Delta, Sampling

PROMPT = prompts_of(1, seed=8)[0]


@pytest.fixture(scope="module")
def model() -> Decoder:
    return model_of("llama")


def answers(model: Decoder, **options: object) -> list[Completion]:
    return engine_of(model).generate([PROMPT], Sampling(**({"max_tokens": 24, "ignore_eos": True} | options)))  # type: ignore[arg-type]


def rows(model: Decoder, tokens: list[int]) -> torch.Tensor:
    """Raw logits [T, V] of every position."""
    with torch.inference_mode():
        return model(torch.tensor([tokens]))[0]


def greedy(model: Decoder, change: object, count: int = 24) -> list[int]:
    """Greedy tokens by whole forwards; change(logits_V, answer so far) edits the row."""
    said: list[int] = []
    for _ in range(count):
        logits_V = rows(model, PROMPT + said)[-1].clone()
        change(logits_V, said)  # type: ignore[operator]
        said.append(int(logits_V.argmax()))
    return said


def test_presence_and_frequency_count_the_answer_alone(model: Decoder) -> None:
    def change(logits_V: torch.Tensor, said: list[int]) -> None:
        for token in set(said):
            logits_V[token] -= 1.5 + 0.5 * said.count(token)

    got = answers(model, presence_penalty=1.5, frequency_penalty=0.5)[0].tokens
    assert list(got) == greedy(model, change) and got != answers(model)[0].tokens


def test_logit_bias_and_its_ban(model: Decoder) -> None:
    plain = answers(model)[0].tokens
    bias = {plain[0]: -math.inf, 7: 3.0}

    def change(logits_V: torch.Tensor, said: list[int]) -> None:
        for token, value in bias.items():
            logits_V[token] += value

    got = answers(model, logit_bias=bias)[0].tokens
    assert list(got) == greedy(model, change) and plain[0] not in got


def test_bad_words_never_come_in_this_order(model: Decoder) -> None:
    plain = answers(model)[0].tokens
    word = next(bytes(plain[i : i + 2]).decode() for i in range(23) if max(plain[i : i + 2]) < 128 and plain[i] != plain[i + 1])
    first, second = word.encode()

    def change(logits_V: torch.Tensor, said: list[int]) -> None:
        if said and said[-1] == first:
            logits_V[second] = -math.inf

    got = answers(model, bad_words=(word,))[0].tokens
    assert list(got) == greedy(model, change) and got != plain
    single = answers(model, bad_words=(chr(second),))[0].tokens
    assert second not in single


def test_min_tokens_ban_what_would_end_the_answer(model: Decoder) -> None:
    plain = answers(model)[0].tokens
    engine = engine_of(model)
    engine._eos = frozenset({plain[0]})
    assert len(engine.generate([PROMPT], Sampling(24))[0].tokens) == 1
    (late,) = engine.generate([PROMPT], Sampling(24, min_tokens=9))
    assert plain[0] not in late.tokens[:9]

    def change(logits_V: torch.Tensor, said: list[int]) -> None:
        if len(said) < 9:
            logits_V[plain[0]] = -math.inf

    assert list(late.tokens) == greedy(model, change, len(late.tokens))


def test_logprobs_name_the_likeliest(model: Decoder) -> None:
    (done,) = answers(model, logprobs=3, temperature=1.0, seed=2)
    for at, (token, logprob, top) in enumerate(zip(done.tokens, done.logprobs, done.tops)):
        want_V = rows(model, PROMPT + list(done.tokens[:at]))[-1].log_softmax(-1)
        values, ids = want_V.topk(3)
        assert [t for t, _ in top] == ids.tolist()
        assert [p for _, p in top] == pytest.approx(values.tolist(), abs=2e-5)
        assert logprob == pytest.approx(float(want_V[token]), abs=2e-5)


@pytest.mark.parametrize("budget", [512, 7])
def test_prompt_logprobs(model: Decoder, budget: int) -> None:
    """Whole or in chunks, on the first delta of each answer and on no other."""
    engine = engine_of(model, max_batch_tokens=budget)
    deltas = list(engine.stream(PROMPT, Sampling(3, prompt_logprobs=2, n=2, ignore_eos=True)))
    want_TV = rows(model, PROMPT).log_softmax(-1)
    firsts = [next(delta for delta in deltas if delta.index == index) for index in (0, 1)]
    assert sum(delta.prompt_logprobs is not None for delta in deltas) == 2
    for first in firsts:
        scored = first.prompt_logprobs
        assert scored is not None and len(scored) == len(PROMPT) and scored[0] is None
        for at, one in enumerate(scored[1:]):
            assert one is not None and one.token == PROMPT[at + 1]
            assert one.logprob == pytest.approx(float(want_TV[at, one.token]), abs=2e-5)
            assert [t for t, _ in one.top] == want_TV[at].topk(2).indices.tolist()


def test_n_answers_differ_and_each_is_itself(model: Decoder) -> None:
    many = answers(model, temperature=1.0, seed=5, n=4)
    assert [done.index for done in many] == [0, 1, 2, 3] and len({done.tokens for done in many}) == 4
    assert many[0].tokens == answers(model, temperature=1.0, seed=5)[0].tokens, "the first is the single one"
    assert [done.tokens for done in answers(model, temperature=1.0, seed=5, n=4)] == [done.tokens for done in many]


def test_best_of_gives_the_likeliest_at_the_end(model: Decoder) -> None:
    every = answers(model, temperature=1.0, seed=5, n=6)
    best = answers(model, temperature=1.0, seed=5, n=2, best_of=6)
    ranked = sorted(every, key=lambda done: -sum(done.logprobs))
    assert [done.tokens for done in best] == [done.tokens for done in ranked[:2]] and [done.index for done in best] == [0, 1]


class Only:
    """A guide that spells a word and ends, or breaks where it is told to."""

    def __init__(self, word: bytes, breaks: str = "") -> None:
        self.word, self.at, self.breaks = word, 0, breaks

    def mask(self) -> torch.Tensor:
        if self.breaks == "mask":
            raise RuntimeError("no mask today")
        words = torch.zeros(3 if self.breaks == "short" else 9, dtype=torch.int32)
        if self.breaks != "nothing":
            words[self.word[self.at] // 32] = 1 << self.word[self.at] % 32
        return words

    def accept(self, token: int) -> None:
        if self.breaks == "accept":
            raise RuntimeError("not this one")
        assert token == self.word[self.at], "the engine keeps to the mask"
        self.at += 1

    @property
    def finished(self) -> bool:
        return self.at == len(self.word)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_guide_says_what_may_come_and_when_it_ends(model: Decoder, temperature: float) -> None:
    done = answers(model, guide=lambda: Only(b"Hello"), temperature=temperature, n=2, seed=1)
    assert [(one.text, one.finish_reason) for one in done] == [("Hello", "stop")] * 2


def ends(deltas: list[Delta]) -> dict[int, tuple[str | None, str]]:
    return {delta.id: (delta.finish_reason, delta.message) for delta in deltas if delta.finish_reason}


@pytest.mark.parametrize(
    "breaks, words",
    [("mask", "no mask today"), ("accept", "not this one"), ("nothing", "no token may come next"), ("short", "9 or more"), ("make", "will not be made")],
)
def test_a_broken_guide_ends_only_its_own_answer(model: Decoder, breaks: str, words: str) -> None:
    def make() -> Only:
        if breaks == "make":
            raise RuntimeError("will not be made")
        return Only(b"Hello", breaks)

    engine = engine_of(model)
    good, bad = engine.add(PROMPT, GREEDY), engine.add(PROMPT, Sampling(24, guide=make))
    deltas = []
    while engine.busy:
        deltas += engine.step()
    assert ends(deltas)[good] == ("length", "")
    reason, message = ends(deltas)[bad]
    assert reason == "error" and words in message
    assert engine.pool.free_count == engine.pool.total
    with pytest.raises(UserError, match="broke off") as error:
        engine.generate([PROMPT], Sampling(24, guide=make))
    assert words in error.value.why and not engine._requests


def test_logits_that_are_not_finite_end_only_their_own_answer(model: Decoder) -> None:
    class Broken(Dice):
        def forward(self, chunks: list, mass: object = None) -> torch.Tensor:
            logits = super().forward(chunks)
            logits[[chunk.id for chunk in chunks].index(1), 3] = float("nan")
            return logits

    engine = engine_of(model)
    engine.runner = Broken()
    ids = [engine.add([1], Sampling(1, ignore_eos=True)) for _ in range(3)]
    found = ends(engine.step())
    assert [found[id][0] for id in ids] == ["length", "error", "length"] and "not finite" in found[1][1]


@pytest.mark.parametrize("options", [dict(logit_bias={259: 1.0}), dict(stop_ids=(-1,))], ids=str)
def test_ids_beyond_the_vocabulary_are_refused(model: Decoder, options: dict) -> None:
    with pytest.raises(UserError, match="not in the vocabulary"):
        engine_of(model).add(PROMPT, Sampling(**options))
