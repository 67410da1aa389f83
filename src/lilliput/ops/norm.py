"""RMSNorm: y = x / sqrt(mean(x^2) + eps) * w over the last dimension.

torch's own rms_norm has a fused kernel on CUDA only; on CPUs autograd keeps x, x/rms and four small tensors and needs
twice the time. This one keeps x and 1/rms: one activation less a norm.   Zhang and Sennrich 2019, arXiv 1910.07467.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        scale = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return (x * scale).mul_(weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        x, weight, scale = ctx.saved_tensors
        unit = x * scale
        grad_weight = (grad * unit).reshape(-1, x.shape[-1]).sum(0) if ctx.needs_input_grad[1] else None
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = grad * weight
            along = torch.linalg.vecdot(grad_x, unit).div_(x.shape[-1]).unsqueeze(-1)
            grad_x = grad_x.sub_(unit.mul_(along)).mul_(scale)
        return grad_x, grad_weight, None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [..., C], weight [C] of any dtype -> [..., C] in x's dtype."""
    weight = weight.to(x.dtype)
    if x.is_cuda or x.dtype != torch.float32 or not torch.is_grad_enabled():
        return F.rms_norm(x, weight.shape, weight, eps)
    return _RMSNorm.apply(x, weight, eps)
