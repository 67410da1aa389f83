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
from lilliput.serve.scheduler import Chunk


class Native:
    """A lowered model and its cache of `blocks` blocks, stored as `kv`."""

    def __init__(self, model: NativeDecoder, blocks: int, kv: str = "fp32") -> None:
        """Memory: see KvStore.bytes_per_token."""
        spec = model.spec
        self.model = model
        self.store = KvStore(layers=spec.layers, blocks=blocks, kv_heads=spec.kv_heads, head_dim=spec.head_dim, codec=kv, block=BLOCK)
        model.plan.cache(self.store)

    @torch.inference_mode()
    def forward(self, sequences: Sequence[tuple[Chunk, list[int]]]) -> Tensor:
        """Chunks with the ids of their tokens -> logits fp32 [rows that chunks want, vocab], in order. Writes the new keys and values."""
        ends = list(accumulate(len(ids) for _, ids in sequences))
        widest = max(len(chunk.table) for chunk, _ in sequences)
        return self.model.step(
            _int32([token for _, ids in sequences for token in ids]),
            _int32([position for chunk, _ in sequences for position in range(chunk.start, chunk.stop)]),
            _int32([0, *ends]),
            _int32([chunk.stop for chunk, _ in sequences]),
            _int32([[*chunk.table, *[0] * (widest - len(chunk.table))] for chunk, _ in sequences]),
            _int32([row for (chunk, _), end in zip(sequences, ends) for row in range(end - chunk.wants, end)]),
        )


def _int32(numbers: list) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int32)
