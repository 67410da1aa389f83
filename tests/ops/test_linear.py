"""linear with weights stored in fewer bits: fp32 arithmetic, no wide copy kept, gradients in the stored dtype."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from lilliput.ops.linear import linear


@pytest.mark.parametrize("bias", [False, True])
def test_bf16_weight_computes_in_fp32(bias: bool, device: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 5, 16, device=device, requires_grad=True)
    weight = torch.randn(8, 16, device=device).bfloat16().requires_grad_()
    b = torch.randn(8, device=device).bfloat16().requires_grad_() if bias else None
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = linear(x, weight, b)
    assert {t.data_ptr() for t in kept} == {x.data_ptr(), weight.data_ptr()}, "only the input and the stored weight are kept"
    wide = [t.detach().float().requires_grad_() for t in (x, weight, *([b] if b is not None else []))]
    expected = F.linear(*wide)
    assert y.dtype == torch.float32 and torch.equal(y, expected)
    y.square().sum().backward()
    expected.square().sum().backward()
    assert x.grad is not None and weight.grad is not None and wide[0].grad is not None and wide[1].grad is not None
    torch.testing.assert_close(x.grad, wide[0].grad)
    assert weight.grad.dtype == torch.bfloat16
    torch.testing.assert_close(weight.grad, wide[1].grad.bfloat16())
    if b is not None:
        assert b.grad is not None and wide[2].grad is not None
        torch.testing.assert_close(b.grad, wide[2].grad.bfloat16())


def test_a_frozen_weight_keeps_no_input() -> None:
    x = torch.randn(4, 16, requires_grad=True)
    for weight in (torch.randn(8, 16), torch.randn(8, 16).bfloat16()):
        kept: list[torch.Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):  # noqa: B023
            y = linear(x, weight)
        assert {t.data_ptr() for t in kept} == {weight.data_ptr()}
        (grad,) = torch.autograd.grad(y.sum(), x)
        torch.testing.assert_close(grad, weight.float().sum(0).expand(4, 16))


def test_equal_dtypes_are_plain() -> None:
    x, weight = torch.randn(4, 16), torch.randn(8, 16)
    assert torch.equal(linear(x, weight), F.linear(x, weight))
    assert linear(x.bfloat16(), weight.bfloat16()).dtype == torch.bfloat16
