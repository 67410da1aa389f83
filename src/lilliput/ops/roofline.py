"""The limits of this machine: read bandwidth, fp32 fma and int8 peaks, measured with the kernels' own pool and instructions.

A product cannot be faster than its weights can be read, nor than its arithmetic: bytes / bandwidth and operations / peak are
the two sides of the roofline, and every benchmark line says which share of the nearer one it reached. Takes about half a second.

Williams, Waterman & Patterson 2009, "Roofline", doi 10.1145/1498765.1498785.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lilliput.base.errors import UserError
from lilliput.ops import native


@dataclass(frozen=True)
class Roofline:
    """Rates over all threads of the pool."""

    read: float  # bytes a second from memory
    fma: float  # fp32 flop a second
    int8: float  # int8 operations a second (a product and its sum are two)
    level: str
    threads: int

    def seconds(self, *, bytes: float = 0, flops: float = 0, int8: float = 0) -> float:
        """The least time that work of this size can take."""
        return max(bytes / self.read, flops / self.fma, int8 / self.int8)


def measure(size: int = 256 << 20, repeats: int = 5) -> Roofline:
    """The best of some passes. size: bytes that are read, which must be well beyond the last cache. UserError without kernels."""
    module = native.module()
    if module is None:
        raise UserError("the limits of this machine cannot be measured", native.missing() or "", "install a compiler and lilliput again")
    data = torch.ones(size // 4)
    read = max(module.read_rate(data.data_ptr(), data.numel()) for _ in range(repeats))
    fma = max(module.fma_rate(2_000_000) for _ in range(repeats))
    int8 = max(module.int8_rate(2_000_000) for _ in range(repeats))
    return Roofline(read, fma, int8, native.level(), module.threads())
