"""Dropout whose mask is a pure function of (seed, step, micro-batch, site, element index).

No generator is advanced, so the mask does not depend on threads, device or order, a recomputed forward draws the same
one, and resuming needs no RNG state. The backward pass draws the mask again: dropout keeps no bytes. An element's 32-bit
hash (two multiply-xorshift rounds around two keys) is compared with p, so p is met to 2^-32.
Cost: about ten in-place integer passes over the tensor, forward and backward.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lilliput.base import seeds


@dataclass
class Counter:
    """Where training is. The loop (or the rig's schedule) sets it before each forward; all Dropout modules of a model share it."""

    seed: int = 0
    step: int = 0
    micro: int = 0  # micro-batch within the step


def keep_mask(shape: torch.Size, p: float, key: tuple[int, int, int, int], device: torch.device) -> Tensor:
    """bool of this shape, False with probability p. key = (seed, step, micro-batch, site)."""
    first, second = (seeds.key(*key, half) % 2**32 - 2**31 for half in ("first", "second"))
    x = torch.arange(shape.numel(), dtype=torch.int32, device=device)
    x.bitwise_xor_(first)
    x = _fold(x, 16).mul_(0x7FEB352D)  # the constants of "lowbias32" (Wellons, hash prospector), as signed numbers
    x.bitwise_xor_(second)
    x = _fold(x, 15).mul_(0x846CA68B - (1 << 32))
    x = _fold(x, 16)
    return (x >= round(p * 2**32) - 2**31).view(shape)


def _fold(x: Tensor, by: int) -> Tensor:
    """x ^ (x >> by) in place, with zeros shifted in (int32 shifts copy the sign)."""
    return x.bitwise_xor_((x >> by).bitwise_and_((1 << (32 - by)) - 1))


class _Drop(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float, key: tuple[int, int, int, int]) -> Tensor:
        ctx.p, ctx.key = p, key
        return _scaled(x, p, key)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return _scaled(grads[0], ctx.p, ctx.key), None, None


def _scaled(x: Tensor, p: float, key: tuple[int, int, int, int]) -> Tensor:
    return (x * keep_mask(x.shape, p, key, x.device)).mul_(1 / (1 - p))


class Dropout(nn.Module):
    """Zeroes elements with probability `p` and scales the others by 1/(1-p), in training only; the identity at p = 0.

    site: which dropout of the model this is, so that no two draw the same mask.
    """

    def __init__(self, counter: Counter, site: int) -> None:
        super().__init__()
        self.counter, self.site, self.p = counter, site, 0.0

    def forward(self, x: Tensor) -> Tensor:
        """[...] -> [...]."""
        if not self.training or self.p == 0:
            return x
        at = self.counter
        return _Drop.apply(x, self.p, (at.seed, at.step, at.micro, self.site))
