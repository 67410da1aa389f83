"""Attention over a paged cache: prompts and single tokens of many sequences in one packed batch.

Token t of a sequence lies in block table[t // block], so caches grow block by block and need not be contiguous (PagedAttention).
Scores never lie in memory: keys are walked in tiles with a running maximum and sum (FlashAttention-2). All query heads of a
group share one pass over their keys. Long caches are cut into segments of 256 that are merged in rising order; borders depend on
positions alone, so a query's answer is bit-equal in any batch, any chunk of its prompt and any number of threads.

Codecs: fp32, fp16; int8 and int4 with one fp16 scale and minimum a token and head (int4 keys: store them before RoPE, see `rotate`).
Cost of a decoded token: its cache is read once. Layouts: csrc/paged.h.

Kwon et al. 2023, arXiv 2309.06180, section 4; Dao 2023, arXiv 2307.08691, section 3.1.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lilliput.base.errors import UserError
from lilliput.ops import native

CODECS = ("fp32", "fp16", "int8", "int4")  # in the order of csrc/paged.h
BITS = {"fp32": 32, "fp16": 16, "int8": 8, "int4": 4}
TILE = 16  # keys side by side


class KvStore:
    """The cache of a model: keys and values of `blocks` blocks of `block` tokens in each layer. Memory is taken when it is first written."""

    def __init__(self, *, layers: int, blocks: int, kv_heads: int, head_dim: int, codec: str = "fp32", block: int = TILE) -> None:
        if codec not in CODECS:
            raise UserError(f"unknown cache codec `{codec}`", f"known: {', '.join(CODECS)}", "kv=fp16")
        assert block % TILE == 0, f"a block must be a multiple of {TILE} tokens, got {block}"
        if codec == "int4" and head_dim % 2:
            raise UserError("kv=int4 cannot store this model's keys", f"two numbers share a byte and a head has {head_dim}", "kv=int8")
        self.layers, self.blocks, self.kv_heads, self.head_dim, self.codec, self.block = layers, blocks, kv_heads, head_dim, codec, block
        rows = blocks * kv_heads * block
        self.numbers = torch.empty(layers, 2, rows * head_dim * BITS[codec] // 8, dtype=torch.uint8)
        self.scales = torch.empty(layers, 2, rows, 2, dtype=torch.float16) if codec in ("int8", "int4") else None

    @property
    def bytes_per_token(self) -> int:
        """Bytes of one token over all layers, scales included."""
        return (self.numbers.nbytes + (0 if self.scales is None else self.scales.nbytes)) // (self.blocks * self.block)

    def by_block(self) -> list[Tensor]:
        """Views [blocks, layers, 2, ...] of all that belongs to a block."""
        areas = [self.numbers] if self.scales is None else [self.numbers, self.scales.flatten(2)]
        return [area.unflatten(2, (self.blocks, -1)).movedim(2, 0) for area in areas]

    def area(self, index: int) -> tuple[Tensor, Tensor | None, int, int, int, int]:
        """One layer as the ops take it: numbers, scales, codec, block, heads, numbers of a head."""
        scales = None if self.scales is None else self.scales[index]
        return self.numbers[index], scales, CODECS.index(self.codec), self.block, self.kv_heads, self.head_dim

    def layer(self, index: int) -> Any:
        """The extension's view of one layer; valid while this object lives."""
        return _cache(*self.area(index))

    @torch.inference_mode()
    def shift(self, table: Tensor, source: Tensor, target: Tensor) -> None:
        """Copy keys and values of one sequence between places, in all layers: source, target [M] or [layers, kv_heads, M]; read first, then written."""
        assert self.block == TILE and self.codec != "int4", "single tokens move in blocks of one tile, and not where two share a byte"
        whole = self.layers, self.kv_heads, source.shape[-1]
        layer = torch.arange(self.layers)[:, None, None].expand(whole)
        head = torch.arange(self.kv_heads)[None, :, None].expand(whole)
        (block, row), (to_block, to_row) = ((table.long()[at // TILE], at % TILE) for at in (source.expand(whole), target.expand(whole)))
        dtype = {32: torch.float32, 16: torch.float16, 8: torch.uint8}[BITS[self.codec]]
        keys, values = self.numbers.view(dtype).unflatten(2, (self.blocks, self.kv_heads, -1)).unbind(1)
        views = [keys.unflatten(-1, (self.head_dim, TILE)).transpose(-1, -2), values.unflatten(-1, (TILE, self.head_dim))]
        if self.scales is not None:
            views += self.scales.unflatten(2, (self.blocks, self.kv_heads, TILE)).unbind(1)
        for view in views:  # [layers, blocks, kv_heads, token, ...]
            view[layer, to_block, head, to_row] = view[layer, block, head, row]

    def read(self, index: int, table: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Keys and values [count, kv_heads, head_dim] fp32 of the first tokens of a sequence, decoded by plain torch: the reference."""
        numbers = self.numbers[index].unflatten(1, (self.blocks, self.kv_heads, -1))[:, table.long()]
        sides = []
        for side in (0, 1):
            area = numbers[side].contiguous()
            if self.codec in ("fp32", "fp16"):
                wide = area.view(torch.float32 if self.codec == "fp32" else torch.float16).float()
            else:
                wide = (area if self.codec == "int8" else torch.stack((area & 15, area >> 4), -1).flatten(-2)).float()
            if side == 0:  # [block, head, tile, d, 16] -> [block, head, token, d]
                wide = wide.unflatten(-1, (self.block // TILE, self.head_dim, TILE)).transpose(-1, -2).flatten(2, 3)
            else:
                wide = wide.unflatten(-1, (self.block, self.head_dim))
            if self.scales is not None:
                scale, least = self.scales[index, side].float().view(self.blocks, self.kv_heads, self.block, 2)[table.long()].unsqueeze(-2).unbind(-1)
                wide = wide * scale + least
            sides.append(wide.transpose(1, 2).flatten(0, 1)[:count])
        return sides[0], sides[1]


def supports(head_dim: int) -> str | None:
    """Why the extension cannot serve such heads; None when it can."""
    return native.missing()


def write(store: KvStore, layer: int, k_RGD: Tensor, v_RGD: Tensor, cu_q: Tensor, lengths: Tensor, tables: Tensor) -> None:
    """Put new keys and values [rows, kv_heads, head_dim] at the last cu_q[s + 1] - cu_q[s] of the lengths[s] positions of each sequence."""
    (WRITE if native.watched(k_RGD) else _write)(*store.area(layer), k_RGD.contiguous(), v_RGD.contiguous(), cu_q, lengths, tables)


def attention(
    store: KvStore, layer: int, q_RHD: Tensor, cu_q: Tensor, lengths: Tensor, tables: Tensor, *, scale: float | None = None, window: int | None = None,
    sinks: int = 0, rotate: tuple[Tensor, Tensor] | None = None, mass: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Queries [rows, H, D] over the cache, causal, queries at the end of their keys -> [rows, H, D].

    window: a query sees itself and window - 1 keys before it, and the first `sinks`. rotate: cos and sin [positions, D / 2] when keys
    lie before RoPE. mass [sequences, kv_heads, >= longest], fp32: each key's attention probability, summed over queries and the group, is added.
    """
    cos, sin = (None, None) if rotate is None else (tiled(table) for table in rotate)
    numbers = q_RHD.shape[2] ** -0.5 if scale is None else scale, window or 0, sinks
    return (ATTENTION if native.watched(q_RHD) else _attention)(q_RHD.contiguous(), *store.area(layer), cu_q, lengths, tables, *numbers, cos, sin, mass)


def tiled(table_PD: Tensor) -> Tensor:
    """cos or sin [positions, D / 2] -> [positions / 16 rounded up, D / 2, 16] fp32: as keys lie."""
    padded = torch.nn.functional.pad(table_PD.float(), (0, 0, 0, -table_PD.shape[0] % TILE))
    return padded.unflatten(0, (-1, TILE)).transpose(1, 2).contiguous()


def reference(
    q_RHD: Tensor, keys: list[Tensor], values: list[Tensor], cu_q: Tensor, *, scale: float | None = None, window: int | None = None, sinks: int = 0,
    rotate: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, list[Tensor]]:  # fmt: skip
    """The same by plain torch from keys and values [length, G, D] of each sequence: (outputs, mass [G, length] of each sequence)."""
    outputs, masses = [], []
    for s, (k, v) in enumerate(zip(keys, values)):
        q = q_RHD[int(cu_q[s]) : int(cu_q[s + 1])]
        if rotate is not None:
            cos, sin = (table[: k.shape[0], None] for table in rotate)
            a, b = k.chunk(2, -1)
            k = torch.cat((a * cos - b * sin, b * cos + a * sin), -1)
        group = q.shape[1] // k.shape[1]
        scores = torch.einsum("thd,shd->hts", q, k.repeat_interleave(group, 1)) * (q.shape[-1] ** -0.5 if scale is None else scale)
        behind = torch.arange(k.shape[0] - q.shape[0], k.shape[0])[:, None] - torch.arange(k.shape[0])
        seen = behind >= 0
        if window is not None:
            seen &= (behind < window) | (torch.arange(k.shape[0]) < sinks)
        p = scores.masked_fill(~seen, float("-inf")).softmax(-1)
        outputs.append(torch.einsum("hts,shd->thd", p, v.repeat_interleave(group, 1)))
        masses.append(p.sum(1).unflatten(0, (-1, group)).sum(1))
    return torch.cat(outputs), masses


def _batch(cu_q: Tensor, lengths: Tensor, tables: Tensor) -> tuple[int, int, int, int, int]:
    for name, tensor in (("cu_q", cu_q), ("lengths", lengths), ("tables", tables)):
        assert tensor.dtype == torch.int32 and tensor.is_contiguous(), f"{name} must be contiguous int32, got {tensor.dtype}"
    return lengths.shape[0], cu_q.data_ptr(), lengths.data_ptr(), tables.data_ptr(), tables.shape[1]


def _cache(numbers: Tensor, scales: Tensor | None, codec: int, block: int, kv_heads: int, head_dim: int) -> Any:
    """The extension's view of one layer of a cache; valid while the tensors live."""
    areas = (None, None) if scales is None else scales.unbind()
    addresses = (0 if area is None else area.data_ptr() for area in (*numbers.unbind(), *areas))
    return native.module().KvCache(codec, block, kv_heads, head_dim, *addresses)


def _write(numbers: Tensor, scales: Tensor | None, codec: int, block: int, kv_heads: int, head_dim: int, k: Tensor, v: Tensor, cu_q: Tensor, lengths: Tensor,
           tables: Tensor) -> None:  # fmt: skip
    view = _cache(numbers, scales, codec, block, kv_heads, head_dim)
    native.module().paged_write(view, *_batch(cu_q, lengths, tables), k.data_ptr(), v.data_ptr(), kv_heads * head_dim)


def _attention(q: Tensor, numbers: Tensor, scales: Tensor | None, codec: int, block: int, kv_heads: int, head_dim: int, cu_q: Tensor, lengths: Tensor,
               tables: Tensor, scale: float, window: int, sinks: int, cos: Tensor | None, sin: Tensor | None, mass: Tensor | None) -> Tensor:  # fmt: skip
    o = torch.empty_like(q)
    if q.shape[0]:
        width, view = q.shape[1] * q.shape[2], _cache(numbers, scales, codec, block, kv_heads, head_dim)
        angles = (0, 0) if cos is None or sin is None else (cos.data_ptr(), sin.data_ptr())
        into = (0, 0) if mass is None else (mass.data_ptr(), mass.shape[2])
        native.module().paged_attention(view, *_batch(cu_q, lengths, tables), scale, window, sinks, *angles, *into, q.shape[1], q.data_ptr(), width,
                                        o.data_ptr(), width)  # fmt: skip
    return o


_CACHE, _WHO = "{0} numbers, {1} scales, int codec, int block, int kv_heads, int head_dim", "Tensor cu_q, Tensor lengths, Tensor tables"
WRITE = native.define(f"paged_write({_CACHE.format('Tensor(a!)', 'Tensor(b!)?')}, Tensor k, Tensor v, {_WHO}) -> ()", _write, lambda *given: None)
ATTENTION = native.define(f"paged_attention(Tensor q, {_CACHE.format('Tensor', 'Tensor?')}, {_WHO}, float scale, int window, int sinks, "
                          "Tensor? cos, Tensor? sin, Tensor(a!)? mass) -> Tensor", _attention, lambda q, *given: torch.empty_like(q))  # fmt: skip
