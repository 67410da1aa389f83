"""Panels: how a matrix lies in memory for the compiled products, 16 outputs side by side. Layouts: csrc/linear.h.

A PackedWeight is made once by a codec (ops/codecs.py, ops/float_codecs.py) and multiplied by ops/packed.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from lilliput.ops import native

PANEL = 16
FORMATS = ("f32", "f16", "w8", "q4", "nf4", "e4m3", "e5m2")  # in the order of csrc/linear.h, as are:
OFFSETS = ("symmetric", "mins", "zeros")
INT8_ROWS = ("w8", "q4")


@dataclass(frozen=True)
class PackedWeight:
    """A matrix [outputs, inputs] in panels. `group`: inputs that share a scale, 0 = all of a row. Shapes: csrc/linear.h."""

    format: str
    outputs: int
    inputs: int
    group: int
    offset: str
    data: Tensor
    scales: Tensor | None = None
    offsets: Tensor | None = None

    @property
    def bytes(self) -> int:
        """Bytes in memory, padding included."""
        return sum(part.nbytes for part in (self.data, self.scales, self.offsets) if part is not None)

    @property
    def groups(self) -> int:
        """Scales of one output."""
        return self.inputs // self.group if self.group else 1

    @cached_property
    def native(self) -> Any:
        """The extension's view of it; valid while this object lives."""
        return native.module().Weight(FORMATS.index(self.format), self.outputs, self.inputs, self.group, OFFSETS.index(self.offset),
                                      *(0 if part is None else part.data_ptr() for part in (self.data, self.scales, self.offsets)))  # fmt: skip


def panels(rows: Tensor, fill: float = 0) -> Tensor:
    """[outputs, ...] -> [panels, 16, ...], padded."""
    short = -rows.shape[0] % PANEL
    if short:
        rows = torch.cat([rows, rows.new_full((short, *rows.shape[1:]), fill)])
    return rows.unflatten(0, (-1, PANEL))


def rows(panels_P16: Tensor, outputs: int) -> Tensor:
    """[panels, 16, ...] -> [outputs, ...]."""
    return panels_P16.flatten(0, 1)[:outputs]


def group_tensor(values_NG: Tensor) -> Tensor:
    """One number an output and group, [outputs, groups] -> [panels, groups, 16]: how scales and offsets lie."""
    return panels(values_NG).transpose(1, 2).contiguous()
