"""Gradient checkpointing: keep what enters every k-th layer and recompute the rest in the backward pass. With k = sqrt(n)
an n-layer chain keeps O(sqrt n) activations instead of O(n), for one more forward pass and the same gradients; by recursion O(log n).

The run measures that shape on chains of 16 to 196 layers: bytes alive (memory.meter), layer forwards and flops, counted; unrolls the paper's LSTM
of 4 layers; and holds the paper's planner for a budget (algorithm 3) against every way to cut random chains.

Chen et al. 2016, arXiv 1604.06174, sections 4.1 and 4.4.
"""

from __future__ import annotations

import itertools
import math
import random
from typing import TYPE_CHECKING

from lilliput.papers.paper import Finding, Paper

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor
    from torch.nn import Module

    from lilliput.memory.plan import Decision
    from lilliput.memory.planners.chain import Chain

DEPTHS = (16, 36, 64, 100, 144, 196)
ROWS, WIDTH = 256, 32  # of one activation: 32 KiB
LSTM = {"layers": 4, "width": 256, "steps": 64, "rows": 32}  # activations are more than the weights, whose gradients are summed step by step
CHAINS = 60  # random ones, of up to 10 stages


def run() -> Finding:
    """Peak bytes and layer forwards of chains under three plans, each executed and metered, the LSTM, and Chen's planner; about 25 s on one core."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the operations are tiny: a second thread only waits
    try:
        rows, same, exact = _compare()
        lstm, lstm_same, lstm_exact = _lstm()
    finally:
        torch.set_num_threads(threads)
    flat = [row["sqrt / sqrt(n)"] for row in rows]
    spread = (max(flat) - min(flat)) / (max(flat) + min(flat))
    plain, last = _exponent(rows, "plain"), rows[-1]
    once_more = all(row["forwards, sqrt"] <= 2 * row["layers"] for row in rows)
    logarithm = all(row["forwards, recursive"] <= row["layers"] * (math.ceil(math.log2(row["layers"])) + 1) for row in rows)
    flops = max(abs(row["flops again"] - (1 - 1 / round(math.sqrt(row["layers"]))) / 3) for row in rows)
    worst = max(_chens(seed) for seed in range(CHAINS))
    same, exact = same and lstm_same, exact and lstm_exact
    summary = (
        f"from {DEPTHS[0]} to {DEPTHS[-1]} layers the peak grows as n^{plain:.2f} plain, as sqrt(n) within {spread:.1%} in sqrt(n) segments, and "
        f"from {rows[0]['recursive']:.0f} to {last['recursive']:.0f} activations by recursion; "
        f"at {DEPTHS[-1]} layers {last['plain']:.0f}, {last['sqrt']:.0f} and {last['recursive']:.0f} activations for "
        f"{last['forwards, sqrt'] / last['layers']:.2f} and {last['forwards, recursive'] / last['layers']:.2f} forwards a layer; "
        f"flops again are (1 - 1/k) / 3 of a step within {100 * flops:.1f} points; an LSTM of {LSTM['layers']} x {LSTM['width']} over {LSTM['steps']} steps "
        f"takes {lstm:.1f} times fewer bytes; Chen's planner is at most {worst:.2f} times the best of all cuts of {CHAINS} chains; "
        f"predicted bytes are {'the measured ones' if exact else 'NOT the measured ones'}, gradients {'bitwise equal' if same else 'NOT equal'}"
    )
    shape = 0.9 < plain < 1.1 and spread < 0.08 and once_more and logarithm and flops < 0.01 and lstm > 4 and worst <= 1.25
    return Finding(summary, tuple(rows), shape and same and exact)


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
            predicted, measured, forwards, again, gradients = _measure(*_layers(depth), planner)
            reference = reference or gradients
            same &= all(bool((a == b).all()) for a, b in zip(reference, gradients, strict=True))
            exact &= predicted == measured
            row |= {name: round(measured / (ROWS * WIDTH * 4), 2), f"forwards, {name}": forwards}
            if name == "sqrt":
                row["flops again"] = round(again, 4)
        row["sqrt / sqrt(n)"] = round(row["sqrt"] / math.sqrt(depth), 3)
        rows.append(row)
    return rows, same, exact


def _layers(depth: int) -> tuple[Module, Tensor]:
    """A chain of residual layers, and its input."""
    import torch

    class Layer(torch.nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return x + torch.tanh(super().forward(x))

    torch.manual_seed(0)
    return torch.nn.Sequential(*(Layer(WIDTH, WIDTH) for _ in range(depth))), torch.randn(ROWS, WIDTH)


def _lstm() -> tuple[float, bool, bool]:
    """(bytes of the plain run over those of sqrt(n) segments, sums of weights' gradients not counted; gradients equal; predicted bytes measured), LSTM."""
    import torch
    from torch import nn

    from lilliput.memory.planners.sqrt import sqrt

    class Unrolled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cells = nn.ModuleList(nn.LSTMCell(LSTM["width"], LSTM["width"]) for _ in range(LSTM["layers"]))

        def forward(self, x_TBC: Tensor) -> Tensor:
            zero = torch.zeros(x_TBC.shape[1], x_TBC.shape[2])
            states = [(zero, zero) for _ in self.cells]
            for h in x_TBC:
                for i, cell in enumerate(self.cells):
                    states[i] = cell(h, states[i])
                    h = states[i][0]
            return h

    torch.manual_seed(0)
    model, x_TBC = Unrolled(), torch.randn(LSTM["steps"], LSTM["rows"], LSTM["width"])
    plain, planned = _measure(model, x_TBC, lambda chain: {}), _measure(model, x_TBC, sqrt)
    same = all(torch.equal(a, b) for a, b in zip(plain[4], planned[4], strict=True))
    weights = sum(p.nbytes for p in model.parameters())
    return (plain[1] - weights) / (planned[1] - weights), same, plain[0] == plain[1] and planned[0] == planned[1]


def _chens(seed: int) -> float:
    """What algorithm 3's split of a random chain costs (bytes that cross the cuts and the largest segment), over the least of all splits."""
    from lilliput.memory.planners import chen

    draw = random.Random(seed)
    n = draw.randint(4, 10)
    saved, crossing = [draw.randint(1, 40) for _ in range(n)], [draw.randint(1, 6) for _ in range(n)]

    def cost(starts: tuple[int, ...]) -> int:
        return sum(crossing[s] for s in starts[1:]) + max(sum(saved[a:b]) for a, b in itertools.pairwise([*starts, n]))

    every = (cost((0, *cuts)) for count in range(n) for cuts in itertools.combinations(range(1, n), count))
    return cost(chen.best(saved, crossing).starts) / min(every)


def _measure(model: Module, x: Tensor, planner: Callable[[Chain], dict[int, Decision]]) -> tuple[int, int, int, float, list[Tensor]]:
    """(predicted and measured peak bytes of one forward and backward, gradients not counted; products with a bias; flops again as a share; gradients)."""
    import torch

    from lilliput.memory.capture import capture
    from lilliput.memory.execute import Executor
    from lilliput.memory.lower import lower
    from lilliput.memory.meter import Meter
    from lilliput.memory.planners.chain import chain
    from lilliput.memory.simulate import simulate

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
    simulation = simulate(schedule)
    again = sum(trace.ops[op].flops * times for op, times in simulation.replayed.items()) / sum(op.flops for op in trace.ops)
    return simulation.peak["device"], meter.peak, meter.calls["addmm"], again, gradients


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
        "at 196 layers 396, 45 and 14 activations for 1.93 and 5.65 forwards a layer; flops again are (1 - 1/k) / 3 of a step within 0.5 points; an LSTM of "
        "4 x 256 over 64 steps takes 4.9 times fewer bytes; Chen's planner is at most 1.20 times the best of all cuts of 60 chains; predicted bytes are the "
        "measured ones, gradients bitwise equal"
    ),
    switches=("remat.plan=sqrt",),
    run=run,
)
