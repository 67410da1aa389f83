"""Native runner: one native call a step over a paged cache. The rows of all sequences are packed; nothing is padded or gathered.

A row's logits are bit-equal whoever shares the batch and however prompts are cut into chunks (ops/packed.py and ops/paged.py
say how), so the same request gives the same answer alone and in a crowd. Python's share of a step is a handful of small tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from lilliput.models.native import NativeDecoder
from lilliput.ops.paged import KvStore
from lilliput.serve.blocks import BLOCK
from lilliput.serve.runners.mover import Mover
from lilliput.serve.scheduler import Chunk


class Native:
    """A lowered model and its cache of `blocks` blocks, stored as `kv`."""

    def __init__(self, model: NativeDecoder, blocks: int, kv: str = "fp32", swap: int = 0) -> None:
        """Memory: see KvStore.bytes_per_token; the same for `swap` blocks of swap space when the first is used."""
        spec = model.spec
        self.model = model
        self.store = KvStore(layers=spec.layers, blocks=blocks, kv_heads=spec.kv_heads, head_dim=spec.head_dim, codec=kv, block=BLOCK)
        model.plan.cache(self.store)
        self.move = Mover(self.store.by_block(), swap).move

    @torch.inference_mode()
    def forward(self, chunks: Sequence[Chunk]) -> Tensor:
        """Logits fp32 [rows that chunks want, vocab], in order. Writes the new keys and values."""
        return self.partly(chunks, self.model.spec.layers)

    @torch.inference_mode()
    def partly(self, chunks: Sequence[Chunk], layers: int) -> Tensor:
        """The same with the first `layers` layers and the head."""
        if self.model.plan.store is not self.store:  # NativeDecoder.hidden, or another engine, has put its own there
            self.model.plan.cache(self.store)
        ends = list(accumulate(chunk.stop - chunk.start for chunk in chunks))
        widest = 4 * max(len(chunk.table) for chunk in chunks)
        tables = bytearray().join(chunk.table.tobytes().ljust(widest, b"\0") for chunk in chunks)
        return self.model.step(
            _int32([token for chunk in chunks for token in chunk.ids]),
            _int32([position for chunk in chunks for position in range(chunk.start, chunk.stop)]),
            _int32([0, *ends]),
            _int32([chunk.stop for chunk in chunks]),
            torch.frombuffer(tables, dtype=torch.int32).view(len(chunks), -1),
            _int32([row for chunk, end in zip(chunks, ends) for row in range(end - chunk.wants, end)]),
            layers,
        )


def _int32(numbers: list[int]) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int32)
