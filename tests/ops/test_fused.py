"""Fused passes against plain torch, at every level, and a row's bits in any company."""

from __future__ import annotations

import random

import pytest
import torch

from lilliput.ops import fused, native

pytestmark = pytest.mark.skipif(native.module() is None, reason=str(native.missing()))
LEVELS = native.levels()


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("tanh", [False, True])
@pytest.mark.parametrize("seed", range(6))
def test_bias_gelu(seed: int, tanh: bool, level: str) -> None:
    random.seed(seed)
    torch.manual_seed(seed)
    rows, width = random.choice([0, 1, 5, 40]), random.choice([1, 7, 16, 33, 768])
    x, bias = torch.randn(rows, width) * 4, torch.randn(width) if seed % 3 else None
    want = fused.gelu_reference(x.double(), None if bias is None else bias.double(), tanh=tanh)
    with native.using(level):
        got = fused.bias_gelu(given := x.clone(), bias, tanh=tanh)
    assert got.data_ptr() == given.data_ptr(), "in place"
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("seed", range(8))
def test_residual_norm(seed: int, level: str) -> None:
    random.seed(seed)
    torch.manual_seed(seed)
    rows, width = random.choice([0, 1, 5, 40]), random.choice([2, 7, 16, 33, 768])
    x, residual, weight, beta = torch.randn(rows, width), torch.randn(rows, width) * 3 + 1, torch.randn(width), torch.randn(width)
    bias = torch.randn(width) if seed % 3 else None
    want = fused.norm_reference(*(None if t is None else t.double() for t in (x, bias, residual, weight, beta)), 1e-5)
    with native.using(level):
        got = fused.residual_norm(x, bias, residual, weight, beta, 1e-5)
        alone = [fused.residual_norm(x[i : i + 1], bias, residual[i : i + 1], weight, beta, 1e-5) for i in range(rows)]
    torch.testing.assert_close(got.double(), want, rtol=2e-5, atol=2e-5)
    assert rows == 0 or torch.equal(got, torch.cat(alone)), "a row depends on itself alone"


def test_what_needs_gradients_takes_the_reference() -> None:
    x = torch.randn(3, 8, requires_grad=True)
    assert "backward" in str(fused.supports(x))
    fused.bias_gelu(x, torch.ones(8)).sum().backward()
    assert x.grad is not None


def test_the_ops_are_good_torch_citizens() -> None:
    x, bias = torch.randn(4, 24), torch.randn(24)
    torch.library.opcheck(fused.GELU, (x.clone(), bias, True))
    torch.library.opcheck(fused.NORM, (x, bias, torch.randn(4, 24), torch.randn(24), torch.randn(24), 1e-5))
