"""One micro-batch of next-token prediction, and what every data stream offers.

A row of S+1 tokens w gives inputs w[:-1] and targets w[1:]; a target that must not count (the user's turn of a chat,
padding) is IGNORE. `weight` counts the scored targets: losses are summed over a whole optimizer step and divided by
the step's total weight, so the result does not depend on how the step is cut into micro-batches.

A stream's position is one integer, the sequences handed out so far. Epoch e visits the rows in a permutation keyed by
(seed, e), so nothing but that integer has to be saved, and resuming costs nothing, whatever the size of the data.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from lilliput.base import seeds

if TYPE_CHECKING:
    import torch
    from torch import Tensor

IGNORE = -100  # the default ignore_index of torch's cross_entropy


@dataclass(frozen=True)
class MicroBatch:
    """Inputs and targets of one forward; both int64 [B, T]."""

    tokens_BT: Tensor
    targets_BT: Tensor  # IGNORE where not scored
    weight: int  # scored targets

    def to(self, device: torch.device | str) -> MicroBatch:
        """The same micro-batch with its tensors on a device."""
        return replace(self, tokens_BT=self.tokens_BT.to(device), targets_BT=self.targets_BT.to(device))


class Stream(Protocol):
    """What training needs of its data: PackedText and Conversations are the two kinds."""

    def next(self, sequences: int) -> MicroBatch:
        """The next `sequences` rows in the shuffled order; endless."""
        ...

    def eval_batches(self, sequences: int, max_tokens: int) -> Iterator[MicroBatch]:
        """Rows in file order, `sequences` at a time, until `max_tokens` targets were scored; does not move the position."""
        ...

    def state(self) -> dict[str, Any]:
        """The position, and what must be equal for it to mean the same (JSON types)."""
        ...

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a saved state; UserError when the data is not the data of that state."""
        ...

    def summary(self) -> dict[str, int]:
        """Counts for the user: tokens, rows, and what was dropped or cut."""
        ...


def micro_batch(tokens_BT: np.ndarray, targets_BT: np.ndarray) -> MicroBatch:
    """A MicroBatch from two integer arrays [B, T] of equal shape."""
    import torch

    weight = int((targets_BT != IGNORE).sum())
    return MicroBatch(torch.from_numpy(tokens_BT.astype(np.int64)), torch.from_numpy(targets_BT.astype(np.int64)), weight)


def token_dtype(vocab_size: int) -> type[np.unsignedinteger[Any]]:
    """The smallest of uint16 and uint32 that holds every id."""
    return np.uint16 if vocab_size <= 1 << 16 else np.uint32


class Order:
    """Position -> row: epoch e is a permutation of the rows keyed by (seed, e). Memory: 8 bytes a row, for one epoch."""

    def __init__(self, rows: int, seed: int) -> None:
        self.rows, self.seed = rows, seed
        self._epoch, self._rows_N = -1, np.empty(0, np.int64)

    def row(self, position: int) -> int:
        """The row handed out at this position (0, 1, 2, ...)."""
        epoch, index = divmod(position, self.rows)
        if epoch != self._epoch:
            generator = np.random.Generator(np.random.Philox(key=seeds.key(self.seed, "epoch", epoch)))
            self._epoch, self._rows_N = epoch, generator.permutation(self.rows)
        return int(self._rows_N[index])
