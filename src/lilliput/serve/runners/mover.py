"""Copies of whole blocks: within the cache (copy on write), out to the swap space and back. One gather and one scatter for all of them.

The swap space lies in host memory and is taken at the first use. For a cache in host memory it is a second budget: the pool
keeps what runs, the swap space what was put aside.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from lilliput.serve.blocks import Pairs
    from lilliput.serve.scheduler import Moves


class Mover:
    """Moves blocks of one cache."""

    def __init__(self, areas: Sequence[Tensor], swap: int) -> None:
        """`areas`: views [blocks, ...] of all that belongs to a block. `swap`: blocks of swap space."""
        self.areas, self.swap = list(areas), swap
        self._aside: list[Tensor] = []

    @torch.inference_mode()
    def move(self, moves: Moves) -> None:
        """Out, copies (all are read before one is written), back."""
        if moves.out or moves.back:
            self._aside = self._aside or [torch.empty(self.swap, *area.shape[1:], dtype=area.dtype) for area in self.areas]
        for area in range(len(self.areas)):
            for pairs, source, target in (
                (moves.out, self.areas, self._aside),
                (moves.copies, self.areas, self.areas),
                (moves.back, self._aside, self.areas),
            ):
                if pairs:
                    _copy(pairs, source[area], target[area])


def _copy(pairs: Pairs, source: Tensor, target: Tensor) -> None:
    sources, targets = torch.tensor(pairs, dtype=torch.long).unbind(1)
    read = source.index_select(0, sources.to(source.device))
    target.index_copy_(0, targets.to(target.device), read.to(target.device))
