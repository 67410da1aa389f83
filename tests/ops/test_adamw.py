"""The compiled AdamW against plain torch, at every level, and the same bits for any tiling and number of threads."""

from __future__ import annotations

import pytest
import torch

from lilliput.ops import native
from lilliput.ops.adamw import Rule, reference, supports, update, update_master

pytestmark = pytest.mark.skipif(native.module() is None, reason=str(native.missing()))
LEVELS = native.levels()
RULE = Rule(lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, step=3)


def state(count: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    torch.manual_seed(count)
    return [torch.randn(count).to(dtype), torch.randn(count).to(dtype), torch.randn(count) * 0.1, torch.rand(count)]


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("count", [0, 1, 7, 4096, 4097, 50_001])
def test_equals_reference(count: int, level: str) -> None:
    ours, want = state(count), [x.double() for x in state(count)]
    with native.using(level):
        update(*ours, RULE, 0)
    b1, b2 = RULE.betas
    w, g, m, v = want
    m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
    w = w * (1 - RULE.lr * RULE.weight_decay) - RULE.lr * (m / (1 - b1**3)) / ((v / (1 - b2**3)).sqrt() + RULE.eps)
    for got, wanted in zip((ours[0], ours[2], ours[3]), (w, m, v)):
        torch.testing.assert_close(got.double(), wanted, rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_bits_for_any_tiling_and_threads(dtype: torch.dtype, level: str) -> None:
    """A tensor whole, and its two halves as tensors of their own (fp32: bf16's random bits count from the tensor's start)."""
    with native.using(level):
        whole, alone = state(30_000, dtype), state(30_000, dtype)
        update(*whole, RULE, 5)
        native.threads(1)
        update(*alone, RULE, 5)
        native.threads(2)
        assert all(torch.equal(a, b) for a, b in zip(whole, alone))
        if dtype == torch.float32:
            halves = state(30_000)
            for part in (slice(0, 11_111), slice(11_111, None)):
                update(*[x[part] for x in halves], RULE, 5)
            assert all(torch.equal(a, b) for a, b in zip(whole, halves))


@pytest.mark.parametrize("level", LEVELS)
def test_bf16_rounds_to_a_neighbour_and_without_bias(level: str) -> None:
    rule = Rule(lr=1e-3, betas=(0.0, 0.0), eps=1e-30, weight_decay=0.0, step=1)  # every update is lr
    weight, ones = torch.ones(200_000, dtype=torch.bfloat16), torch.ones(200_000, dtype=torch.bfloat16)
    with native.using(level):
        update(weight, ones, torch.zeros(200_000), torch.zeros(200_000), rule, 9)
        again = torch.ones_like(weight)
        update(again, ones, torch.zeros(200_000), torch.zeros(200_000), rule, 9)
    assert torch.equal(weight, again)
    assert set(weight.float().unique().tolist()) == {1.0, 1.0 - 2**-8}
    assert weight.double().mean().item() == pytest.approx(1 - 1e-3, abs=3e-5)


def test_bf16_keeps_infinities() -> None:
    weight = torch.tensor([float("inf"), float("nan"), 1.0], dtype=torch.bfloat16)
    update(weight, torch.zeros_like(weight), torch.zeros(3), torch.zeros(3), RULE, 0)
    assert weight[0] == float("inf") and weight[1].isnan() and weight[2].isfinite()


def test_reference_and_refusals() -> None:
    half = state(10)
    assert "float16" in str(supports(half[0].half(), half[1].half())) and "contiguous" in str(supports(torch.zeros(4, 4).t(), torch.zeros(4, 4)))
    ours, plain = state(100), state(100)
    update(*ours, RULE, 0)
    reference(*plain, RULE, 0)
    assert all(torch.allclose(a, b, rtol=1e-6, atol=1e-7) for a, b in zip(ours, plain))


def test_autograd_notices() -> None:
    weight = torch.ones(4, requires_grad=True)
    loss = (weight * weight).sum()
    update(weight, torch.ones(4), torch.zeros(4), torch.zeros(4), RULE, 0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("count", [1, 255, 4097, 50_001])
def test_masters_get_the_plain_update_of_the_scaled_gradient_and_a_rounded_copy(count: int, ahead: bool, wide: bool, level: str) -> None:
    with native.using(level):
        weight, gradient, first, second = state(count)
        gradient = gradient if wide else gradient.bfloat16()
        plain = [weight.clone(), gradient.float() * 0.37, first.clone(), second.clone()]
        copy, before = torch.full((count,), 7.0, dtype=torch.bfloat16), weight.clone()
        update_master(weight, gradient, first, second, copy, RULE, 0.37, ahead)
        update(*plain, RULE, 0)
    assert all(torch.equal(a, b) for a, b in zip((weight, first, second), (plain[0], plain[2], plain[3])))
    assert torch.equal(copy, (plain[0] + (plain[0] - before) if ahead else plain[0]).bfloat16())


@pytest.mark.parametrize("tile", [64, 4096, 10_000])
@pytest.mark.parametrize("ahead", [False, True])
def test_masters_tile_by_tile_are_the_same_bits(ahead: bool, tile: int) -> None:
    whole, tiles = ([*state(30_001), torch.empty(30_001, dtype=torch.bfloat16)] for _ in range(2))
    update_master(*whole, RULE, 0.5, ahead)
    for at in range(0, 30_001, tile):
        update_master(*[t[at : at + tile] for t in tiles], RULE, 0.5, ahead)
    assert all(torch.equal(a, b) for a, b in zip(whole, tiles))


def test_copies_round_as_torch_does() -> None:
    """Ties to even, the largest numbers, infinities; a NaN stays one."""
    still = Rule(lr=0.0, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0, step=1)
    values = torch.cat([torch.randint(-(2**31), 2**31 - 1, (100_000,), dtype=torch.int32).view(torch.float32), torch.tensor([1 + 2**-8, 3.4e38])])
    values = torch.cat([values[values.isfinite()], torch.tensor([float("inf"), -float("inf"), float("nan")])])
    copy, zeros = torch.empty_like(values, dtype=torch.bfloat16), torch.zeros_like(values)
    update_master(values.clone(), zeros, zeros.clone(), zeros.clone(), copy, still)
    assert torch.equal(copy[:-1], values[:-1].bfloat16()) and copy[-1].isnan()


@pytest.mark.parametrize("ahead", [False, True])
def test_masters_without_kernels_are_close_and_what_does_not_fit_is_refused(ahead: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, plain = ([*state(1000), torch.empty(1000, dtype=torch.bfloat16)] for _ in range(2))
    update_master(*ours, RULE, 0.5, ahead)
    with pytest.raises(AssertionError, match="as many numbers"):
        update_master(*ours[:4], torch.empty(999, dtype=torch.bfloat16), RULE)
    monkeypatch.setattr(native, "module", lambda: None)
    update_master(*plain, RULE, 0.5, ahead)
    assert all(torch.allclose(a.float(), b.float(), rtol=1e-2 if a.dtype == torch.bfloat16 else 1e-6, atol=1e-7) for a, b in zip(ours, plain))
