"""y = x W^T + b where W may be stored in fewer bits than x is computed in.

CPUs without bf16 units multiply bf16 matrices about 8x slower than fp32 ones, so a bf16 weight is stored in bf16 and
multiplied in the dtype of x ("compute in fp32, store in fewer bits"). The widened copy lives for one product only: the
backward pass keeps the stored weight and widens it again (without this, autograd would hold an fp32 copy of the whole
model). The weight's gradient comes in the weight's own dtype. A weight that is no matrix but bytes of a codec is widened
by the codec's function instead, and has no gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class _Widened(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, decode: Callable[[Tensor], Tensor] | None) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        ctx.decode = decode
        ctx.bias_dtype = None if bias is None else bias.dtype
        return F.linear(x, matrix(weight, decode).to(x.dtype), None if bias is None else bias.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        x, weight = ctx.saved_tensors
        flat = grad.reshape(-1, grad.shape[-1])
        grad_x = grad @ matrix(weight, ctx.decode).to(grad.dtype) if ctx.needs_input_grad[0] else None
        grad_weight = (flat.t() @ x.reshape(-1, x.shape[-1])).to(weight.dtype) if ctx.needs_input_grad[1] else None
        grad_bias = flat.sum(0).to(ctx.bias_dtype) if ctx.needs_input_grad[2] else None
        return grad_x, grad_weight, grad_bias, None


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, decode: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """x [..., in], weight [out, in], bias [out] -> [..., out] in x's dtype; gradients in the dtypes of what they belong to.

    decode: makes the matrix of a weight that is stored as bytes.
    """
    if weight.dtype == x.dtype:
        return F.linear(x, weight, bias)
    return _Widened.apply(x, weight, bias, decode)


def matrix(weight: Tensor, decode: Callable[[Tensor], Tensor] | None) -> Tensor:
    """The matrix of a weight: itself, or what decode makes of its bytes."""
    return weight if decode is None else decode(weight)
