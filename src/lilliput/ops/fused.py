"""Fused passes over rows: bias and GELU; bias, residual and LayerNorm. One trip through memory each instead of two or three.

They stand after a product whose output is too large for the cache, where each separate pass would read and write it again.
What they save is small beside the products (ByteTransformer: 3 to 4 % of a layer each); leave them where autograd is needed.

Zhai et al. 2023 (ByteTransformer), arXiv 2210.03052, section III.C.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lilliput.ops import native


def supports(x: Tensor) -> str | None:
    """Why the extension cannot take these rows; None when it can."""
    if native.module() is None:
        return native.missing()
    if x.device.type != "cpu" or x.dtype != torch.float32:
        return f"it takes fp32 on the CPU, got {x.dtype} on {x.device.type}"
    if torch.is_grad_enabled() and x.requires_grad:
        return "it keeps nothing for a backward pass"
    return None if x.is_contiguous() else "it takes contiguous rows"


def bias_gelu(x_RC: Tensor, bias_C: Tensor | None, *, tanh: bool = False) -> Tensor:
    """gelu(x + bias), fp32 [..., C], written over x where the extension takes it; tanh: the approximation with tanh. Returns the result."""
    if supports(x_RC) is not None:
        return gelu_reference(x_RC, bias_C, tanh=tanh)
    GELU(x_RC, _vector(bias_C), tanh)
    return x_RC


def residual_norm(x_RC: Tensor, bias_C: Tensor | None, residual_RC: Tensor, weight_C: Tensor, beta_C: Tensor, eps: float) -> Tensor:
    """LayerNorm(x + bias + residual) * weight + beta, fp32 [..., C]."""
    if supports(x_RC) is not None or supports(residual_RC) is not None:
        return norm_reference(x_RC, bias_C, residual_RC, weight_C, beta_C, eps)
    assert x_RC.shape == residual_RC.shape, f"residual {tuple(residual_RC.shape)} beside rows {tuple(x_RC.shape)}"
    return NORM(x_RC, _vector(bias_C), residual_RC, _vector(weight_C), _vector(beta_C), eps)


def gelu_reference(x: Tensor, bias: Tensor | None, *, tanh: bool = False) -> Tensor:
    """The same by plain torch, not in place."""
    return F.gelu(x if bias is None else x + bias, approximate="tanh" if tanh else "none")


def norm_reference(x: Tensor, bias: Tensor | None, residual: Tensor, weight: Tensor, beta: Tensor, eps: float) -> Tensor:
    """The same by plain torch."""
    return F.layer_norm((x if bias is None else x + bias) + residual, x.shape[-1:], weight, beta, eps)


def _vector(x: Tensor | None) -> Tensor | None:
    assert x is None or (x.dtype == torch.float32 and x.is_contiguous()), "vectors must be contiguous fp32"
    return x


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def _run_gelu(x: Tensor, bias: Tensor | None, tanh: bool) -> None:
    native.module().bias_gelu(x.data_ptr(), x.numel() // max(1, x.shape[-1]), x.shape[-1], _address(bias), tanh)


def _run_norm(x: Tensor, bias: Tensor | None, residual: Tensor, weight: Tensor, beta: Tensor, eps: float) -> Tensor:
    y, width = torch.empty_like(x), x.shape[-1]
    addresses = (t.data_ptr() for t in (x, residual, y))
    native.module().residual_norm(*addresses, x.numel() // max(1, width), width, _address(bias), weight.data_ptr(), beta.data_ptr(), eps)
    return y


def _fake_norm(x: Tensor, bias: Tensor | None, residual: Tensor, weight: Tensor, beta: Tensor, eps: float) -> Tensor:
    return torch.empty_like(x)


GELU = native.define("bias_gelu(Tensor(a!) x, Tensor? bias, bool tanh) -> ()", _run_gelu, lambda x, bias, tanh: None)
NORM = native.define("residual_norm(Tensor x, Tensor? bias, Tensor residual, Tensor weight, Tensor beta, float eps) -> Tensor", _run_norm, _fake_norm)
