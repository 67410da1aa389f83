"""FlashAttention-2 of the compiled kernels against torch's scaled_dot_product_attention: forward, and forward with backward.

    make bench X=flash_vs_sdpa            (ARGS="--batch 1 4 --tokens 256 512 1024 2048 --rounds 7 --threads 2" by default)

Shapes of SmolLM2-135M: 9 heads over 3 key heads, 64 numbers each, queries, keys and values lying as [B, T, H, D]. torch gets them as
they are with enable_gqa, and once more with the key heads already repeated: it is compared at its quicker one. Sides take turns
(loops/bench.py); ratios are medians of the rounds' ratios. The fma peak is measured in the same run. Memory: bytes that autograd keeps, tensor by tensor;
plain attention's weights would take B x H x T x T numbers. LILLIPUT_ISA=avx2 measures another instruction set.
"""

from __future__ import annotations

import argparse
import os
import statistics
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from lilliput.base import hardware
from lilliput.base.show import Show
from lilliput.loops.bench import alternate, ratio
from lilliput.ops import flash, native, roofline

HEADS, KV_HEADS, DIM = 9, 3, 64


def tensors(batch: int, tokens: int) -> tuple[torch.Tensor, ...]:
    """q, k, v that want gradients, and the gradient of the output, each [B, heads, T, D] lying as [B, T, heads, D]."""
    q, k, v, d_o = (torch.randn(batch, tokens, heads, DIM).transpose(1, 2) for heads in (HEADS, KV_HEADS, KV_HEADS, HEADS))
    return q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), d_o


def sides(batch: int, tokens: int, train: bool) -> dict[str, Callable[[], object]]:
    """Name -> one call: ours and torch's two, causal and full."""
    q, k, v, d_o = tensors(batch, tokens)
    wide = [x.detach().repeat_interleave(HEADS // KV_HEADS, 1).requires_grad_() for x in (k, v)]

    def call(attend: Callable[..., torch.Tensor], *leaves: torch.Tensor) -> Callable[[], object]:
        if train:
            return lambda: torch.autograd.grad(attend(*leaves), leaves, d_o)

        def forward() -> torch.Tensor:
            with torch.no_grad():
                return attend(*leaves)

        return forward

    made: dict[str, Callable[[], object]] = {}
    for name, causal in (("causal", True), ("full", False)):
        made[f"ours {name}"] = call(lambda q, k, v, causal=causal: flash.attention(q, k, v, causal=causal), q, k, v)
        made[f"torch gqa {name}"] = call(lambda q, k, v, causal=causal: F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True), q, k, v)
        made[f"torch {name}"] = call(lambda q, k, v, causal=causal: F.scaled_dot_product_attention(q, k, v, is_causal=causal), q, *wide)
    return made


def line(batch: int, tokens: int, train: bool, rounds: int, limits: roofline.Roofline) -> dict[str, Any]:
    """One row of the table. Operations: 4 B H T^2 D forward, 2.5 times that backward; half of it causally."""
    times = alternate(sides(batch, tokens, train), rounds)
    flops = 4 * batch * HEADS * tokens**2 * DIM * (3.5 if train else 1.0)
    rates = {name: flops / (2 if name == "causal" else 1) / statistics.median(times[f"ours {name}"]) for name in ("causal", "full")}
    row: dict[str, Any] = {
        "pass": "forward + backward" if train else "forward",
        "batch": batch,
        "tokens": tokens,
        "causal / full": round(ratio(times, "ours causal", "ours full"), 2),
    }
    best = {name: min((f"torch gqa {name}", f"torch {name}"), key=lambda side: statistics.median(times[side])) for name in rates}
    row["torch's causal / full"] = round(ratio(times, best["causal"], best["full"]), 2)
    for name in rates:
        row |= {f"{name} x torch": round(ratio(times, f"ours {name}", best[name]), 2), f"{name} GFLOP/s": round(rates[name] / 1e9)}
        row[f"{name} % of fma peak"] = round(100 * rates[name] / limits.fma)
    return row


def memory(batch: int, tokens: int) -> dict[str, Any]:
    """Bytes that one causal call keeps for its backward pass, beside what plain attention's weights would take."""
    q, k, v, _ = tensors(batch, tokens)
    kept: dict[int, int] = {}

    def note(x: torch.Tensor) -> torch.Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        out = flash.attention(q, k, v, causal=True)
    del out
    return {"batch": batch, "tokens": tokens, "kept MiB": round(sum(kept.values()) / 2**20, 2), "bytes a token": sum(kept.values()) // (batch * tokens),
            "weights of plain attention MiB": round(4 * batch * HEADS * tokens**2 / 2**20, 2)}  # fmt: skip


def main() -> None:
    """Measure and print the tables."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--batch", type=int, nargs="+", default=[1, 4])
    options.add_argument("--tokens", type=int, nargs="+", default=[256, 512, 1024, 2048])
    options.add_argument("--rounds", type=int, default=7)
    options.add_argument("--threads", type=int, default=hardware.cpus())
    options.add_argument("--json", action="store_true")
    args = options.parse_args()
    show = Show(json=args.json)
    torch.set_num_threads(args.threads)
    native.threads(args.threads)
    limits = roofline.measure()
    rows = [line(batch, tokens, train, args.rounds, limits) for train in (False, True) for batch in args.batch for tokens in args.tokens]
    bytes_ = [memory(args.batch[0], tokens) for tokens in args.tokens]
    about = {
        "kernels": limits.level,
        "threads": args.threads,
        "torch": torch.__version__,
        "fma peak GFLOP/s": round(limits.fma / 1e9),
        "load": os.getloadavg()[0],
    }
    show.data(about | {"rows": rows, "memory": bytes_})
    show.table(rows, tuple(rows[0]), ", ".join(f"{key} {value}" for key, value in about.items()) + f", median of {args.rounds} rounds")
    show.table(bytes_, tuple(bytes_[0]), "kept for the backward pass, causal")


if __name__ == "__main__":
    main()
