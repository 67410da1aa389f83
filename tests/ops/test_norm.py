"""rms_norm: torch's numbers, with half of the kept bytes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from lilliput.ops.norm import rms_norm


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(1, 5), min_size=0, max_size=3), st.integers(1, 70), st.sampled_from([1e-6, 1e-5, 1e-2]), st.integers(0, 1000))
def test_values_and_gradients(shape: list[int], dim: int, eps: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, grad = (torch.randn(*shape, dim, generator=generator) for _ in range(2))
    weight = torch.randn(dim, generator=generator)
    results = []
    for function in (rms_norm, lambda a, w, e: F.rms_norm(a, w.shape, w, e)):
        a, w = x.clone().requires_grad_(), weight.clone().requires_grad_()
        y = function(a, w, eps)
        results.append((y, *torch.autograd.grad(y, (a, w), grad)))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-4)


def test_gradients_in_double_precision() -> None:
    from lilliput.ops.norm import _RMSNorm

    x, w = torch.randn(3, 4, 6, dtype=torch.float64, requires_grad=True), torch.randn(6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a, b: _RMSNorm.apply(a, b, 1e-5), (x, w))


def test_kept_bytes_and_without_gradients(device: str) -> None:
    x, weight = torch.randn(32, 64, device=device, requires_grad=True), torch.ones(64, device=device, requires_grad=True)
    kept: dict[int, int] = {}

    def keep(t: torch.Tensor) -> torch.Tensor:
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        y = rms_norm(x, weight, 1e-5)
    assert sum(kept.values()) == (32 * 64 + 64 + 32) * 4
    with torch.no_grad():
        torch.testing.assert_close(rms_norm(x, weight, 1e-5), y)


@pytest.mark.parametrize(("x", "weight"), [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32)])
def test_answers_in_the_dtype_of_x(x: torch.dtype, weight: torch.dtype) -> None:
    values, scale = torch.randn(4, 8), torch.rand(8)
    got = rms_norm(values.to(x).requires_grad_(), scale.to(weight), 1e-5)
    assert got.dtype == x
    torch.testing.assert_close(got.float(), F.rms_norm(values, (8,), scale, 1e-5), atol=0.05, rtol=0.05)
