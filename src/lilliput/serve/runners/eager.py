"""Eager runner: the plain PyTorch decoder over a paged cache. It is the oracle of every faster runner, and the CUDA path.

The rows of all sequences are packed into one forward [1, T]: the linears see one matrix, whatever belongs to whom. In
attention each sequence is alone with its keys, in a loop: a padded batch would first copy every cache (for 512 tokens of
one SmolLM2 layer 16 us beside the 39 us of the attention itself). For a few short sequences of equal length the padded
batch is better: with 16 of 64 tokens transformers is 1 to 7 % faster, with one it is 1 % slower (2 cores, fp32).

The cache is one array [2, layers, kv_heads, slots, head_dim], so a sequence in consecutive blocks is a slice of it and
is never copied. One in scattered blocks is gathered, once a layer and step. Only rows that are sampled reach the head,
which is a quarter of a small model's weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate

import torch
from torch import Tensor

from lilliput.models.decoder import Decoder
from lilliput.models.deltas import Grouped, Rows
from lilliput.models.layers import Linear
from lilliput.ops.attention import attend
from lilliput.ops.low_rank import Pair
from lilliput.serve.adapters import segments
from lilliput.serve.blocks import BLOCK, blocks_for, consecutive, slots
from lilliput.serve.runners.mover import NO_SWAP, Mover, Swap
from lilliput.serve.scheduler import Chunk

Cached = Callable[[int], tuple[Tensor, ...]]  # layer -> keys and values [1, G, S, D] of one sequence


class Eager:
    """One model and its cache of `blocks` blocks."""

    def __init__(self, model: Decoder, blocks: int, swap: Swap = NO_SWAP) -> None:
        """Memory: 2 x layers x kv_heads x head_dim x 16 elements a block, fp32 on CPUs, the model's dtype on CUDA; the same for each
        block of swap space, on the host or in a file, when the first is used."""
        weight, kv = next(model.parameters()), model.facts.kv
        assert kv is not None, "a decoder states the shape of its keys and values"
        self.model, self.device = model, weight.device
        dtype = weight.dtype if weight.is_cuda else torch.float32
        # empty: a slot is written before it is read, and the system gives the memory at the first write
        self.store_2LGSD = torch.empty(2, kv.layers, kv.kv_heads, blocks * BLOCK, kv.head_dim, dtype=dtype, device=self.device)
        blocks_2LGBTD = self.store_2LGSD.unflatten(3, (blocks, BLOCK))
        self.move = Mover([blocks_2LGBTD.movedim(3, 0)], swap).move
        self._rows = Rows()

    def refuses(self, positions: str, mass: bool) -> str | None:
        """Why it cannot keep positions so while tokens leave the cache; None when it can."""
        if positions == "in_cache" or mass:
            return "the eager runner stores rotated keys and does not give out attention: serve.runner=native"
        return None

    def lower(self, pairs: Mapping[str, Pair]) -> dict[str, Pair]:
        """An adapter in the form that `forward` reads from chunks."""
        weight = next(self.model.parameters())
        dtype = weight.dtype if weight.is_cuda else torch.float32
        return {path: (a.to(self.device, dtype), b.to(self.device, dtype)) for path, (a, b) in pairs.items()}

    @torch.inference_mode()
    def forward(self, chunks: Sequence[Chunk], mass: Tensor | None = None) -> Tensor:
        """Logits fp32 [rows that chunks want, vocab], in order. Writes the new keys and values."""
        assert mass is None, "refuses() comes first"
        tokens = [token for chunk in chunks for token in chunk.ids]
        positions = [p for chunk in chunks for p in range(chunk.start + chunk.gone, chunk.stop + chunk.gone)]
        new = self._tensor([slot for chunk in chunks for slot in slots(chunk.table, chunk.start, chunk.stop)])
        rows = [len(chunk.ids) for chunk in chunks]
        sampled = [row for chunk, end in zip(chunks, accumulate(rows)) for row in range(end - chunk.wants, end)]
        caches = [self._cached(chunk) for chunk in chunks]

        def paged(layer: int, q_1HTD: Tensor, k_1GTD: Tensor, v_1GTD: Tensor, window: int | None) -> Tensor:
            self.store_2LGSD[0, layer].index_copy_(1, new, k_1GTD[0])
            self.store_2LGSD[1, layer].index_copy_(1, new, v_1GTD[0])
            queries = q_1HTD.split(rows, 2)
            return torch.cat([attend(q, *cached(layer), causal=True, window=window) for q, cached in zip(queries, caches)], 2)

        self._rows.segments = self._adapted(chunks)
        h_1TC = self.model.hidden(self._tensor(tokens)[None], self._tensor(positions)[None], attend=paged)
        self._rows.segments = []
        return self.model.head(h_1TC[0, self._tensor(sampled)])

    def _adapted(self, chunks: Sequence[Chunk]) -> list[tuple[int, int, dict[str, Pair]]]:
        """Which rows are which adapter's. Every Linear that one of them changes gets its `Grouped`, or the one that another runner has left."""
        found = segments(chunks)
        for path in {path for _, _, pairs in found for path in pairs}:
            linear = self.model.get_submodule(path)
            assert isinstance(linear, Linear), f"{path} is no Linear: adapters are read for the model's own"
            grouped = linear.deltas["served"] if "served" in linear.deltas else Grouped(path, linear.outputs)
            assert isinstance(grouped, Grouped), "the name is ours"
            linear.deltas["served"], grouped.rows = grouped, self._rows
        return found

    def _cached(self, chunk: Chunk) -> Cached:
        """How to read the cache of a sequence up to the chunk's end: views made once a step, or a gather in each layer."""
        if not consecutive(chunk.table[: blocks_for(chunk.stop)]):
            at = self._tensor(slots(chunk.table, 0, chunk.stop))
            return lambda layer: self.store_2LGSD[:, layer, None].index_select(3, at).unbind(0)
        first = chunk.table[0] * BLOCK
        keys, values = (part.unbind(0) for part in self.store_2LGSD[:, :, None, :, first : first + chunk.stop])
        return lambda layer: (keys[layer], values[layer])

    def _tensor(self, numbers: list[int]) -> Tensor:
        return torch.tensor(numbers, dtype=torch.long, device=self.device)
