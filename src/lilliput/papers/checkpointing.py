"""Gradient checkpointing: keep what enters every k-th layer and recompute the rest in the backward pass. With k = sqrt(n)
an n-layer chain keeps O(sqrt n) activations instead of O(n), for one more forward pass and the same gradients; by recursion O(log n).

The run measures that shape on chains of 16 to 196 layers: bytes alive (memory.meter) and layer forwards, counted.

Chen et al. 2016, arXiv 1604.06174, sections 4.1 and 4.4.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from lilliput.papers.paper import Finding, Paper

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from lilliput.memory.plan import Decision
    from lilliput.memory.planners.chain import Chain

DEPTHS = (16, 36, 64, 100, 144, 196)
ROWS, WIDTH = 256, 32  # of one activation: 32 KiB


def run() -> Finding:
    """Peak bytes and layer forwards of chains under three plans, each executed and metered; about 10 s on one core."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the operations are tiny: a second thread only waits
    try:
        rows, same, exact = _compare()
    finally:
        torch.set_num_threads(threads)
    flat = [row["sqrt / sqrt(n)"] for row in rows]
    spread = (max(flat) - min(flat)) / (max(flat) + min(flat))
    plain, last = _exponent(rows, "plain"), rows[-1]
    once_more = all(row["forwards, sqrt"] <= 2 * row["layers"] for row in rows)
    logarithm = all(row["forwards, recursive"] <= row["layers"] * (math.ceil(math.log2(row["layers"])) + 1) for row in rows)
    summary = (
        f"from {DEPTHS[0]} to {DEPTHS[-1]} layers the peak grows as n^{plain:.2f} plain, as sqrt(n) within {spread:.1%} in sqrt(n) segments, and "
        f"from {rows[0]['recursive']:.0f} to {last['recursive']:.0f} activations by recursion; "
        f"at {DEPTHS[-1]} layers {last['plain']:.0f}, {last['sqrt']:.0f} and {last['recursive']:.0f} activations for "
        f"{last['forwards, sqrt'] / last['layers']:.2f} and {last['forwards, recursive'] / last['layers']:.2f} forwards a layer; "
        f"predicted bytes are {'the measured ones' if exact else 'NOT the measured ones'}, gradients {'bitwise equal' if same else 'NOT equal'}"
    )
    return Finding(summary, tuple(rows), 0.9 < plain < 1.1 and spread < 0.08 and once_more and logarithm and same and exact)


def _compare() -> tuple[list[dict[str, int | float]], bool, bool]:
    """One row a depth, whether all gradients are bitwise equal, and whether every predicted peak is the measured one."""
    from lilliput.memory.planners.recursive import recursive
    from lilliput.memory.planners.sqrt import sqrt

    rows: list[dict[str, int | float]] = []
    same = exact = True
    for depth in DEPTHS:
        row: dict[str, int | float] = {"layers": depth}
        reference: list[Tensor] = []
        for name, planner in {"plain": lambda chain: {}, "sqrt": sqrt, "recursive": recursive}.items():
            predicted, measured, forwards, gradients = _measure(depth, planner)
            reference = reference or gradients
            same &= all(bool((a == b).all()) for a, b in zip(reference, gradients, strict=True))
            exact &= predicted == measured
            row |= {name: round(measured / (ROWS * WIDTH * 4), 2), f"forwards, {name}": forwards}
        row["sqrt / sqrt(n)"] = round(row["sqrt"] / math.sqrt(depth), 3)
        rows.append(row)
    return rows, same, exact


def _measure(depth: int, planner: Callable[[Chain], dict[int, Decision]]) -> tuple[int, int, int, list[Tensor]]:
    """(predicted and measured peak bytes of one forward and backward, gradients not counted; layer forwards; gradients) of a chain of residual layers."""
    import torch

    from lilliput.memory.capture import capture
    from lilliput.memory.execute import Executor
    from lilliput.memory.lower import lower
    from lilliput.memory.meter import Meter
    from lilliput.memory.planners.chain import chain
    from lilliput.memory.simulate import simulate

    class Layer(torch.nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return x + torch.tanh(super().forward(x))

    torch.manual_seed(0)
    model, x = torch.nn.Sequential(*(Layer(WIDTH, WIDTH) for _ in range(depth))), torch.randn(ROWS, WIDTH)
    step = lambda model, x: model(x).square().mean()
    trace, funcs = capture(model, step, [x], gradients=True)
    schedule = lower(trace, planner(chain(trace)))
    weights = list(model.parameters())
    for weight in weights:
        weight.grad = torch.zeros_like(weight)  # there before the meter starts: gradients are not activations
    gradients = [weight.grad for weight in weights if weight.grad is not None]
    with Meter(known=(*weights, *gradients, x)) as meter:
        with Executor(schedule, funcs).forward():
            loss = step(model, x)
        loss.backward()
    return simulate(schedule).peak["device"], meter.peak, meter.calls["addmm"], gradients


def _exponent(rows: list[dict[str, int | float]], name: str) -> float:
    """Slope of log(value) over log(layers), from the first row to the last."""
    return math.log(rows[-1][name] / rows[0][name]) / math.log(rows[-1]["layers"] / rows[0]["layers"])


PAPER = Paper(
    name="checkpointing",
    system="gradient checkpointing",
    title="Training Deep Nets with Sublinear Memory Cost",
    authors="Chen et al.",
    year=2016,
    where="arXiv 1604.06174",
    claim="A 1,000-layer residual network trains in 7 GB instead of 48 GB, in 30 % more time: O(sqrt n) memory for one extra forward pass.",
    measured=(
        "from 16 to 196 layers the peak grows as n^0.96 plain, as sqrt(n) within 7.7% in sqrt(n) segments, and from 10 to 14 activations by recursion; "
        "at 196 layers 396, 45 and 14 activations for 1.93 and 5.65 forwards a layer; predicted bytes are the measured ones, gradients bitwise equal"
    ),
    switches=("remat.plan=sqrt",),
    run=run,
)
