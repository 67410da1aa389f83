"""Sampling: distributions equal transformers' processors; draws follow them; the random number depends on (seed, position) alone."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from lilliput.ops import sampling


def oracle(logits_V: torch.Tensor, temperature: float, top_k: int, top_p: float, min_p: float) -> torch.Tensor:
    """transformers' distribution, its processors in its order, in float64."""
    ids, scores = torch.zeros(1, 1, dtype=torch.long), logits_V.double()[None]
    scores = TemperatureLogitsWarper(temperature)(ids, scores)
    if top_k:
        scores = TopKLogitsWarper(top_k)(ids, scores)
    if top_p < 1:
        scores = TopPLogitsWarper(top_p)(ids, scores)
    if min_p:
        scores = MinPLogitsWarper(min_p)(ids, scores)
    return scores.softmax(-1)[0]


def dense(logits_V: torch.Tensor, **filters: float) -> torch.Tensor:
    ids_K, probs_K = sampling.candidates(logits_V, **filters)
    return torch.zeros(len(logits_V), dtype=torch.float64).index_put((ids_K,), probs_K)


@settings(deadline=None, max_examples=150)
@given(
    seed=st.integers(0, 2**31),
    vocab=st.sampled_from([1, 2, 17, 300, 2000]),
    temperature=st.sampled_from([0.3, 0.7, 1.0, 2.5]),
    top_k=st.sampled_from([0, 1, 5, 50, 5000]),
    top_p=st.sampled_from([1.0, 0.999, 0.9, 0.5, 0.01]),
    min_p=st.sampled_from([0.0, 0.02, 0.3, 1.0]),
)
def test_distribution_equals_transformers(seed: int, vocab: int, temperature: float, top_k: int, top_p: float, min_p: float) -> None:
    logits_V = torch.randn(vocab, generator=torch.Generator().manual_seed(seed)) * 3
    filters = dict(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    torch.testing.assert_close(dense(logits_V, **filters), oracle(logits_V, **filters), rtol=1e-9, atol=1e-12)


def test_ties_with_the_kth_token_stay() -> None:
    logits_V = torch.tensor([1.0, 3.0, 2.0, 2.0, 2.0, 0.0])
    ids_K, _ = sampling.candidates(logits_V, temperature=1.0, top_k=2)
    assert sorted(ids_K.tolist()) == [1, 2, 3, 4]
    torch.testing.assert_close(dense(logits_V, temperature=1.0, top_k=2), oracle(logits_V, 1.0, 2, 1.0, 0.0))


def test_top_p_grows_its_selection_until_the_mass_is_enough() -> None:
    logits_V = torch.randn(5000, generator=torch.Generator().manual_seed(1)) * 0.01  # almost flat: top_p=0.9 keeps about 4,500
    ids_K, probs_K = sampling.candidates(logits_V, temperature=1.0, top_p=0.9)
    assert 4400 < len(ids_K) < 4600
    assert torch.equal(probs_K, probs_K.sort(descending=True).values)
    torch.testing.assert_close(dense(logits_V, temperature=1.0, top_p=0.9), oracle(logits_V, 1.0, 0, 0.9, 0.0), rtol=1e-9, atol=1e-12)


@settings(deadline=None, max_examples=50)
@given(seed=st.integers(0, 2**31), seen=st.lists(st.integers(0, 99), min_size=1, max_size=40), penalty=st.sampled_from([0.5, 1.1, 1.8]))
def test_repetition_penalty_equals_transformers(seed: int, seen: list[int], penalty: float) -> None:
    logits_V = torch.randn(100, generator=torch.Generator().manual_seed(seed))
    before = logits_V.clone()
    expected = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([seen]), logits_V[None].clone())[0]
    assert torch.equal(sampling.penalise(logits_V, seen, penalty), expected)
    assert torch.equal(logits_V, before)


@pytest.mark.parametrize("filters", [dict(), dict(top_k=8), dict(top_p=0.8), dict(min_p=0.1), dict(top_k=12, top_p=0.9, min_p=0.02)], ids=str)
def test_draws_follow_the_distribution(filters: dict[str, float]) -> None:
    """Chi-square over 20,000 positions of one seed; the 99.9 % quantile of k degrees is below k + 3.1 sqrt(2k) + 8."""
    logits_V = torch.randn(24, generator=torch.Generator().manual_seed(5)) * 1.5
    ids_K, probs_K = sampling.candidates(logits_V, temperature=0.9, **filters)
    count, draws = torch.zeros(24, dtype=torch.float64), 20_000
    for position in range(draws):
        count[sampling.draw(ids_K, probs_K, sampling.uniform(7, position))] += 1
    expected = oracle(logits_V, 0.9, filters.get("top_k", 0), filters.get("top_p", 1.0), filters.get("min_p", 0.0)) * draws
    assert count[expected == 0].sum() == 0
    kept = expected > 0
    chi2, degrees = float(((count - expected)[kept] ** 2 / expected[kept]).sum()), int(kept.sum()) - 1
    assert chi2 < degrees + 3.1 * (2 * degrees) ** 0.5 + 8


def test_the_random_number_is_a_function_of_seed_and_position() -> None:
    grid = torch.tensor([[sampling.uniform(seed, position) for position in range(200)] for seed in range(50)], dtype=torch.float64)
    assert sampling.uniform(3, 17) == float(grid[3, 17])
    assert float(grid.min()) >= 0 and float(grid.max()) < 1
    assert len(set(grid.flatten().tolist())) == grid.numel()
    assert abs(float(grid.mean()) - 0.5) < 0.01 and abs(float(grid.var()) - 1 / 12) < 0.003
    neighbours = torch.corrcoef(torch.stack((grid[:, :-1].flatten(), grid[:, 1:].flatten())))[0, 1]
    assert abs(float(neighbours)) < 0.04  # 4 sigma of 10,000 pairs


@pytest.mark.parametrize("u, token", [(0.0, 4), (0.4999, 4), (0.5, 2), (0.75, 9), (1 - 2**-53, 9)])
def test_draw_at_the_borders(u: float, token: int) -> None:
    assert sampling.draw(torch.tensor([4, 2, 9]), torch.tensor([0.5, 0.25, 0.25], dtype=torch.float64), u) == token


def test_draw_never_takes_a_token_without_probability() -> None:
    ids_K, probs_K = torch.tensor([0, 1, 2]), torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64)
    assert {sampling.draw(ids_K, probs_K, u) for u in (0.0, 0.3, 0.999999)} == {1}


def test_temperature_zero_is_the_largest_logit_after_the_penalty() -> None:
    logits_V = torch.tensor([1.0, 2.0, 1.9])
    off = dict(temperature=0.0, top_k=0, top_p=1.0, min_p=0.0)
    assert sampling.choose(logits_V, [1], 0.99, **off, repetition_penalty=1.0) == 1
    assert sampling.choose(logits_V, [1], 0.99, **off, repetition_penalty=1.2) == 2
