"""Copies of whole blocks: within the cache (copy on write), out to the swap space and back. One gather and one scatter for all of them.

The swap space has two tiers: slots in host memory, taken at the first use, and behind them slots in a file. For a cache in host memory
the first is a second budget: the pool keeps what runs, the swap space what was put aside. The pool fills the lower slots first (blocks.py), so
the file is written when memory is full.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lilliput.serve.runners.slot_file import SlotFile

if TYPE_CHECKING:
    from lilliput.serve.blocks import Pairs
    from lilliput.serve.scheduler import Moves


@dataclass(frozen=True)
class Swap:
    """Blocks of swap space: `host` in memory, then `file` in a file in `folder` (empty: the system's folder of temporary files)."""

    host: int = 0
    file: int = 0
    folder: str = ""

    @property
    def total(self) -> int:
        """Of both tiers."""
        return self.host + self.file


NO_SWAP = Swap()


class Mover:
    """Moves blocks of one cache."""

    def __init__(self, areas: Sequence[Tensor], swap: Swap) -> None:
        """`areas`: views [blocks, ...] of all that belongs to a block. UserError where the file cannot be had."""
        self.areas, self.swap = list(areas), swap
        self._aside: list[Tensor] = []
        self._file = SlotFile(swap.folder, swap.file, sum(_bytes(area) for area in self.areas)) if swap.file else None

    @torch.inference_mode()
    def move(self, moves: Moves) -> None:
        """Out, copies (all are read before one is written), back."""
        host = self.swap.host
        out, back = [pair for pair in moves.out if pair[1] < host], [pair for pair in moves.back if pair[0] < host]
        if out or back:
            self._aside = self._aside or [torch.empty(host, *area.shape[1:], dtype=area.dtype) for area in self.areas]
        if len(out) < len(moves.out):
            self._write([(block, slot - host) for block, slot in moves.out if slot >= host])
        for area in range(len(self.areas)):
            for pairs, source, target in ((out, self.areas, self._aside), (moves.copies, self.areas, self.areas), (back, self._aside, self.areas)):
                if pairs:
                    _copy(pairs, source[area], target[area])
        if len(back) < len(moves.back):
            self._read([(slot - host, block) for slot, block in moves.back if slot >= host])

    def _write(self, pairs: Pairs) -> None:
        """Blocks to slots of the file; a slot holds the bytes of all areas, one behind the other."""
        assert self._file is not None, "there are slots of the file only where there is one"
        blocks = torch.tensor([block for block, _ in pairs])
        parts = [area.index_select(0, blocks.to(area.device)).cpu().flatten(1).view(torch.uint8) for area in self.areas]
        self._file.write([slot for _, slot in pairs], torch.cat(parts, 1))

    def _read(self, pairs: Pairs) -> None:
        assert self._file is not None, "there are slots of the file only where there is one"
        rows = self._file.read([slot for slot, _ in pairs])
        blocks = torch.tensor([block for _, block in pairs])
        sizes = [_bytes(area) for area in self.areas]
        for area, part in zip(self.areas, rows.split(sizes, 1)):
            whole = part.reshape(-1).clone().view(area.dtype).view(len(pairs), *area.shape[1:])  # a copy begins at an aligned address
            area.index_copy_(0, blocks.to(area.device), whole.to(area.device))


def _bytes(area: Tensor) -> int:
    """Of one block."""
    return area[:1].numel() * area.element_size()


def _copy(pairs: Pairs, source: Tensor, target: Tensor) -> None:
    sources, targets = torch.tensor(pairs, dtype=torch.long).unbind(1)
    read = source.index_select(0, sources.to(source.device))
    target.index_copy_(0, targets.to(target.device), read.to(target.device))
