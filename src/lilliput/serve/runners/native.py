"""Native runner: one native call a step over a paged cache. The rows of all sequences are packed; nothing is padded or gathered.

A row's logits are bit-equal whoever shares the batch and however prompts are cut into chunks (ops/packed.py and ops/paged.py
say how), so the same request gives the same answer alone and in a crowd. Python's share of a step is a handful of small tensors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate

import torch
from torch import Tensor

from lilliput.models.native import NativeDecoder, lower_adapter
from lilliput.ops.low_rank import LowRank, Pair
from lilliput.ops.paged import KvStore
from lilliput.serve.adapters import segments
from lilliput.serve.blocks import BLOCK
from lilliput.serve.runners.mover import NO_SWAP, Mover, Swap
from lilliput.serve.scheduler import Chunk


class Native:
    """A lowered model and its cache of `blocks` blocks, stored as `kv`."""

    def __init__(self, model: NativeDecoder, blocks: int, kv: str = "fp32", swap: Swap = NO_SWAP) -> None:
        """Memory: see KvStore.bytes_per_token; the same for each block of swap space when the first is used."""
        spec = model.spec
        self.model = model
        self.store = KvStore(layers=spec.layers, blocks=blocks, kv_heads=spec.kv_heads, head_dim=spec.head_dim, codec=kv, block=BLOCK)
        model.plan.cache(self.store)
        self.move = Mover(self.store.by_block(), swap).move

    @property
    def shape(self) -> tuple[int, int]:
        """Layers and key heads."""
        return self.store.layers, self.store.kv_heads

    def refuses(self, positions: str, mass: bool) -> str | None:
        """Why it cannot keep positions so while tokens leave the cache; None when it can."""
        if positions == "in_cache" and not self.model.plan.on_read:
            return "positions inside the cache need keys before RoPE: load the model with this policy"
        if positions == "absolute" and self.model.plan.on_read:
            return "the model was loaded for positions inside the cache, and this policy keeps those of the text"
        return "two 4-bit keys share a byte, and this policy moves single keys" if mass and self.store.codec == "int4" else None

    def lower(self, pairs: Mapping[str, Pair]) -> LowRank:
        """An adapter in the form that `forward` reads from chunks."""
        return lower_adapter(self.model.spec, pairs)

    def forward(self, chunks: Sequence[Chunk], mass: Tensor | None = None) -> Tensor:
        """Logits fp32 [rows that chunks want, vocab], in order. Writes the new keys and values; mass: ops.step.decoder_step."""
        return self.partly(chunks, self.model.spec.layers, mass)

    def shift(self, table: Sequence[int], source: Tensor, target: Tensor) -> None:
        """Copy keys and values of a sequence from places to places: [M], or [layers, kv_heads, M]. All are read before one is written."""
        self.store.shift(torch.tensor(table), source, target)

    @torch.inference_mode()
    def partly(self, chunks: Sequence[Chunk], layers: int, mass: Tensor | None = None) -> Tensor:
        """The same with the first `layers` layers and the head."""
        if self.model.plan.store is not self.store:  # NativeDecoder.hidden, or another engine, has put its own there
            self.model.plan.cache(self.store)
        absolute = not self.model.plan.on_read
        ends = list(accumulate(chunk.stop - chunk.start for chunk in chunks))
        widest = 4 * max(len(chunk.table) for chunk in chunks)
        tables = bytearray().join(chunk.table.tobytes().ljust(widest, b"\0") for chunk in chunks)
        return self.model.step(
            _int32([token for chunk in chunks for token in chunk.ids]),
            _int32([place + chunk.gone * absolute for chunk in chunks for place in range(chunk.start, chunk.stop)]),
            _int32([0, *ends]),
            _int32([chunk.stop for chunk in chunks]),
            torch.frombuffer(tables, dtype=torch.int32).view(len(chunks), -1),
            _int32([row for chunk, end in zip(chunks, ends) for row in range(end - chunk.wants, end)]),
            layers,
            mass,
            segments(chunks),
        )


def _int32(numbers: list[int]) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int32)
