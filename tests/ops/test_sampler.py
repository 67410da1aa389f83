"""The compiled sampler against the plain torch one: the same token for the same random number, in any batch."""

from __future__ import annotations

import math
import random

import pytest
import torch

from lilliput.ops import native, sampling
from lilliput.ops.sampling import Draw, choose_rows

pytestmark = pytest.mark.skipif(native.module() is None, reason=str(native.missing()))
LEVELS = native.levels()


def random_draw(vocab: int) -> Draw:
    seen = [random.randrange(vocab) for _ in range(random.choice([0, 3, 40]))]
    mask = None
    if random.random() < 0.3:
        words = torch.randint(-(2**31), 2**31 - 1, (-(-vocab // 32),), dtype=torch.int32)
        mask = words | 1
    return Draw(
        u=random.random(), temperature=random.choice([0, 0.3, 1.0, 2.0]), top_k=random.choice([0, 1, 5, 50, vocab]),
        top_p=random.choice([1.0, 0.1, 0.9, 0.999]), min_p=random.choice([0, 0, 0.05, 0.5]),
        repetition_penalty=random.choice([1.0, 1.3]), presence_penalty=random.choice([0.0, 0.5]),
        frequency_penalty=random.choice([0.0, 0.1]), seen={id: random.choice([0, 1, 4]) for id in seen},
        bias={random.randrange(vocab): random.choice([2.5, -math.inf])} if random.random() < 0.3 and vocab > 2 else {}, mask_W=mask,
    )  # fmt: skip


@pytest.mark.parametrize("level", LEVELS)
def test_the_reference_draws_the_same(level: str) -> None:
    random.seed(0)
    torch.manual_seed(0)
    with native.using(level):
        for case in range(400):
            vocab = random.choice([2, 7, 33, 300, 5000])
            logits = torch.randn(1, vocab) * random.choice([0.1, 3.0, 20.0]) + random.choice([0.0, 40.0])
            draw = random_draw(vocab)
            ours, want = choose_rows(logits, [draw], top=2)[0], sampling._choose_row(logits[0], draw, 2)
            assert ours.token == want.token, f"case {case}: {draw}"
            assert math.isclose(ours.total, want.total, rel_tol=1e-5, abs_tol=1e-5)
            assert [t for t, _ in ours.top] == [t for t, _ in want.top]


@pytest.mark.parametrize("level", LEVELS)
def test_the_same_in_any_batch(level: str) -> None:
    random.seed(1)
    torch.manual_seed(1)
    with native.using(level):
        logits, draws = torch.randn(13, 1000) * 4, [random_draw(1000) for _ in range(13)]
        together = choose_rows(logits, draws)
        assert together == [choose_rows(logits[i : i + 1].clone(), draws[i : i + 1])[0] for i in range(13)]


@pytest.mark.parametrize("level", LEVELS)
def test_frequencies(level: str) -> None:
    """20,000 draws of a row with temperature 0.7: chi-square against the softmax, 9 degrees of freedom, p > 0.001."""
    with native.using(level):
        logits = torch.linspace(-1, 1.5, 10)
        want = (logits.double() / 0.7).softmax(0) * 20000
        counts = torch.zeros(10)
        for start in range(0, 20000, 2000):
            draws = [Draw(sampling.uniform(5, start + i), 0.7) for i in range(2000)]
            for choice in choose_rows(logits.expand(2000, 10), draws):
                counts[choice.token] += 1
        assert float(((counts - want) ** 2 / want).sum()) < 27.9


def test_ties_go_to_the_lowest_id() -> None:
    logits = torch.tensor([[1.0, 3.0, 3.0, 3.0]])
    assert choose_rows(logits, [Draw()])[0].token == 1
    assert {choose_rows(logits, [Draw(u, 1.0, top_k=1)])[0].token for u in (0.0, 0.5, 0.9)} == {1, 2, 3}, "ties with the k-th stay"


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("at", [0, 17, 18])
def test_rows_that_are_not_finite(bad: float, at: int) -> None:
    logits = torch.zeros(2, 19)
    logits[1, at] = bad
    good, broken = choose_rows(logits, [Draw(), Draw()])
    assert good.token == 0 and broken.token == -1 and not math.isfinite(broken.total)


def test_a_mask_that_forbids_all() -> None:
    assert choose_rows(torch.zeros(1, 40), [Draw(mask_W=torch.zeros(2, dtype=torch.int32))])[0].token == -1


def test_ids_outside_the_vocabulary() -> None:
    with pytest.raises(ValueError, match="outside the vocabulary"):
        choose_rows(torch.zeros(1, 4), [Draw(bias={4: 1.0})])
