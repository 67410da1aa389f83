"""Linear and cross-entropy over chunks of rows: sum of -log softmax(h W^T)[target], without the logits of all rows at any time.

    a chunk    logits -> log-softmax -> the targets' own      and, where gradients are wanted, in the same pass
               d = softmax - one-hot -> dh of the chunk = d W,   dW += d^T h
    backward   dh and dW times the gradient of the loss, where they lie

At most 2 x chunk x vocabulary x 4 bytes beside dh and dW, instead of 3 x rows x vocabulary x 4; as many products as the plain loss. The plain
one makes dW in the backward pass, but before anything else there, so nothing is there for longer. No second backward pass.
dW is a sum over chunks and is scaled after it: gradients are those of the plain loss within rounding. The loss itself adds what the plain
one adds, in its order: equal bits where a product's rows do not depend on how many there are.

Hsu et al. 2024 (Liger kernel), arXiv 2410.10989, section 3.2; Wijmans et al. 2024 (cut cross-entropy), arXiv 2411.09009, recompute instead.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor, weight: Tensor, targets_N: Tensor, chunk: int, ignore: int, gradients: bool) -> Tensor:
        h_NC, wide_VC = h.reshape(-1, h.shape[-1]), weight.to(h.dtype)
        dh_NC = torch.empty_like(h_NC) if gradients and ctx.needs_input_grad[0] else None
        dw_VC = torch.zeros(weight.shape, dtype=torch.float32, device=h.device) if gradients and ctx.needs_input_grad[1] else None
        scored_N = targets_N != ignore
        picked_N1 = torch.empty(len(h_NC), 1, dtype=torch.float32, device=h.device)
        for start in range(0, len(h_NC), chunk):
            rows = slice(start, start + chunk)
            index_N1 = targets_N[rows].masked_fill(~scored_N[rows], 0).unsqueeze(1)
            _rows(h_NC[rows], wide_VC, index_N1, scored_N[rows].unsqueeze(1), picked_N1[rows], None if dh_NC is None else dh_NC[rows], dw_VC)
        ctx.save_for_backward(dh_NC, dw_VC)
        ctx.shape, ctx.dtype = h.shape, weight.dtype
        zeros_N = torch.zeros_like(targets_N).masked_fill(~scored_N, ignore)
        return F.nll_loss(picked_N1, zeros_N, ignore_index=ignore, reduction="sum")

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        dh_NC, dw_VC = ctx.saved_tensors
        dh = None if dh_NC is None else dh_NC.mul_(grads[0]).view(ctx.shape)
        return dh, None if dw_VC is None else dw_VC.mul_(grads[0]).to(ctx.dtype), None, None, None, None


def _rows(h_NC: Tensor, wide_VC: Tensor, index_N1: Tensor, scored_N1: Tensor, picked_N1: Tensor, dh_NC: Tensor | None, dw_VC: Tensor | None) -> None:
    """One chunk, written into picked and dh and added to dw. A function of its own, so that its logits are gone when the next one's are made."""
    logp_NV = F.log_softmax(F.linear(h_NC, wide_VC).float(), -1)
    picked_N1.copy_(logp_NV.gather(1, index_N1))
    if dh_NC is None and dw_VC is None:
        return
    d_NV = logp_NV.exp_().mul_(scored_N1).scatter_add_(1, index_N1, -scored_N1.float()).to(h_NC.dtype)
    if dh_NC is not None:
        torch.mm(d_NV, wide_VC, out=dh_NC)
    if dw_VC is None:
        return
    if d_NV.dtype == dw_VC.dtype:
        dw_VC.addmm_(d_NV.t(), h_NC)
    else:
        dw_VC.add_(d_NV.t() @ h_NC)


def linear_cross_entropy(h: Tensor, weight_VC: Tensor, targets_N: Tensor, chunk: int, ignore: int = -100) -> Tensor:
    """Summed cross-entropy (nats, fp32) of integer targets under logits h W^T, `chunk` rows at a time.

    h [..., C] of N rows in all; targets of `ignore` count for nothing. The weight may be stored in fewer bits than h is computed in; its
    gradient comes in its own dtype.
    """
    return _Chunked.apply(h, weight_VC, targets_N, chunk, ignore, torch.is_grad_enabled())
