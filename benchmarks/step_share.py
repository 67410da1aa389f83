"""Where a decode step's time goes: Python (the engine's step less the compiled calls: layers, head, sampler), and each region of the layers
beside its roofline (its weights over the read bandwidth or its arithmetic over the peak, measured in the same run).

    make bench X=step_share            (ARGS="--model smollm2-135m --batches 1 4 16 --steps 200 --threads 2" by default)

Greedy, no text asked for beyond the engine's own; medians over the steps. The model's weights pass through the caches between two steps, so Python's
own code comes from memory each time.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import lilliput
from lilliput.base.show import Show
from lilliput.loops.bench import machine
from lilliput.ops import native, roofline
from lilliput.ops.step import REGIONS, StepPlan
from lilliput.serve.request import Sampling


class Timed:
    """An object whose named methods add their time to `seconds`."""

    def __init__(self, inner: Any, names: tuple[str, ...], clock: list[float]) -> None:
        self._inner = inner
        for name in names:
            setattr(self, name, timed(getattr(inner, name), clock))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


def timed(call: Callable[..., Any], clock: list[float]) -> Callable[..., Any]:
    """`call`, adding its seconds to clock[0]."""

    def run(*args: Any) -> Any:
        start = time.perf_counter()
        found = call(*args)
        clock[0] += time.perf_counter() - start
        return found

    return run


def regions(plan: StepPlan, rows: int, steps: int, seconds: list[float], head: float, limits: roofline.Roofline) -> list[dict[str, Any]]:
    """One line a region: milliseconds of a step (all layers), and the least that the machine needs for its products."""
    least = dict.fromkeys((*REGIONS, "head"), 0.0)
    for (_, slot), (weight, int8) in plan.products.items():
        work = {"bytes": float(weight.bytes), "int8" if int8 else "flops": 2.0 * rows * weight.outputs * weight.inputs}
        least[slot] = least.get(slot, 0.0) + limits.seconds(**work)
    found = []
    for name, total in zip((*REGIONS, "head"), (*seconds, head)):
        if total:
            share = round(100 * least[name] * steps / total) if least[name] else ""
            found.append({"batch": rows, "region": name, "ms": round(1000 * total / steps, 3), "least, ms": round(1000 * least[name], 3), "% of limit": share})
    return found


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--weights", default="file")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    show, clock, called, rows, parts = Show(), [0.0], [0.0], [], []
    model = lilliput.load(arguments.model, runner="native", weights=arguments.weights, kv="fp16", kv_tokens=16 * (arguments.steps + 64))
    native.threads(arguments.threads)
    plan, limits = model.module.plan, roofline.measure()
    region_clock = plan.clock()
    plan._native = Timed(Timed(plan._native, ("forward",), called), ("forward",), clock)
    module = native.module()
    module.choose = timed(module.choose, clock)  # type: ignore[union-attr, attr-defined]
    for batch in arguments.batches:
        engine = model.engine
        for number in range(batch):
            engine.add([1000 + number * 40 + i for i in range(32)], Sampling(arguments.steps + 10, ignore_eos=True))
        for _ in range(8):
            engine.step()
        whole, inside = [], []
        called[0] = 0.0
        region_clock.zero_()
        for _ in range(arguments.steps):
            clock[0], start = 0.0, time.perf_counter()
            engine.step()
            whole.append(1000 * (time.perf_counter() - start))
            inside.append(1000 * clock[0])
        seconds = region_clock.tolist()
        parts += regions(plan, batch, arguments.steps, seconds, called[0] - sum(seconds), limits)  # what is no layer's is the head
        while engine.busy:
            engine.step()
        share = statistics.median(a - b for a, b in zip(whole, inside))
        step, compiled = (round(statistics.median(each), 3) for each in (whole, inside))
        rows.append({"batch": batch, "step, ms": step, "compiled, ms": compiled, "Python, ms": round(share, 3)})
    show.table(rows, ("batch", "step, ms", "compiled, ms", "Python, ms"), ", ".join(f"{key} {value}" for key, value in machine().items()))
    show.table(parts, tuple(parts[0]), f"read {limits.read / 1e9:.1f} GB/s, fma {limits.fma / 1e9:.0f} GFLOP/s, int8 {limits.int8 / 1e9:.0f} GOP/s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
