"""Eager runner: the plain PyTorch decoder over a paged cache. It is the oracle of every faster runner, and the CUDA path.

The rows of all sequences are packed into one forward [1, T]: the linears see one matrix, whatever belongs to whom. In
attention each sequence is alone with its keys. A loop over the sequences beats a padded batch, which would first copy
every cache: reading 512 cached tokens of one SmolLM2 layer takes 39 us, and copying them for the padded batch 16 us more.

The cache is one array [2, layers, kv_heads, slots, head_dim], so a sequence in consecutive blocks is a slice of it and
is never copied. One in scattered blocks is gathered, once a layer and step. Only rows that are sampled reach the head,
which is a quarter of a small model's weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lilliput.models.decoder import Decoder
from lilliput.ops.attention import attend
from lilliput.serve.blocks import BLOCK, consecutive, slots
from lilliput.serve.scheduler import Chunk


@dataclass(frozen=True)
class _Span:
    """One sequence of a step: its rows in the packed batch, and where its keys lie."""

    rows: slice
    keys: slice | Tensor  # slots of all its tokens, the new ones included


class Eager:
    """One model and its cache of `blocks` blocks."""

    def __init__(self, model: Decoder, blocks: int) -> None:
        """Memory: 2 x layers x kv_heads x head_dim x 16 elements a block, fp32 on CPUs, the model's dtype on CUDA."""
        weight, kv = next(model.parameters()), model.facts.kv
        assert kv is not None, "a decoder states the shape of its keys and values"
        self.model, self.device = model, weight.device
        dtype = weight.dtype if weight.is_cuda else torch.float32
        # empty: a slot is written before it is read, and the system gives the memory at the first write
        self.store_2LGSD = torch.empty(2, kv.layers, kv.kv_heads, blocks * BLOCK, kv.head_dim, dtype=dtype, device=self.device)

    @torch.inference_mode()
    def forward(self, sequences: Sequence[tuple[Chunk, list[int]]]) -> Tensor:
        """Chunks with the ids of their tokens -> logits fp32 [chunks that sample, vocab], in order. Writes the new keys and values."""
        tokens = [token for _, ids in sequences for token in ids]
        positions = [p for chunk, _ in sequences for p in range(chunk.start, chunk.stop)]
        written = [slot for chunk, _ in sequences for slot in slots(chunk.table, chunk.start, chunk.stop)]
        spans, sampled, row = [], [], 0
        for chunk, ids in sequences:
            spans.append(_Span(slice(row, row + len(ids)), self._keys(chunk)))
            row += len(ids)
            if chunk.samples:
                sampled.append(row - 1)
        new = self._tensor(written)

        def paged(layer: int, q_1HTD: Tensor, k_1GTD: Tensor, v_1GTD: Tensor, window: int | None) -> Tensor:
            keys_GSD, values_GSD = self.store_2LGSD[0, layer], self.store_2LGSD[1, layer]
            keys_GSD.index_copy_(1, new, k_1GTD[0])
            values_GSD.index_copy_(1, new, v_1GTD[0])
            outs = [
                attend(q_1HTD[:, :, span.rows], keys_GSD[None, :, span.keys], values_GSD[None, :, span.keys], causal=True, window=window)
                for span in spans
            ]
            return outs[0] if len(outs) == 1 else torch.cat(outs, 2)

        h_1TC = self.model.hidden(self._tensor(tokens)[None], self._tensor(positions)[None], attend=paged)
        return self.model.head(h_1TC[0, self._tensor(sampled)])

    def _keys(self, chunk: Chunk) -> slice | Tensor:
        if consecutive(chunk.table):
            first = chunk.table[0] * BLOCK
            return slice(first, first + chunk.stop)
        return self._tensor(slots(chunk.table, 0, chunk.stop))

    def _tensor(self, numbers: list[int]) -> Tensor:
        return torch.tensor(numbers, dtype=torch.long, device=self.device)
