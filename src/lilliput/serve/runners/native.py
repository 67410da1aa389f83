"""Native runner: one native call a step over a paged cache. The rows of all sequences are packed; nothing is padded or gathered.

A row's logits are bit-equal whoever shares the batch and however prompts are cut into chunks (ops/packed.py and ops/paged.py
say how), so the same request gives the same answer alone and in a crowd. Python's share of a step is one array of numbers: between two steps
the weights push its code out of the caches, so what counts is how little of it there is.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lilliput.models.native import NativeDecoder, lower_adapter
from lilliput.ops.low_rank import LowRank, Pair
from lilliput.ops.paged import KvStore
from lilliput.serve.adapters import segments
from lilliput.serve.blocks import BLOCK
from lilliput.serve.runners.mover import NO_SWAP, Mover, Swap
from lilliput.serve.scheduler import Chunk

KEPT = 64  # rows of logits in memory that is used again; untouched pages cost nothing


class Native:
    """A lowered model and its cache of `blocks` blocks, stored as `kv`."""

    def __init__(self, model: NativeDecoder, blocks: int, kv: str = "fp32", swap: Swap = NO_SWAP) -> None:
        """Memory: see KvStore.bytes_per_token; the same for each block of swap space when the first is used."""
        spec = model.spec
        self.model = model
        self.store = KvStore(layers=spec.layers, blocks=blocks, kv_heads=spec.kv_heads, head_dim=spec.head_dim, codec=kv, block=BLOCK)
        model.plan.cache(self.store)
        self._logits, self._views = torch.empty(KEPT, spec.vocab), dict[int, Tensor]()
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
        return lower_adapter(self.model.spec, pairs, self.model.narrow)

    def forward(self, chunks: Sequence[Chunk], mass: Tensor | None = None) -> Tensor:
        """Logits fp32 [rows that chunks want, vocab], in order, until the next call. Writes the new keys and values; mass: ops.step.decoder_step."""
        return self.partly(chunks, self.model.spec.layers, mass)

    def shift(self, table: Sequence[int], source: Tensor, target: Tensor) -> None:
        """Copy keys and values of a sequence from places to places: [M], or [layers, kv_heads, M]. All are read before one is written."""
        self.store.shift(torch.tensor(table), source, target)

    def partly(self, chunks: Sequence[Chunk], layers: int, mass: Tensor | None = None) -> Tensor:
        """The same with the first `layers` layers and the head."""
        plan = self.model.plan
        if plan.store is not self.store:  # NativeDecoder.hidden, or another engine, has put its own there
            plan.cache(self.store)
        absolute, rows = not plan.on_read, 0
        numbers, positions, ends, lengths, sampled = (array("i") for _ in range(5))
        ends.append(0)
        for chunk in chunks:
            numbers.extend(chunk.ids)
            positions.extend(range(chunk.start + chunk.gone * absolute, chunk.stop + chunk.gone * absolute))
            rows += chunk.stop - chunk.start
            ends.append(rows)
            lengths.append(chunk.stop)
            sampled.extend(range(rows - chunk.wants, rows))
        logits_NV = self._room(len(sampled))
        for part in (positions, ends, lengths, sampled):
            numbers += part
        blocks = max([len(chunk.table) for chunk in chunks])
        for chunk in chunks:
            numbers += chunk.table
            if missing := blocks - len(chunk.table):
                numbers.frombytes(bytes(4 * missing))
        plan.step(numbers, rows, len(chunks), logits_NV, layers, mass, segments(chunks))
        return logits_NV

    def _room(self, rows: int) -> Tensor:
        """Where logits go: the same memory at each step for as many as usual."""
        if rows >= KEPT:
            return torch.empty(rows, self.model.spec.vocab)
        found = self._views.get(rows)
        if found is None:
            found = self._views[rows] = self._logits[:rows]
        return found
