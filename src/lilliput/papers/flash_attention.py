"""FlashAttention-2: softmax(Q K^T) V block by block with a running maximum and sum, divided once at the end; only the output and
one log-sum a row are kept, so memory is O(S). Causal blocks above the diagonal are skipped. Same numbers as plain attention.

The run holds outputs and gradients against float64, counts the bytes kept for the backward pass, and finds the tiles that are read by
making one tile of values NaN at a time. Times (against torch's scaled_dot_product_attention) are in its rows.

Dao 2023, ICLR 2024, arXiv 2307.08691.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from lilliput.papers.paper import Finding, Paper

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

TOKENS = (256, 512, 1024)
HEADS, DIM = 3, 64


def run() -> Finding:
    """Errors, bytes, tiles and times at 256 to 1024 tokens; about 3 s. UserError without compiled kernels."""
    from lilliput.base.errors import UserError
    from lilliput.ops import native

    if native.module() is None:
        raise UserError("FlashAttention-2 cannot be measured", native.missing() or "", "install a compiler and lilliput again")
    rows = [_row(tokens) for tokens in TOKENS]
    ours, plain = (math.log(rows[-1][name] / rows[0][name]) / math.log(TOKENS[-1] / TOKENS[0]) for name in ("kept (KiB)", "kept, plain (KiB)"))
    close = all(row["error, forward"] <= 1e-5 and row["error, gradients"] <= 1e-4 for row in rows)
    last = rows[-1]
    summary = (
        f"from {TOKENS[0]} to {TOKENS[-1]} tokens the bytes kept for the backward pass grow as S^{ours:.2f}, plain attention's as S^{plain:.2f}; "
        f"causal reads {last['tiles, causal']} of {last['tiles, full']} tiles; "
        f"outputs are {'within' if close else 'NOT within'} 1e-5 and gradients 1e-4 of float64"
    )
    half = all(row["tiles, causal"] == _triangle(row["tokens"] // 64) and row["tiles, full"] == (row["tokens"] // 64) ** 2 for row in rows)
    return Finding(summary, tuple(rows), close and half and ours < 1.05 and plain > 1.7)


def _triangle(blocks: int | float) -> float:
    return blocks * (blocks + 1) / 2


def _row(tokens: int) -> dict[str, int | float]:
    import torch

    from lilliput.ops import flash

    draw = torch.Generator().manual_seed(tokens)
    q, k, v, d_o = (torch.randn(1, HEADS, tokens, DIM, generator=draw) for _ in range(4))
    o, gradients, kept = _pass(lambda *qkv: flash.attention(*qkv, causal=True), q, k, v, d_o)
    _, _, plain = _pass(lambda *qkv: flash.reference(*qkv, causal=True)[0], q, k, v, d_o)
    want, wanted, _ = _pass(lambda *qkv: flash.reference(*qkv, causal=True)[0], *(x.double() for x in (q, k, v, d_o)))
    causal, full, torch_causal = _times(q, k, v)
    return {
        "tokens": tokens,
        "kept (KiB)": round(kept / 1024),
        "kept, plain (KiB)": round(plain / 1024),
        "tiles, causal": _tiles(q, k, v, causal=True),
        "tiles, full": _tiles(q, k, v, causal=False),
        "error, forward": float((o - want).abs().max()),
        "error, gradients": max(float((a - b).abs().max()) for a, b in zip(gradients, wanted, strict=True)),
        "causal (ms)": round(causal * 1e3, 2),
        "full (ms)": round(full * 1e3, 2),
        "torch, causal (ms)": round(torch_causal * 1e3, 2),
    }


def _pass(attend: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, d_o: Tensor) -> tuple[Tensor, tuple[Tensor, ...], int]:
    """(output, gradients, bytes of the storages that autograd keeps)."""
    import torch

    from lilliput.memory.meter import storage_bytes

    kept: list[Tensor] = []

    def note(x: Tensor) -> Tensor:
        kept.append(x.detach())
        return x

    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        o = attend(*leaves)
    return o.detach(), torch.autograd.grad(o, leaves, d_o), storage_bytes(kept)


def _tiles(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> int:
    """Pairs of a block of queries and a tile of keys that are read: NaN values of a tile show, for 0 times NaN is NaN."""
    from lilliput.ops import flash

    count, tokens = 0, q.shape[2]
    for at in range(0, tokens, 64):
        spoilt = v[:, :1].clone()
        spoilt[:, :, at : at + 64] = float("nan")
        o = flash.attention(q[:, :1], k[:, :1], spoilt, causal=causal)
        count += int(o.isnan().any(-1).view(-1, 64).any(-1).sum())
    return count


def _times(q: Tensor, k: Tensor, v: Tensor) -> tuple[float, float, float]:
    """Best seconds of (causal, full, torch's causal), in turns."""
    import time

    import torch.nn.functional as F

    from lilliput.ops import flash

    calls = (
        lambda: flash.attention(q, k, v, causal=True),
        lambda: flash.attention(q, k, v, causal=False),
        lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True),
    )
    best = [math.inf] * 3
    for _ in range(7):
        for i, call in enumerate(calls):
            call()
            begin = time.perf_counter()
            call()
            best[i] = min(best[i], time.perf_counter() - begin)
    return best[0], best[1], best[2]


PAPER = Paper(
    name="flashattention-2",
    system="FlashAttention-2",
    title="FlashAttention-2: Faster Attention with Better Parallelism and Work Partitioning",
    authors="Dao",
    year=2023,
    where="ICLR 2024, arXiv 2307.08691",
    claim="About 2x the speed of FlashAttention, 50-73 % of an A100's peak; GPT models train at up to 225 TFLOP/s on each A100 (72 % utilisation).",
    measured=(
        "from 256 to 1024 tokens the bytes kept for the backward pass grow as S^1.00, plain attention's as S^1.91; "
        "causal reads 136 of 256 tiles; outputs are within 1e-5 and gradients 1e-4 of float64"
    ),
    run=run,
)
