"""Gradient checkpointing: keep the input of every k-th block and recompute the rest in the backward pass. With k = sqrt(n)
an n-block chain keeps O(sqrt n) activations instead of O(n), for one more forward pass and the same gradients.

The run measures that shape on chains of 16 to 100 blocks: bytes alive (memory.meter) and block forwards, counted.

Chen et al. 2016, arXiv 1604.06174, section 4.1.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from lilliput.papers.paper import Finding, Paper

if TYPE_CHECKING:
    from torch import Tensor

DEPTHS = (16, 36, 64, 100)


def run() -> Finding:
    """Peak bytes and block forwards of chains with and without recomputation; about 5 s on one core."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the operations are tiny: a second thread only waits
    try:
        rows, same = _compare()
    finally:
        torch.set_num_threads(threads)
    plain, remat = (_exponent(rows, name) for name in ("peak, plain (KiB)", "peak, remat (KiB)"))
    once_more = all(row["block forwards, remat"] == 2 * row["block forwards, plain"] for row in rows)
    summary = (
        f"from {DEPTHS[0]} to {DEPTHS[-1]} blocks the peak grows as n^{plain:.2f} plain and n^{remat:.2f} recomputed, "
        f"to {rows[-1]['remat / plain']:.0%} of it; "
        f"each block runs forward {'exactly once more' if once_more else 'NOT once more'}; gradients are {'bitwise equal' if same else 'NOT equal'}"
    )
    return Finding(summary, tuple(rows), 0.9 < plain < 1.1 and 0.4 < remat < 0.6 and once_more and same)


def _compare() -> tuple[list[dict[str, int | float]], bool]:
    """One row a depth, and whether all gradients are bitwise equal."""
    rows: list[dict[str, int | float]] = []
    same = True
    for depth in DEPTHS:
        plain_peak, plain_calls, plain_gradients = _measure(depth, recompute=False)
        remat_peak, remat_calls, gradients = _measure(depth, recompute=True)
        same &= all(bool((a == b).all()) for a, b in zip(plain_gradients, gradients, strict=True))
        rows.append(
            {
                "blocks": depth,
                "peak, plain (KiB)": round(plain_peak / 1024),
                "peak, remat (KiB)": round(remat_peak / 1024),
                "remat / plain": round(remat_peak / plain_peak, 3),
                "block forwards, plain": plain_calls,
                "block forwards, remat": remat_calls,
            }
        )
    return rows, same


def _measure(depth: int, recompute: bool) -> tuple[int, int, list[Tensor]]:
    """(peak bytes of one forward and backward, gradients not counted; block forwards; gradients) of a chain of `depth` blocks."""
    import torch

    from lilliput.memory.execute import recompute_every
    from lilliput.memory.meter import Meter
    from lilliput.models.decoder import Decoder
    from lilliput.models.spec import DecoderSpec
    from lilliput.train.remat import Remat

    model = Decoder(DecoderSpec("llama", vocab=16, dim=32, layers=depth, heads=2, kv_heads=2, head_dim=16, ffn=64, context=256))
    model.init_weights(seed=0)
    if recompute:
        model.walk = recompute_every(Remat(every="sqrt").segment(model.facts))
    calls = 0

    def count(*_: object) -> None:
        nonlocal calls
        calls += 1

    for block in model.layers:
        block.register_forward_pre_hook(count)
    weights = list(model.parameters())
    gradients = [torch.zeros_like(weight) for weight in weights]  # there before the meter starts: they are not activations
    for weight, gradient in zip(weights, gradients, strict=True):
        weight.grad = gradient
    tokens_BT = torch.arange(256).reshape(1, 256) % 16
    with Meter(known=(*weights, *gradients)) as meter:
        model(tokens_BT).square().mean().backward()
    return meter.peak, calls, gradients


def _exponent(rows: list[dict[str, int | float]], name: str) -> float:
    """Slope of log(value) over log(blocks), from the first row to the last."""
    return math.log(rows[-1][name] / rows[0][name]) / math.log(rows[-1]["blocks"] / rows[0]["blocks"])


PAPER = Paper(
    name="checkpointing",
    system="gradient checkpointing",
    title="Training Deep Nets with Sublinear Memory Cost",
    authors="Chen et al.",
    year=2016,
    where="arXiv 1604.06174",
    claim="A 1,000-layer residual network trains in 7 GB instead of 48 GB, in 30 % more time: O(sqrt n) memory for one extra forward pass.",
    measured=(
        "from 16 to 100 blocks the peak grows as n^0.99 plain and n^0.48 recomputed, to 11% of it; each block runs forward exactly once more; "
        "gradients are bitwise equal"
    ),
    switches=("remat.every=sqrt",),
    run=run,
)
