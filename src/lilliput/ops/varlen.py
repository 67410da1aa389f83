"""Padding-free batches: sequences of different lengths as one matrix of rows, [B, S, C] -> [sum of lengths, C].

The exclusive prefix sum of the mask says where each valid row goes. Everything that works row by row (products, norms,
activations) then does sum(lengths) rows of work instead of B x S; attention takes the borders (`cu`) and does the sum of squares.
With mean / max length a: products cost a, attention a^2 of the padded batch. Where all lengths are equal there is nothing to gain.

    packing = Packing(mask_BS)      rows = packing.pack(x_BSC)      ... rows ...      packing.unpack(rows)

Zhai et al. 2023 (ByteTransformer), arXiv 2210.03052, section III.A.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from lilliput.base.errors import UserError
from lilliput.ops import flash


class Packing:
    """Which rows of a padded batch are valid. Made once a batch, used by every layer."""

    def __init__(self, mask_BS: Tensor) -> None:
        """mask [B, S], nonzero = valid, in any places. UserError when it has another shape."""
        if mask_BS.dim() != 2:
            raise UserError(f"the mask has {mask_BS.dim()} dimensions", "wanted [batch, tokens]", "pass the tokenizer's attention_mask")
        valid = mask_BS != 0
        self.batch, self.tokens = valid.shape
        self.lengths = valid.sum(1, dtype=torch.int32)
        self.cu = torch.zeros(self.batch + 1, dtype=torch.int32, device=valid.device)
        self.cu[1:] = self.lengths.cumsum(0)
        self.rows_R = valid.flatten().nonzero().flatten()  # padded row of each packed row

    @property
    def count(self) -> int:
        """Rows that are valid."""
        return self.rows_R.shape[0]

    def pack(self, x_BSC: Tensor) -> Tensor:
        """[B, S, ...] -> [rows, ...]."""
        return x_BSC.flatten(0, 1).index_select(0, self.rows_R)

    def unpack(self, x_RC: Tensor) -> Tensor:
        """[rows, ...] -> [B, S, ...], zeros where nothing is valid."""
        whole = x_RC.new_zeros(self.batch * self.tokens, *x_RC.shape[1:])
        return whole.index_copy_(0, self.rows_R, x_RC).unflatten(0, (self.batch, self.tokens))

    def attention(self, q_RHD: Tensor, k_RGD: Tensor, v_RGD: Tensor, *, causal: bool = False) -> Tensor:
        """Attention of every sequence over its own rows, [rows, H, D]: one fused call, no padding (ops/flash.py), else a loop."""
        if flash.supports(q_RHD, k_RGD, v_RGD) is None:
            return flash.attention_varlen(q_RHD, k_RGD, v_RGD, self.cu, self.cu, causal=causal)
        return attention_reference(q_RHD, k_RGD, v_RGD, self.cu, causal=causal)


def attention_reference(q_RHD: Tensor, k_RGD: Tensor, v_RGD: Tensor, cu: Tensor, *, causal: bool = False) -> Tensor:
    """The same by plain torch, one sequence after another."""
    borders = cu.tolist()
    parts = []
    for start, stop in pairwise(borders):
        q, k, v = (x[start:stop].transpose(0, 1)[None] for x in (q_RHD, k_RGD, v_RGD))
        parts.append(flash.reference(q, k, v, causal=causal)[0][0].transpose(0, 1))
    return torch.cat(parts) if parts else q_RHD.new_empty(0, q_RHD.shape[1], v_RGD.shape[2])
