"""The one place that makes a model recompute: blocks run in segments, and a segment keeps only its input.

torch runs only the innermost pair of saved-tensor hooks, so no other file may install any around training code.
Dropout draws its masks from a counter (ops.dropout), so a second forward gives the same numbers without saving RNG state.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

Step = Callable[[int, Any, torch.Tensor], torch.Tensor]
Walk = Callable[[Sequence[Any], torch.Tensor, Step], torch.Tensor]


def recompute_every(every: int) -> Walk:
    """A walk over blocks in segments of `every`; each segment is one recomputed unit.

    walk(blocks, x_BTC, step) -> x_BTC where step(index, block, x_BTC) runs one block. Values and gradients are bitwise
    those of the plain loop. Without gradients it is the plain loop.
    """

    def walk(blocks: Sequence[Any], x_BTC: torch.Tensor, step: Step) -> torch.Tensor:
        def segment(x: torch.Tensor, first: int) -> torch.Tensor:
            for index in range(first, min(first + every, len(blocks))):
                x = step(index, blocks[index], x)
            return x

        for first in range(0, len(blocks), every):
            if torch.is_grad_enabled():
                x_BTC = checkpoint(segment, x_BTC, first, use_reentrant=False, preserve_rng_state=False)
            else:
                x_BTC = segment(x_BTC, first)
        return x_BTC

    return walk
