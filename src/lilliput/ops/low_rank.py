"""Low-rank updates of some rows of a batch: y += (x A^T) B^T, each segment of rows with matrices of its own (many LoRA adapters at once).

Rows of one adapter lie side by side, so a batch is a few segments: x A^T of all of them, then B of all of them, two regions of
small tasks whatever their number (SGMV of Punica). Nothing is padded to the largest rank and nothing is merged. A row's sums are
those of the row alone, so an adapter's answer is bit-equal in any batch, as everything else on the native plan is.

Cost: 2 rank (inputs + outputs) flops a row and product, and each adapter's matrices read once a step: 9.8 MB for a 135M model at rank 8 in
fp32. Beside a base in 4 bits (98 MB) eight of those nearly double what a step reads, so there they are kept in fp16, whose rounding
(2^-12 of an update) is nothing beside that of such a base.

`add_grouped` is one product's update alone. `grouped` is the same by plain torch: the eager runner's, and the reference.

Chen et al. 2023 (Punica), arXiv 2310.18547, section 4.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lilliput.base.errors import UserError
from lilliput.ops import float_codecs, native
from lilliput.ops.panels import PackedWeight

Pair = tuple[Tensor, Tensor]  # A [rank, inputs], B [outputs, rank]; the scale is in B
Segment = tuple[int, int, Any]  # first row, the row after the last, whose


class LowRank:
    """One adapter lowered for ops/step.py: updates of the products of each layer. Owns what its native half points to."""

    def __init__(self, layers: int, half: bool = False) -> None:
        """`half`: its matrices are kept in fp16."""
        assert native.module() is not None, "ask native.missing() before lowering an adapter"
        self._dtype = torch.float16 if half else torch.float32
        self._native = native.module().Adapter(layers)
        self._held: list[Any] = []
        self.bytes = 0

    def put(self, layer: int, slot: int, parts: Sequence[tuple[int, Pair]]) -> None:
        """Update a product (its number in ops.step.LAYER_SLOTS): (first output, pair) of each part of it that has one. UserError for numbers
        that fp16 has no room for, where it is wanted."""
        stacked = self._kept(torch.cat([a for _, (a, _) in parts]))
        packed, at = [], 0
        for output, (a, b) in parts:
            packed.append((float_codecs.encode(self._kept(b), "f16" if self._dtype == torch.float16 else "f32"), at, output))
            at += a.shape[0]
        self._held += [stacked, packed]
        self.bytes += stacked.nbytes + sum(weight.bytes for weight, _, _ in packed)
        self._native.put(layer, slot, stacked.data_ptr(), *stacked.shape, stacked.dtype == torch.float16,
                         [(weight.native, first, output) for weight, first, output in packed])  # fmt: skip

    def native(self) -> Any:
        """The extension's half; valid while this object lives."""
        return self._native

    def _kept(self, matrix: Tensor) -> Tensor:
        kept = matrix.detach().to(self._dtype).contiguous()
        if not kept.isfinite().all() and matrix.isfinite().all():
            raise UserError("an adapter has numbers that fp16 has no room for", f"the largest is {float(matrix.abs().max()):.3g}", "serve.weights=fp32")
        return kept


def panels_of(b_NR: Tensor) -> Tensor:
    """B, fp32 or fp16, as `add_grouped` takes it: [panels, rank, 16]."""
    return float_codecs.encode(b_NR, "f16" if b_NR.dtype == torch.float16 else "f32").data


def add_grouped(x_RK: Tensor, segments: Sequence[tuple[int, int, Pair]], y_RN: Tensor) -> Tensor:
    """Add its update to the rows [first, last) of each segment of y, in place; contiguous fp32. Pairs: (A, `panels_of` B), both fp32 or both fp16."""
    for x in (x_RK, y_RN):
        assert x.dtype == torch.float32 and x.is_contiguous() and x.dim() == 2, f"rows are contiguous fp32, got {x.dtype} {tuple(x.shape)}"
    borders, pairs = [border for *rows, _ in segments for border in rows], [pair for *_, pair in segments]
    assert all(0 <= border <= x_RK.shape[0] for border in borders), f"segments {borders} of {x_RK.shape[0]} rows"
    (ADD if native.watched(x_RK) else _add)(x_RK, y_RN, borders, [a.contiguous() for a, _ in pairs], [b for _, b in pairs])
    return y_RN


def _add(x: Tensor, y: Tensor, borders: list[int], a: list[Tensor], b: list[Tensor]) -> None:
    module, adapted = native.module(), []
    for first, last, down, up in zip(borders[::2], borders[1::2], a, b):
        half, (rank, width), outputs = down.dtype == torch.float16, down.shape, y.shape[1]
        assert width == x.shape[1] and up.shape == (-(-outputs // 16), rank, 16) and up.dtype == down.dtype, (
            f"A {tuple(down.shape)}, B's panels {tuple(up.shape)} beside {x.shape[1]} -> {outputs}"
        )
        adapter = module.Adapter(1)
        adapter.put(0, 0, down.data_ptr(), rank, width, half, [(PackedWeight("f16" if half else "f32", outputs, rank, 0, "symmetric", up).native, 0, 0)])
        adapted.append((first, last, adapter))
    module.low_rank(adapted, x.data_ptr(), x.shape[1], y.data_ptr(), y.shape[1])


ADD = native.define("low_rank_add(Tensor x, Tensor(a!) y, int[] borders, Tensor[] a, Tensor[] b) -> ()", _add, lambda *given: None)


def grouped(x: Tensor, segments: Sequence[tuple[int, int, Pair]], outputs: int) -> Tensor:
    """The updates [..., rows, outputs] of x [..., rows, inputs]; zero in rows of no segment."""
    y = x.new_zeros(*x.shape[:-1], outputs)
    for start, stop, (a, b) in segments:
        y[..., start:stop, :] = torch.nn.functional.linear(torch.nn.functional.linear(x[..., start:stop, :], a), b)
    return y
