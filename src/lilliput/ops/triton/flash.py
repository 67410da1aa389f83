"""FlashAttention-2 in Triton: the twin of csrc/flash.cpp for CUDA tensors, forward and backward, with the same masks and packings.

    forward    a program is a block of queries of one head; it passes over the key tiles that its mask leaves and keeps O and L
    backward   one kernel a side, so that nothing is added by two programs: dK and dV by key tiles (all heads of the group and all
               blocks of queries in rising order), dQ by blocks of queries. Scores are computed twice; the same bits every time.

Numbers of [.., D] tensors are fp32, fp16 or bf16; sums, L and the softmax are fp32. D is padded to a power of two, and tiles shrink as D
grows, to fit a small card's shared memory. Correctness is checked by the interpreter (TRITON_INTERPRET=1); no speed is claimed: tiles and
warps are not tuned. When not: on the CPU the compiled kernel is the fast one.

Dao 2023, arXiv 2307.08691, algorithms 1 and 2. Tillet et al. 2019, doi 10.1145/3315508.3329973 (Triton).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
TILES = ((64, 64), (128, 32), (256, 16))  # (head dimension up to, queries and keys of a tile)


def supports(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    """Why these kernels cannot take the tensors; None when they can. Masks, groups and packings are as on the CPU: all of them."""
    if not q.dtype == k.dtype == v.dtype or q.dtype not in DTYPES:
        return f"flash on CUDA takes one of fp32, fp16 and bf16, got {q.dtype}, {k.dtype}, {v.dtype}"
    return None


@triton.jit
def _rows(data, rows, stride, count, DIM: tl.constexpr, WIDE: tl.constexpr):
    """[rows, WIDE] of a matrix with `count` rows and DIM columns, zeros beyond."""
    columns = tl.arange(0, WIDE)
    return tl.load(data + rows[:, None] * stride + columns[None, :], mask=(rows[:, None] < count) & (columns[None, :] < DIM), other=0.0)


@triton.jit
def _put(data, rows, stride, count, x, DIM: tl.constexpr, WIDE: tl.constexpr):
    columns = tl.arange(0, WIDE)
    tl.store(data + rows[:, None] * stride + columns[None, :], x.to(data.dtype.element_ty), mask=(rows[:, None] < count) & (columns[None, :] < DIM))


@triton.jit
def _start(batch, stride_batch, stride_row, cu, PACKED: tl.constexpr):
    """Where sequence `batch` begins, in numbers."""
    if PACKED:
        return tl.load(cu + batch).to(tl.int64) * stride_row
    return batch.to(tl.int64) * stride_batch


@triton.jit
def _length(batch, dense, cu, PACKED: tl.constexpr):
    if PACKED:
        return tl.load(cu + batch + 1) - tl.load(cu + batch)
    return dense


@triton.jit
def _sums(batch, head, heads, dense, total, cu, PACKED: tl.constexpr):
    """Where L of a sequence's head begins: [batch][heads][queries] dense, [heads][rows] packed."""
    if PACKED:
        return head.to(tl.int64) * total + tl.load(cu + batch)
    return (batch.to(tl.int64) * heads + head) * dense


@triton.jit
def _scores(q, k, at, keys_at, queries, keys, behind, scale, slope, window, sinks, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, ALIBI: tl.constexpr):
    """[queries, keys] of a tile, scaled, -inf where hidden. at: rows of q; its position is at + behind."""
    s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
    ahead = keys_at[None, :] - (at + behind)[:, None]
    if ALIBI:
        s += slope * ahead
    seen = (at[:, None] < queries) & (keys_at[None, :] < keys)
    if CAUSAL:
        seen = seen & (ahead <= 0)
    if WINDOW:
        seen = seen & ((ahead > -window) | (keys_at[None, :] < sinks))
    return tl.where(seen, s, float("-inf"))


@triton.jit
def _tiles(block, queries, keys, behind, window, sinks, TILE: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr):
    """(tiles with sinks before the window, first tile of the window, tiles in all) that a block of queries sees."""
    first, last, before = 0, tl.cdiv(keys, TILE), 0
    if CAUSAL:
        high = tl.minimum(queries, (block + 1) * TILE) - 1 + behind
        last = tl.minimum(last, tl.where(high < 0, 0, high // TILE + 1))
    if WINDOW:
        first = tl.minimum(tl.maximum(block * TILE + behind - window + 1, 0) // TILE, last)
        before = tl.minimum(tl.cdiv(sinks, TILE), first)
    return before, first, before + last - first


@triton.jit
def _forward_kernel(
    Q, K, V, O, L, CU_Q, CU_K, SLOPES, q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, o_batch, o_head, o_row,
    heads, group, dense_queries, dense_keys, window, sinks, scale, D: tl.constexpr, DV: tl.constexpr, WIDE: tl.constexpr, WIDE_V: tl.constexpr,
    TILE: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, ALIBI: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    block, head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    queries, keys = _length(batch, dense_queries, CU_Q, PACKED), _length(batch, dense_keys, CU_K, PACKED)
    if block * TILE >= queries:
        return
    behind, kv = keys - queries, head // group
    at, slope = block * TILE + tl.arange(0, TILE), 0.0
    if ALIBI:
        slope = tl.load(SLOPES + head)
    q = _rows(Q + _start(batch, q_batch, q_row, CU_Q, PACKED) + head.to(tl.int64) * q_head, at, q_row, queries, D, WIDE)
    k_at = K + _start(batch, k_batch, k_row, CU_K, PACKED) + kv.to(tl.int64) * k_head
    v_at = V + _start(batch, v_batch, v_row, CU_K, PACKED) + kv.to(tl.int64) * v_head
    most, total, o = tl.full([TILE], float("-inf"), tl.float32), tl.zeros([TILE], tl.float32), tl.zeros([TILE, WIDE_V], tl.float32)
    before, first, count = _tiles(block, queries, keys, behind, window, sinks, TILE, CAUSAL, WINDOW)
    for i in range(0, count):
        tile = tl.where(i < before, i, first + i - before)
        keys_at = tile * TILE + tl.arange(0, TILE)
        k, v = _rows(k_at, keys_at, k_row, keys, D, WIDE), _rows(v_at, keys_at, v_row, keys, DV, WIDE_V)
        s = _scores(q, k, at, keys_at, queries, keys, behind, scale, slope, window, sinks, CAUSAL, WINDOW, ALIBI)
        now = tl.maximum(most, tl.max(s, 1))
        finite = tl.where(now == float("-inf"), 0.0, now)  # a row that saw nothing yet: e^(-inf - 0) = 0
        p, shrink = tl.exp(s - finite[:, None]), tl.exp(most - finite)
        total = total * shrink + tl.sum(p, 1)
        o = o * shrink[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
        most = now
    whole = tl.where(total == 0.0, 1.0, total)
    _put(O + _start(batch, o_batch, o_row, CU_Q, PACKED) + head.to(tl.int64) * o_head, at, o_row, queries, o / whole[:, None], DV, WIDE_V)
    logsum = tl.where(total == 0.0, float("-inf"), most + tl.log(whole))
    tl.store(L + _sums(batch, head, heads, dense_queries, dense_queries, CU_Q, PACKED) + at, logsum, mask=at < queries)


@triton.jit
def _weights(s, d_o, v, logsum, delta, scale):
    """(P, dS times scale) of a tile."""
    p = tl.where(s == float("-inf"), 0.0, tl.exp(s - tl.where(logsum == float("-inf"), 0.0, logsum)[:, None]))
    return p, p * (tl.dot(d_o, tl.trans(v), input_precision="ieee") - delta[:, None]) * scale


@triton.jit
def _queries_kernel(
    Q, K, V, DO, L, DELTA, DQ, CU_Q, CU_K, SLOPES, q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, o_batch, o_head, o_row,
    x_batch, x_head, x_row, heads, group, dense_queries, dense_keys, window, sinks, scale, D: tl.constexpr, DV: tl.constexpr, WIDE: tl.constexpr,
    WIDE_V: tl.constexpr, TILE: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, ALIBI: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    block, head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    queries, keys = _length(batch, dense_queries, CU_Q, PACKED), _length(batch, dense_keys, CU_K, PACKED)
    if block * TILE >= queries:
        return
    behind, kv = keys - queries, head // group
    at, slope = block * TILE + tl.arange(0, TILE), 0.0
    if ALIBI:
        slope = tl.load(SLOPES + head)
    q = _rows(Q + _start(batch, q_batch, q_row, CU_Q, PACKED) + head.to(tl.int64) * q_head, at, q_row, queries, D, WIDE)
    d_o = _rows(DO + _start(batch, o_batch, o_row, CU_Q, PACKED) + head.to(tl.int64) * o_head, at, o_row, queries, DV, WIDE_V)
    k_at = K + _start(batch, k_batch, k_row, CU_K, PACKED) + kv.to(tl.int64) * k_head
    v_at = V + _start(batch, v_batch, v_row, CU_K, PACKED) + kv.to(tl.int64) * v_head
    sums = _sums(batch, head, heads, dense_queries, dense_queries, CU_Q, PACKED)
    logsum, delta = tl.load(L + sums + at, mask=at < queries, other=0.0), tl.load(DELTA + sums + at, mask=at < queries, other=0.0)
    dq = tl.zeros([TILE, WIDE], tl.float32)
    before, first, count = _tiles(block, queries, keys, behind, window, sinks, TILE, CAUSAL, WINDOW)
    for i in range(0, count):
        keys_at = tl.where(i < before, i, first + i - before) * TILE + tl.arange(0, TILE)
        k, v = _rows(k_at, keys_at, k_row, keys, D, WIDE), _rows(v_at, keys_at, v_row, keys, DV, WIDE_V)
        s = _scores(q, k, at, keys_at, queries, keys, behind, scale, slope, window, sinks, CAUSAL, WINDOW, ALIBI)
        _, ds = _weights(s, d_o, v, logsum, delta, scale)
        dq += tl.dot(ds.to(k.dtype), k, input_precision="ieee")
    _put(DQ + _start(batch, x_batch, x_row, CU_Q, PACKED) + head.to(tl.int64) * x_head, at, x_row, queries, dq, D, WIDE)


@triton.jit
def _keys_kernel(
    Q, K, V, DO, L, DELTA, DK, DV_, CU_Q, CU_K, SLOPES, q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, o_batch, o_head, o_row,
    x_batch, x_head, x_row, y_batch, y_head, y_row, heads, group, dense_queries, dense_keys, window, sinks, scale, D: tl.constexpr, DV: tl.constexpr,
    WIDE: tl.constexpr, WIDE_V: tl.constexpr, TILE: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, ALIBI: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    tile, kv, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    queries, keys = _length(batch, dense_queries, CU_Q, PACKED), _length(batch, dense_keys, CU_K, PACKED)
    if tile * TILE >= keys:
        return
    behind, keys_at = keys - queries, tile * TILE + tl.arange(0, TILE)
    k = _rows(K + _start(batch, k_batch, k_row, CU_K, PACKED) + kv.to(tl.int64) * k_head, keys_at, k_row, keys, D, WIDE)
    v = _rows(V + _start(batch, v_batch, v_row, CU_K, PACKED) + kv.to(tl.int64) * v_head, keys_at, v_row, keys, DV, WIDE_V)
    first, last = 0, tl.cdiv(queries, TILE)
    if CAUSAL:
        first = tl.minimum(tl.maximum(tile * TILE - behind, 0) // TILE, last)
    if WINDOW:
        reach = tl.maximum(tile * TILE + TILE - 1 + window - behind, 0)  # queries below it see a key of this tile
        last = tl.where(tile * TILE < sinks, last, tl.minimum(last, tl.cdiv(reach, TILE)))
    dk, dv = tl.zeros([TILE, WIDE], tl.float32), tl.zeros([TILE, WIDE_V], tl.float32)
    for member in range(0, group):
        head, slope = kv * group + member, 0.0
        if ALIBI:
            slope = tl.load(SLOPES + head)
        q_at = Q + _start(batch, q_batch, q_row, CU_Q, PACKED) + head.to(tl.int64) * q_head
        o_at = DO + _start(batch, o_batch, o_row, CU_Q, PACKED) + head.to(tl.int64) * o_head
        sums = _sums(batch, head, heads, dense_queries, dense_queries, CU_Q, PACKED)
        for block in range(first, last):
            at = block * TILE + tl.arange(0, TILE)
            q, d_o = _rows(q_at, at, q_row, queries, D, WIDE), _rows(o_at, at, o_row, queries, DV, WIDE_V)
            logsum, delta = tl.load(L + sums + at, mask=at < queries, other=0.0), tl.load(DELTA + sums + at, mask=at < queries, other=0.0)
            s = _scores(q, k, at, keys_at, queries, keys, behind, scale, slope, window, sinks, CAUSAL, WINDOW, ALIBI)
            p, ds = _weights(s, d_o, v, logsum, delta, scale)
            dv += tl.dot(tl.trans(p).to(d_o.dtype), d_o, input_precision="ieee")
            dk += tl.dot(tl.trans(ds).to(q.dtype), q, input_precision="ieee")
    _put(DK + _start(batch, x_batch, x_row, CU_K, PACKED) + kv.to(tl.int64) * x_head, keys_at, x_row, keys, dk, D, WIDE)
    _put(DV_ + _start(batch, y_batch, y_row, CU_K, PACKED) + kv.to(tl.int64) * y_head, keys_at, y_row, keys, dv, DV, WIDE_V)


def _longest(dense: int, cu: Tensor | None) -> int:
    return dense if cu is None else int((cu[1:] - cu[:-1]).max())


def _common(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor | None, causal: bool, window: int, sinks: int, scale: float, slopes: Tensor | None) -> dict[str, Any]:
    """What every kernel is told, by name."""
    dim, value_dim = q.shape[3], v.shape[3]
    wide, wide_v = (max(16, triton.next_power_of_2(n)) for n in (dim, value_dim))
    tile = next(tile for up_to, tile in TILES if max(wide, wide_v) <= up_to)
    return {"heads": q.shape[1], "group": q.shape[1] // k.shape[1], "dense_queries": q.shape[2], "dense_keys": k.shape[2], "window": window,
            "sinks": sinks, "scale": scale, "D": dim, "DV": value_dim, "WIDE": wide, "WIDE_V": wide_v, "TILE": tile, "CAUSAL": causal,
            "WINDOW": window > 0, "ALIBI": slopes is not None, "PACKED": cu_q is not None}  # fmt: skip


def _grid(rows: int, cu: Tensor | None, heads: int, batch: int, tile: int) -> tuple[int, int, int]:
    return triton.cdiv(_longest(rows, cu), tile), heads, batch if cu is None else cu.shape[0] - 1


def forward(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor | None, cu_k: Tensor | None, causal: bool, window: int, sinks: int, scale: float,
            slopes: Tensor | None, o: Tensor, logsum: Tensor) -> None:  # fmt: skip
    """Fill o [B, H, T, D of v] and logsum (fp32 [B, H, T]); arguments as of the op `flash_forward`, last dimensions contiguous."""
    how = _common(q, k, v, cu_q, causal, window, sinks, scale, slopes)
    grid = _grid(q.shape[2], cu_q, q.shape[1], q.shape[0], how["TILE"])
    _forward_kernel[grid](q, k, v, o, logsum, cu_q, cu_k, slopes, *(stride for x in (q, k, v, o) for stride in x.stride()[:3]), **how)


def backward(d_o: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, logsum: Tensor, cu_q: Tensor | None, cu_k: Tensor | None, causal: bool,
             window: int, sinks: int, scale: float, slopes: Tensor | None, dq: Tensor, dk: Tensor, dv: Tensor) -> None:  # fmt: skip
    """Fill dq, dk and dv; arguments as of the op `flash_backward`."""
    how = _common(q, k, v, cu_q, causal, window, sinks, scale, slopes)
    delta = (o.float() * d_o.float()).sum(-1).contiguous()
    read = [stride for x in (q, k, v, d_o) for stride in x.stride()[:3]]
    grid = _grid(q.shape[2], cu_q, q.shape[1], q.shape[0], how["TILE"])
    _queries_kernel[grid](q, k, v, d_o, logsum, delta, dq, cu_q, cu_k, slopes, *read, *dq.stride()[:3], **how)
    grid = _grid(k.shape[2], cu_k, k.shape[1], q.shape[0], how["TILE"])
    _keys_kernel[grid](q, k, v, d_o, logsum, delta, dk, dv, cu_q, cu_k, slopes, *read, *dk.stride()[:3], *dv.stride()[:3], **how)
