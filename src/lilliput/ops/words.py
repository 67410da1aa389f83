"""Words of the hub's quantised checkpoints: GPTQ's and AWQ's int32s as numbers, packed without rounding or decoded.

    w[o, i] = scale[g(i), o] (n[i, o] - z[g(i), o])      n of 4 or 8 bits, g(i) = i // group, or the file's own g_idx

    GPTQ   qweight [K / per, N]: a word holds `per` = 32 / bits consecutive inputs     qzeros [G, N / per]: stored is z - 1 (format v1) or z (v2)
    AWQ    qweight [K, N / 8]: a word holds 8 outputs, interleaved                      qzeros [G, N / 8]: z

4 bits become q4 with zeros in groups of 32, 64 or 128: a wider group that these divide has its scale repeated. 8 bits become w8, which has no
offsets: z must be 128. A GPTQ matrix whose inputs are grouped by activation (g_idx does not rise) can be decoded, not packed: the kernels
read groups side by side.

Frantar et al. 2022, arXiv 2210.17323; Lin et al. 2023, arXiv 2306.00978; layouts: AutoGPTQ's qlinear_cuda_old.py, AutoAWQ's packing_utils.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lilliput.base.errors import UserError
from lilliput.ops.codecs import pack_q4, pack_w8
from lilliput.ops.panels import PackedWeight

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # nibble i of an AWQ word holds output AWQ_ORDER[i] of its 8
DECODED = "serve.weights=fp16"  # of the decoded matrices


@dataclass(frozen=True)
class Numbers:
    """A matrix [outputs, inputs] as scales (n - z). groups_I: the group of each input where that is not i // group."""

    n_NK: Tensor  # uint8
    scales_NG: Tensor
    zeros_NG: Tensor
    bits: int
    groups_I: Tensor | None = None

    def rows(self, start: int, stop: int) -> Numbers:
        """Outputs [start, stop)."""
        return Numbers(self.n_NK[start:stop], self.scales_NG[start:stop], self.zeros_NG[start:stop], self.bits, self.groups_I)

    def decode(self) -> Tensor:
        """The fp32 matrix that they stand for, exactly."""
        scales, zeros = self.scales_NG.float(), self.zeros_NG.float()
        if self.groups_I is None:
            grouped = self.n_NK.float().unflatten(1, (scales.shape[1], -1))
            return ((grouped - zeros[..., None]) * scales[..., None]).flatten(1)
        return (self.n_NK.float() - zeros[:, self.groups_I]) * scales[:, self.groups_I]


def gptq(qweight: Tensor, qzeros: Tensor, scales_GN: Tensor, bits: int, group: int, g_idx: Tensor | None = None, plus_one: bool = True) -> Numbers:
    """GPTQ's layout. plus_one: the file stores z - 1 (format v1)."""
    n_KN, z_GN = _unrolled(qweight, 0, bits), _unrolled(qzeros, 1, bits) + int(plus_one)
    reordered = g_idx is not None and not torch.equal(g_idx.long(), torch.arange(n_KN.shape[0]) // group)
    order = g_idx.long() if g_idx is not None and reordered else None
    return Numbers(n_KN.t().to(torch.uint8), scales_GN.t(), z_GN.t(), bits, order)


def awq(qweight: Tensor, qzeros: Tensor, scales_GN: Tensor) -> Numbers:
    """AWQ's layout for GEMM, 4 bits."""
    order = torch.argsort(torch.tensor(AWQ_ORDER))
    straight = lambda words: _unrolled(words, 1, 4).unflatten(1, (-1, 8))[..., order].flatten(1)
    return Numbers(straight(qweight).t().to(torch.uint8), scales_GN.t(), straight(qzeros).t(), 4)


def pack(parts: Sequence[Numbers], group: int, what: str) -> PackedWeight:
    """Matrices of the same bits and groups, stacked along their outputs, in groups of `group` (a divisor of theirs). `what`: the name in errors.

    UserError for what the compiled products do not have: 8 bits with offsets, scales beyond fp16.
    """
    assert all(part.groups_I is None for part in parts), f"{what} is grouped by activation: it can be decoded only"
    n_NK, scales, zeros = (torch.cat([getattr(part, name) for part in parts]) for name in ("n_NK", "scales_NG", "zeros_NG"))
    repeats = n_NK.shape[1] // (group or n_NK.shape[1]) // scales.shape[1]
    scales, zeros = (t.repeat_interleave(repeats, 1) for t in (scales, zeros))
    if parts[0].bits == 8:  # group 0: one scale an output
        if not (zeros == 128).all():
            raise UserError(f"{what} has offsets at 8 bits", "w8 products are symmetric (zero = 128, GPTQ's sym=true)", DECODED)
        return pack_w8((n_NK.to(torch.int16) - 128).to(torch.int8), scales.float(), group)
    if not torch.equal(scales.half().float(), scales.float()):
        raise UserError(f"{what} has scales that fp16 cannot hold", f"they are stored as {scales.dtype}", DECODED)
    return pack_q4(n_NK.contiguous(), scales, group, "zeros", zeros)


def _unrolled(words: Tensor, dim: int, bits: int) -> Tensor:
    """int32 words -> their numbers, lowest bits first, unrolled along `dim`."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    numbers = words.unsqueeze(dim + 1) >> (shifts[:, None] if dim == 0 else shifts) & ((1 << bits) - 1)
    return numbers.flatten(dim, dim + 1)
