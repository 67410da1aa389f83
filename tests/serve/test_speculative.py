"""Speculation: the paper's formulas, exact distributions (and a broken residual that fails them), prompt lookup, the controller."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lilliput.ops import sampling
from lilliput.serve import speculative
from lilliput.serve.drafters.ngram import NGram

TABLE_1 = [(0.6, 2, 1.53, 1.96), (0.7, 3, 1.58, 2.53), (0.8, 2, 1.23, 2.44), (0.8, 5, 1.63, 3.69), (0.9, 2, 1.11, 2.71), (0.9, 10, 1.60, 6.86)]


@pytest.mark.parametrize("alpha, gamma, operations, speed", TABLE_1)
def test_table_1_of_the_paper(alpha: float, gamma: int, operations: float, speed: float) -> None:
    assert round(speculative.operations(alpha, gamma, 0), 2) == operations
    assert round(speculative.speedup(alpha, gamma, 0), 2) == speed


BEST = {0.5: [(4, 1.794), (3, 1.630), (2, 1.458), (2, 1.250), (1, 1.071)], 0.7: [(8, 2.758), (6, 2.353), (4, 1.981), (3, 1.583), (2, 1.217)],
        0.9: [(19, 6.365), (13, 4.674), (10, 3.431), (7, 2.373), (4, 1.575)]}  # fmt: skip


@pytest.mark.parametrize("alpha", BEST)
def test_the_best_number_of_guesses(alpha: float) -> None:
    for cost, (gamma, gain) in zip((0.02, 0.05, 0.1, 0.2, 0.4), BEST[alpha]):
        assert speculative.speedup(alpha, gamma, cost) == pytest.approx(gain, abs=6e-4)
        best = speculative.best_gamma(alpha, cost)  # 1 and 2 are equally good at alpha 0.5, cost 0.2
        assert speculative.speedup(alpha, best, cost) == pytest.approx(speculative.speedup(alpha, gamma, cost), abs=1e-12)
    assert speculative.best_gamma(0.1, 0.5) == 0


def standardised(logits_V: Tensor, **how: float) -> Tensor:
    ids, probs = sampling.candidates(logits_V, **how)  # type: ignore[arg-type]
    return torch.zeros(len(logits_V), dtype=torch.float64).index_put((ids,), probs)


def tables(vocab: int, **how: float) -> tuple[Tensor, Tensor]:
    """A Markov target and a Markov drafter, [from, to], both standardised alike."""
    torch.manual_seed(3)
    logits = torch.randn(vocab, vocab) * 1.5
    guess = logits + torch.randn(vocab, vocab)
    return (torch.stack([standardised(row, **how) for row in x]) for x in (logits, guess))  # type: ignore[return-value]


def speculate(p: Tensor, q: Tensor, gamma: int, count: int) -> tuple[Tensor, Tensor]:
    """One pass from token 0 in `count` sequences: (accepted [count], tokens [count, gamma + 1], -1 after the last)."""
    last, guesses, rows_q, rows_p = torch.zeros(count, dtype=torch.long), [], [], [p[torch.zeros(count, dtype=torch.long)]]
    for _ in range(gamma):
        rows_q.append(q[last])
        last = torch.multinomial(rows_q[-1], 1).squeeze(1)
        guesses.append(last)
        rows_p.append(p[last])
    g = torch.stack(guesses, 1)
    u = torch.rand(count, gamma + 1, dtype=torch.float64)
    counts, tokens = speculative.judge(torch.stack(rows_p, 1), torch.stack(rows_q, 1), g, u[:, :gamma], u[:, gamma:].expand(-1, gamma + 1))
    out = torch.cat([g, g.new_zeros(count, 1)], 1).masked_fill(torch.arange(gamma + 1)[None] > counts[:, None], -1)
    return counts, out.scatter(1, counts[:, None], tokens[:, None])


def chi_square(p: Tensor, out: Tensor) -> float:
    """p-value of the first two tokens against the target; where a pass gave one token only, the target gives the second."""
    vocab = p.shape[0]
    second = torch.where(out[:, 1] >= 0, out[:, 1], torch.multinomial(p[out[:, 0]], 1).squeeze(1))
    seen = torch.bincount(out[:, 0] * vocab + second, minlength=vocab * vocab).double()
    want = (p[0][:, None] * p).flatten() * len(out)
    assert seen[want == 0].sum() == 0, "a token that the filters exclude was given out"
    seen, want = seen[want > 0], want[want > 0]
    statistic = float(((seen - want) ** 2 / want).sum())
    return float(torch.special.gammaincc(torch.tensor((len(want) - 1) / 2, dtype=torch.float64), torch.tensor(statistic / 2, dtype=torch.float64)))


HOW = [{"temperature": 0.7}, {"temperature": 1.0}, {"temperature": 1.0, "top_k": 4}, {"temperature": 0.7, "top_p": 0.8}]


@pytest.mark.parametrize("gamma", [1, 4, 8])
@pytest.mark.parametrize("how", HOW, ids=str)
def test_tokens_have_the_distribution_of_the_target(how: dict[str, float], gamma: int) -> None:
    p, q = tables(8, **how)
    _, out = speculate(p, q, gamma, 200_000)
    assert chi_square(p, out) > 0.01


def test_a_broken_residual_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing from p instead of norm(max(0, p - q)) after a rejection: nearly right, and wrong."""
    p, q = tables(8, temperature=1.0)
    right = speculative.judge

    def broken(p_NGV: Tensor, q_NGV: Tensor, guesses: Tensor, accept: Tensor, draw: Tensor) -> tuple[Tensor, Tensor]:
        counts, _ = right(p_NGV, q_NGV, guesses, accept, draw)
        last = p_NGV[torch.arange(len(counts)), counts]
        return counts, torch.multinomial(last, 1).squeeze(1)

    monkeypatch.setattr(speculative, "judge", broken)
    _, out = speculate(p, q, 4, 200_000)
    assert chi_square(p, out) < 1e-6


@pytest.mark.parametrize("gamma", [1, 3, 8])
@pytest.mark.parametrize("alpha", [0.4, 0.7, 0.9])
def test_tokens_a_pass_follow_the_formula(alpha: float, gamma: int) -> None:
    """Independent acceptance with exactly alpha = sum min(p, q): within 3 %."""
    torch.manual_seed(1)
    vocab = 5
    p = torch.full((vocab, vocab), (1 - alpha) / (vocab - 1), dtype=torch.float64)
    p[:, 1] = alpha
    q = torch.zeros_like(p)
    q[:, 1] = 1
    counts, _ = speculate(p, q, gamma, 50_000)
    assert float(counts.double().mean() + 1) == pytest.approx(speculative.expected_tokens(alpha, gamma), rel=0.03)


def test_certain_guesses_change_no_token() -> None:
    assert speculative.matched([5, 6, 7], [5, 6, 9, 1]) == 2
    assert speculative.matched([5, 6], [5, 6, 8]) == 2
    assert speculative.matched([], [4]) == 0
    assert speculative.matched([1], [2, 3]) == 0


def by_search(tokens: list[int], gamma: int) -> list[int]:
    """Prompt lookup the slow way."""
    for n in range(4, 1, -1):
        ending = tokens[-n:]
        for at in range(len(tokens) - 1, n - 1, -1):
            if len(tokens) > n and tokens[at - n : at] == ending:
                return [tokens[at + i % (len(tokens) - at)] for i in range(gamma)]
    return []


def test_prompt_lookup_finds_what_a_search_finds() -> None:
    random.seed(5)
    for id in range(60):
        drafter, tokens = NGram("", None), [random.randrange(4) for _ in range(random.randrange(1, 12))]
        for _ in range(20):
            assert drafter.plan(id, tokens, 5) == by_search(tokens, 5), tokens
            tokens += [random.randrange(4) for _ in range(random.randrange(1, 5))]
        drafter.forget(id)
        assert not drafter._after and not drafter._upto


Acceptance = Callable[[int], float]


def drive(alpha: Acceptance, price: float, batch: int, steps: int = 1000, noise: float = 0.0, seed: int = 2, first: float = 0.0) -> tuple[float, float]:
    """(seconds in which plain steps had given the same tokens / seconds with the controller, share of steps with guesses) where a guess makes a step longer
    by `price` of a plain one. `alpha`: acceptance at a step; `noise`: of a step's logarithm, and one step in a hundred takes five times as long; the
    first two steps always do. `first`: plain steps that the first guess takes more."""
    rng, control, took, plain, guessing = random.Random(seed), speculative.Controller(), 0.0, 0.0, 0
    for step in range(steps):
        gamma, tokens = control.gamma(batch), batch
        factor = 5.0 if step < 2 else rng.lognormvariate(0, noise) * (5 if rng.random() < 0.01 else 1) if noise else 1.0
        late = first if gamma and not guessing else 0.0
        seconds = (1 + price * gamma + late) * factor
        for _ in range(batch if gamma else 0):
            right = next((i for i in range(gamma) if rng.random() >= alpha(step)), gamma)
            control.observe(gamma, right)
            tokens += right
        if gamma:
            control.guessed(batch, gamma * batch, tokens, seconds, late > 0)
        else:
            control.plain(batch, seconds)
        took, plain, guessing = took + seconds, plain + tokens / batch * factor, guessing + (gamma > 0)
    return plain / took, guessing / steps


STEADY = {f"always {alpha}": (lambda step, alpha=alpha: alpha) for alpha in (0.0, 0.1, 0.2, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95)}
TURNS = {"turns of 200": lambda step: 0.95 * (step // 200 % 2 == 0), "turns of 25": lambda step: 0.9 * (step // 25 % 2 == 0)}
PRICES = (0.02, 0.15, 0.4, 0.8, 2.0)  # one sequence of SmolLM2-135M: 0.17, sixteen: 0.8


@pytest.mark.parametrize("noise", [0.0, 0.1])
@pytest.mark.parametrize("batch", [1, 4, 16])
@pytest.mark.parametrize("price", PRICES)
@pytest.mark.parametrize("text", [*STEADY, *TURNS])
def test_guessing_never_takes_longer_than_plain_steps_over_97_percent(text: str, price: float, batch: int, noise: float) -> None:
    assert drive((STEADY | TURNS)[text], price, batch, noise=noise)[0] >= 0.97


@pytest.mark.parametrize("batch", [1, 4, 16])
@pytest.mark.parametrize("price", PRICES)
@pytest.mark.parametrize("alpha", [0.5, 0.7, 0.8, 0.9, 0.95])
def test_the_controller_takes_what_there_is(alpha: float, price: float, batch: int) -> None:
    best = max(speculative.expected_tokens(alpha, gamma) / (1 + price * gamma) for gamma in range(9))
    ours, guessing = drive(lambda step: alpha, price, batch)
    assert ours >= 0.93 * best
    assert best > 1 or guessing < 0.2


@pytest.mark.parametrize("first", [5, 20, 80])
def test_what_a_drafter_reads_first_is_paid_for_too(first: int) -> None:
    """So many plain steps' time before the first guess: won back where guesses are good, waited off where they are not."""
    assert drive(lambda step: 0.9, 0.15, 1, first=first)[0] > 2
    assert drive(lambda step: 0.1, 0.15, 1, steps=20_000, first=first)[0] >= 0.97
    ours, guessing = drive(lambda step: 0.1, 0.15, 1, steps=60 * first + 20, first=first)
    assert ours < 0.99 and guessing < 0.2, "it did not rest for what was read"


def test_a_rest_asks_nobody() -> None:
    """The share of steps that look is small, and in the others not even the sequences are listed."""

    class Untouched:
        def __iter__(self) -> None:
            raise AssertionError("somebody was asked")

    control = speculative.Controller()
    for _ in range(control.SEEN):
        assert control.gamma(2) == 0 and not control.rests
        control.plain(2, 1.0)
    assert control.gamma(2) == 1
    control.observe(1, 0)
    control.guessed(2, 2, 2, 1.5)
    assert control.rests and control.gamma(2) == 0, "a failed trial cost half a step"
    resting = speculative.Speculation("ngram", 8, None)
    resting.control = control
    resting.plan(Untouched(), False, lambda seq: 8)
    for _ in range(49):
        control.plain(2, 1.0)
        assert control.rests
    control.passed(1.5)
    assert not control.rests
    control.guessed(2, 0, 2, 0.001)
    assert control.rests, "looking without finding costs as well"
