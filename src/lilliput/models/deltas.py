"""Deltas: modules that a Linear adds to its output, y = x W^T + b + sum of delta(x). The base weight is not touched."""

from __future__ import annotations

import torch
from torch import nn

from lilliput.ops.dropout import Dropout
from lilliput.ops.low_rank import Pair, Segment, grouped


class LowRank(nn.Module):
    """delta(x) = scale * dropout(x) A^T B^T with A [rank, in] and B [out, rank]; 2 r (in + out) flops a token forward.

    `product`: where one is set, it computes dropout(x) A^T, as that of a Linear (models/products.py).
    """

    def __init__(self, features_in: int, features_out: int, rank: int, scale: float, dropout: Dropout | None) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.empty(rank, features_in))
        self.b = nn.Parameter(torch.empty(features_out, rank))
        self.scale, self.dropout = scale, dropout
        self.product: nn.Module | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., in] -> [..., out]."""
        if self.dropout is not None:
            x = self.dropout(x)
        # the scale sits on the rank-wide middle, the smallest tensor of the three
        low = nn.functional.linear(x, self.a) if self.product is None else self.product(x, self.a, None, None)
        return nn.functional.linear(low * self.scale, self.b)

    def weight(self) -> torch.Tensor:
        """The matrix [out, in] this delta adds to the base weight, in fp32."""
        return (self.b.float() @ self.a.float()) * self.scale


class Rows:
    """Which rows of the packed batch that runs belong to which adapter; of one runner, which gives it to each `Grouped` before a forward."""

    def __init__(self) -> None:
        self.segments: list[Segment] = []  # whose: canonical path -> pair


class Grouped(nn.Module):
    """delta(x) of several adapters at once, each for its own rows of x [..., rows, in]."""

    def __init__(self, path: str, outputs: int) -> None:
        """`path`: of the Linear that carries it."""
        super().__init__()
        self.path, self.outputs, self.rows = path, outputs, Rows()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., rows, in] -> [..., rows, out]; zero, without a dimension, when no row is adapted here."""
        found: list[tuple[int, int, Pair]] = [(start, stop, whose[self.path]) for start, stop, whose in self.rows.segments if self.path in whose]
        return grouped(x, found, self.outputs) if found else x.new_zeros(())
