"""Products that read only a part of a matrix: chosen rows (Deja Vu), or the 16 x 16 tiles that pruning left (E.T.).

    RowMatrix    one row a neuron, fp32 or fp16. dots: the chosen outputs of an up matrix. add: a down matrix (stored transposed)
                 times the chosen inputs. Rows, not panels: a panel of 16 would read 15 rows too many for each that is wanted.
                 Several tokens share one choice: give the union of theirs (8 tokens of a third each leave little to skip).
    TileMatrix   the tiles that stay, in rising order of inputs within each panel of 16 outputs.

One token is bound by memory, so the time falls with the share that is read; with many rows a dense product is the better one.
Each result is one chain of sums in a fixed order: the same bits in any batch and for any number of threads.

Liu et al. 2023 (Deja Vu), arXiv 2310.17157, section 4; Chen et al. 2021 (E.T.), doi 10.1145/3458817.3476138, section 4.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lilliput.base.errors import UserError
from lilliput.ops import native

TILE = 16


@dataclass(frozen=True)
class RowMatrix:
    """A matrix [rows, width], contiguous, fp32 or fp16."""

    data: Tensor

    def __post_init__(self) -> None:
        """UserError for another dtype."""
        if self.data.dtype not in (torch.float32, torch.float16) or not self.data.is_contiguous():
            raise UserError("a matrix of chosen rows must be contiguous fp32 or fp16", f"got {self.data.dtype}", "weight.half().contiguous()")

    def dots(self, x_RK: Tensor, ids_N: Tensor) -> Tensor:
        """x [R, width] fp32 times the rows `ids_N` (int32): [R, N]."""
        x = _checked(x_RK, self.data.shape[1])
        ids = self._ids(ids_N)
        if native.module() is None:
            return x @ self.data[ids.long()].float().t()
        return DOTS(self.data, ids, x)

    def add(self, a_RN: Tensor, ids_N: Tensor, to_RK: Tensor | None = None) -> Tensor:
        """Sum over i of a[:, i] times row ids_N[i], [R, width], added to `to_RK` in place where it is given."""
        a = _checked(a_RN, ids_N.shape[0])
        y = a.new_zeros(a.shape[0], self.data.shape[1]) if to_RK is None else _checked(to_RK, self.data.shape[1])
        ids = self._ids(ids_N)
        if native.module() is None:
            return y.add_(a @ self.data[ids.long()].float())
        ADD(self.data, ids, a, y)
        return y

    def _ids(self, ids_N: Tensor) -> Tensor:
        assert ids_N.dtype == torch.int32 and ids_N.is_contiguous(), f"ids must be contiguous int32, got {ids_N.dtype}"
        if ids_N.numel() and not 0 <= int(ids_N.min()) <= int(ids_N.max()) < self.data.shape[0]:
            raise UserError("a chosen row is not in the matrix", f"ids go from 0 to {self.data.shape[0] - 1}, got {int(ids_N.min())} to {int(ids_N.max())}",
                            "choose among the rows")  # fmt: skip
        return ids_N


@dataclass(frozen=True)
class TileMatrix:
    """The tiles of a matrix [outputs, inputs] that stay; made by `prune_tiles`. Shapes: csrc/sparse.h."""

    outputs: int
    inputs: int
    starts: Tensor
    blocks: Tensor
    data: Tensor

    @property
    def density(self) -> float:
        """Tiles that stay over all tiles."""
        return self.blocks.shape[0] / max(1, (self.starts.shape[0] - 1) * (self.inputs // TILE))

    @property
    def bytes(self) -> int:
        """Bytes in memory."""
        return self.starts.nbytes + self.blocks.nbytes + self.data.nbytes

    def product(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [..., inputs] fp32 -> [..., outputs]."""
        flat = _checked(x.reshape(-1, self.inputs), self.inputs)
        if native.module() is None:
            return torch.nn.functional.linear(flat, self.dense(), bias).view(*x.shape[:-1], self.outputs)
        return TILES(flat, self.starts, self.blocks, self.data, self.outputs, bias).view(*x.shape[:-1], self.outputs)

    def dense(self) -> Tensor:
        """The matrix with zeros where tiles were dropped."""
        panels = self.starts.shape[0] - 1
        whole = self.data.new_zeros(panels, self.inputs // TILE, TILE, TILE)
        which = torch.repeat_interleave(torch.arange(panels), self.starts.diff().long())
        whole[which, self.blocks.long()] = self.data
        return whole.permute(0, 3, 1, 2).reshape(panels * TILE, self.inputs)[: self.outputs].contiguous()


def prune_tiles(weight_NK: Tensor, keep_PB: Tensor) -> TileMatrix:
    """Keep the tiles where keep_PB [outputs / 16 rounded up, inputs / 16] is true. UserError when the inputs are no multiple of 16."""
    outputs, inputs = weight_NK.shape
    if inputs % TILE:
        raise UserError(f"a matrix of {inputs} inputs has no whole tiles", f"tiles are {TILE} x {TILE}", "leave this matrix dense")
    panels = -(-outputs // TILE)
    assert keep_PB.shape == (panels, inputs // TILE), f"keep is {tuple(keep_PB.shape)}, wanted {(panels, inputs // TILE)}"
    padded = torch.nn.functional.pad(weight_NK.float(), (0, 0, 0, panels * TILE - outputs))
    cells = padded.view(panels, TILE, inputs // TILE, TILE).permute(0, 2, 3, 1)  # [panel, block, input, output]
    keep = keep_PB.bool()
    starts = torch.zeros(panels + 1, dtype=torch.int32)
    starts[1:] = keep.sum(1).cumsum(0)
    return TileMatrix(outputs, inputs, starts, keep.nonzero()[:, 1].to(torch.int32).contiguous(), cells[keep].contiguous())


def _checked(x: Tensor, width: int) -> Tensor:
    assert x.dim() == 2 and x.shape[1] == width and x.dtype == torch.float32 and x.is_contiguous(), (
        f"wanted contiguous fp32 [rows, {width}], got {x.dtype} {tuple(x.shape)}"
    )
    return x


def _run_dots(data: Tensor, ids: Tensor, x: Tensor) -> Tensor:
    y = x.new_empty(x.shape[0], ids.shape[0])
    if y.numel():
        native.module().row_dots(*_rows(data, ids), x.data_ptr(), x.shape[0], y.data_ptr())
    return y


def _run_add(data: Tensor, ids: Tensor, a: Tensor, y: Tensor) -> None:
    if y.numel():
        native.module().row_add(*_rows(data, ids), a.data_ptr(), a.shape[0], y.data_ptr())


def _rows(data: Tensor, ids: Tensor) -> tuple[Any, ...]:
    return data.data_ptr(), *data.shape, data.dtype == torch.float16, ids.data_ptr(), ids.shape[0]


def _run_tiles(x: Tensor, starts: Tensor, blocks: Tensor, data: Tensor, outputs: int, bias: Tensor | None) -> Tensor:
    y = x.new_empty(x.shape[0], outputs)
    addresses = (t.data_ptr() for t in (starts, blocks, data, x))
    if y.numel():
        native.module().tile_product(outputs, x.shape[1], *addresses, x.shape[0], 0 if bias is None else bias.data_ptr(), y.data_ptr())
    return y


DOTS = native.define("row_dots(Tensor data, Tensor ids, Tensor x) -> Tensor", _run_dots, lambda data, ids, x: x.new_empty(x.shape[0], ids.shape[0]))
ADD = native.define("row_add(Tensor data, Tensor ids, Tensor a, Tensor(b!) y) -> ()", _run_add, lambda data, ids, a, y: None)
TILES = native.define("tile_product(Tensor x, Tensor starts, Tensor blocks, Tensor data, int outputs, Tensor? bias) -> Tensor", _run_tiles,
                      lambda x, starts, blocks, data, outputs, bias: x.new_empty(x.shape[0], outputs))  # fmt: skip
