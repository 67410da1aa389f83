"""POET on ResNet-18 and a 2-layer BERT: its program gets half of what autograd keeps; predicted and timed seconds, bytes, bits; and what boards pay.

    python benchmarks/poet_nets.py              (--width 64 --batch 16 --dim 512 --tokens 256 --rounds 7 --stages 12 --tier host disk)
    python benchmarks/poet_nets.py --boards     joules on the paper's boards: together, running again only, paging only (no timing)

Seconds of operations come from the plain step, watched (memory.profile); speeds of the links from the stores themselves. In each round a step is
watched again, timed plain and timed planned; the prediction is the simulator's, from what was watched in the same rounds.
The nets are those of the tests (tests/memory/nets.py), larger.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from lilliput.base import hardware
from lilliput.base.errors import DoesNotFit
from lilliput.base.show import Show, size
from lilliput.loops.bench import alternate, machine
from lilliput.memory.boards import BOARDS
from lilliput.memory.capture import capture
from lilliput.memory.execute import Executor
from lilliput.memory.lower import lower
from lilliput.memory.meter import Meter
from lilliput.memory.planners.chain import chain
from lilliput.memory.planners.poet import decisions, energy, of_chain, solve
from lilliput.memory.profile import measure
from lilliput.memory.simulate import Link, Rates, simulate
from lilliput.memory.stores import FileStore, HostStore
from lilliput.memory.trace import Trace

TESTS = Path(__file__).parent.parent / "tests"
sys.path[:0] = [str(TESTS), str(TESTS / "memory")]
from nets import bert, conv  # noqa: E402

PIECE = 1 << 24  # bytes that a link is measured with


def link(store: HostStore | FileStore) -> Link:
    """Bytes/s of a store in both directions: the median of five."""
    flat, rates = torch.zeros(PIECE, dtype=torch.uint8), []
    for call in (lambda: store.write(-1, flat, flat.dtype), lambda: store.read(-1, flat)):
        times = []
        for _ in range(5):
            begin = time.perf_counter()
            call().result()
            times.append(time.perf_counter() - begin)
        rates.append(PIECE / statistics.median(times))
    store.free(-1)
    return Link(*rates, latency=5e-5)  # handing over to the copying thread


def timed(name: str, net: Any, tier: str, stages: int, rounds: int) -> dict[str, Any]:
    """One row: the net within half of its activations."""
    model, step, inputs = net
    zeros = [torch.zeros_like(p) for p in model.parameters()]

    def clear() -> None:
        for parameter, gradient in zip(model.parameters(), zeros, strict=True):
            parameter.grad = gradient.zero_()

    trace, funcs = capture(model, step, inputs, gradients=True)
    measure(trace, lambda: step(model, *inputs), clear)
    with tempfile.TemporaryDirectory() as folder:
        sizes = {s.index: s.bytes for s in trace.saved()} | {-1: PIECE}
        store = HostStore() if tier == "host" else FileStore(Path(folder) / "pages", sizes)
        rates = Rates({tier: link(store)})
        plain = simulate(lower(trace, {}), rates)
        short = chain(trace).merged(stages)
        half = sum(stage.saved for stage in short.stages) / 2
        found = solve(of_chain(short, rates.link(tier)), half)
        schedule = lower(trace, decisions(short, found, tier))  # type: ignore[arg-type]
        simulated, executor = simulate(schedule, rates), Executor(schedule, funcs, {tier: store})

        def run(planned: bool) -> list[torch.Tensor]:
            clear()
            if planned:
                with executor.forward():
                    loss = step(model, *inputs)
            else:
                loss = step(model, *inputs)
            loss.backward()
            return [p.grad for p in model.parameters()]

        expected = [g.clone() for g in run(False)]
        meter = Meter(known=[*model.parameters(), *model.buffers(), *zeros, *inputs], budget={"device": simulated.peak["device"]})
        executor.meter = meter
        with meter:
            same = all(torch.equal(a, b) for a, b in zip(run(True), expected, strict=True))
        executor.meter = None
        watched: list[list[float]] = []  # the operations again, in the same rounds: minutes apart the machine itself is another one

        def watch() -> None:
            measure(trace, lambda: step(model, *inputs), clear, repeats=1)
            watched.append([op.seconds for op in trace.ops])

        times = alternate({"watched": watch, "plain": lambda: run(False), "planned": lambda: run(True)}, rounds)
        for op, column in zip(trace.ops, zip(*watched, strict=True), strict=True):
            op.seconds = statistics.median(column)
        simulated, plain = simulate(schedule, rates), simulate(lower(trace, {}), rates)
        seconds = {side: statistics.median(t) for side, t in times.items()}
    held = {"plain": size(plain.peak["device"]), "half": size(half), "peak": size(meter.peak), "off by": meter.peak - simulated.peak["device"],
            "bitwise": str(same)}  # fmt: skip
    went = {"predicted ms": round(1e3 * simulated.seconds, 1), "timed ms": round(1e3 * seconds["planned"], 1),
            "off %": round(100 * (seconds["planned"] / simulated.seconds - 1), 1), "plain ms": round(1e3 * seconds["plain"], 1),
            "plain predicted": round(1e3 * plain.seconds, 1)}  # fmt: skip
    return {"net": name, "tier": tier, **held, **went, "paged": size(simulated.moved.get(tier, 0)),
            "again": len(found.computed) - 2 * len(short)}  # fmt: skip


def boards(name: str, trace: Trace, stages: int) -> list[dict[str, Any]]:
    """Joules above computing everything once, by board and share of what the net saves."""
    rows = []
    for board in (BOARDS[b] for b in ("mkr1000", "m4f", "a72")):
        for op in trace.ops:
            op.seconds = board.seconds(max(op.flops, op.traffic / 8))
        short = chain(trace).merged(stages)
        graph = energy(of_chain(short, board.disk), board.watts, board.disk.watts)
        once, whole = sum(graph.cost), sum(stage.saved for stage in short.stages)
        for share in (0.4, 0.55, 0.7):
            row: dict[str, Any] = {"net": name, "board": board.name, "of saved": share, "once J": round(once, 3)}
            for way, again, paging in (("together", True, True), ("again only", True, False), ("paging only", False, True)):
                try:
                    found = solve(graph, share * whole, again=again, paging=paging)
                    row[way] = f"+{100 * (found.cost / once - 1):.2f}%"
                    if way == "together":
                        row["how"] = f"{len(found.paged_in)} paged, {len(found.computed) - len(graph)} again"
                except DoesNotFit:
                    row[way] = "does not fit"
            rows.append(row)
    return rows


def main() -> None:
    """Measure and print the tables."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("width", 64), ("batch", 16), ("dim", 512), ("tokens", 256), ("rounds", 7), ("stages", 12)):
        options.add_argument(f"--{name}", type=int, default=default)
    options.add_argument("--threads", type=int, default=hardware.cpus())
    options.add_argument("--tier", nargs="+", default=["host", "disk"])
    options.add_argument("--boards", action="store_true")
    args = options.parse_args()
    show = Show()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    nets: dict[str, Callable[[], Any]] = {
        f"ResNet-18, width {args.width}, {args.batch} x 32 x 32": lambda: conv(args.width, args.batch),
        f"BERT, 2 layers of {args.dim}, 2 x {args.tokens}": lambda: bert(2, args.dim, args.tokens),
    }
    if args.boards:
        rows = [row for name, net in nets.items() for row in boards(name, capture(*net(), gradients=True)[0], args.stages)]
    else:
        rows = [timed(name, net(), tier, args.stages, args.rounds) for name, net in nets.items() for tier in args.tier]
    about = machine() | {"threads": args.threads, "torch": torch.__version__, "load": os.getloadavg()[0]}
    show.table(rows, tuple(rows[0]), ", ".join(f"{key} {value}" for key, value in about.items()))


if __name__ == "__main__":
    main()
