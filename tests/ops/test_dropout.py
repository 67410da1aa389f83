"""Dropout's mask: the right rate, a pure function of its counter, the same forward, backward and again."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from lilliput.base import seeds
from lilliput.ops.dropout import Counter, Dropout, keep_mask

N = torch.Size([400, 500])


def mask(*key: int, p: float = 0.5, device: str = "cpu") -> torch.Tensor:
    return keep_mask(N, p, key, torch.device(device))  # type: ignore[arg-type]


@settings(deadline=None, max_examples=25)
@given(st.floats(0.01, 0.99), st.tuples(*[st.integers(0, 10**9)] * 4))
def test_rate(p: float, key: tuple[int, int, int, int]) -> None:
    kept = mask(*key, p=p)
    sigma = (p * (1 - p) / kept.numel()) ** 0.5
    assert abs(kept.float().mean().item() - (1 - p)) < 5 * sigma
    rows = kept.float().mean(1)
    assert rows.std().item() < 1.5 * (p * (1 - p) / N[1]) ** 0.5


def test_neighbours_and_other_counters_are_independent() -> None:
    base = mask(0, 0, 0, 0).float() * 2 - 1
    others = [mask(*key).float() * 2 - 1 for key in [(1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1), (0, 0, 0, 2)]]
    flat = base.flatten()
    limit = 5 / flat.numel() ** 0.5
    for lag in (1, 2, 3, 4, 8, 16, 64, 500, 512, 1024):
        assert abs((flat[lag:] * flat[:-lag]).mean().item()) < limit, lag
    for other in others:
        assert abs((base * other).mean().item()) < limit
        for lag in (1, 2, 500):
            assert abs((flat[lag:] * other.flatten()[:-lag]).mean().item()) < limit


def test_values_are_fixed() -> None:
    """Resuming an old run draws the old masks: these bits may never change. Beside them the hash in plain integers."""
    bits = "".join("01"[bit] for bit in keep_mask(torch.Size([32]), 0.5, (7, 3, 1, 2), torch.device("cpu")).tolist())
    assert bits == "01100101100000111100011010000100"
    first, second = ((seeds.key(7, 3, 1, 2, half) + 2**31) % 2**32 for half in ("first", "second"))

    def hashed(x: int) -> int:
        x ^= first
        x = (x ^ x >> 16) * 0x7FEB352D & 0xFFFFFFFF ^ second
        x = (x ^ x >> 15) * 0x846CA68B & 0xFFFFFFFF
        return x ^ x >> 16

    # as signed numbers: the upper half of the unsigned range is negative
    assert bits == "".join("10"[hashed(i) >> 31] for i in range(32))


def test_threads_and_devices_do_not_matter(device: str) -> None:
    threads = torch.get_num_threads()
    expected = mask(1, 2, 3, 4, p=0.1)
    try:
        torch.set_num_threads(1 if threads > 1 else 2)
        assert torch.equal(mask(1, 2, 3, 4, p=0.1, device=device).cpu(), expected)
    finally:
        torch.set_num_threads(threads)


def test_module_forward_backward_and_recompute() -> None:
    counter = Counter(seed=5)
    drop = Dropout(counter, site=3).train()
    x = torch.randn(64, 32, requires_grad=True)
    assert drop(x) is x
    drop.p = 0.25
    state = torch.get_rng_state()
    kept_bytes: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept_bytes.append(t) or t, lambda t: t):
        y = drop(x)
    assert not kept_bytes, "the mask is drawn again, not kept"
    assert torch.equal(torch.get_rng_state(), state)
    kept = keep_mask(x.shape, 0.25, (5, 0, 0, 3), x.device)
    torch.testing.assert_close(y, x * kept / 0.75)
    (grad,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(grad, kept / 0.75)
    counter.micro = 1
    assert not torch.equal(drop(x) == 0, y == 0)
    counter.micro = 0
    again = checkpoint(lambda t: drop(t).sin(), x, use_reentrant=False, preserve_rng_state=False)
    (recomputed,) = torch.autograd.grad(again.sum(), x)
    (plain,) = torch.autograd.grad(drop(x).sin().sum(), x)
    assert torch.equal(recomputed, plain)
    assert drop.eval()(x) is x


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtype_stays(dtype: torch.dtype) -> None:
    drop = Dropout(Counter(), 0).train()
    drop.p = 0.5
    assert drop(torch.ones(8, dtype=dtype)).dtype == dtype
