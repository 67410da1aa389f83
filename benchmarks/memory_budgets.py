"""Ten byte budgets from the smallest feasible one to the plain run: predicted and metered peak, predicted and timed step, bits of the gradients.

    python benchmarks/memory_budgets.py [MODEL] [TOKENS]      default: smollm2-135m 512, random weights

Predicted seconds come from one measured plain step (memory.profile); each timed step is the best of two.
"""

from __future__ import annotations

import sys
import time

import torch

from lilliput.base.errors import DoesNotFit
from lilliput.base.show import Show, size
from lilliput.memory.capture import capture
from lilliput.memory.execute import Executor
from lilliput.memory.lower import lower
from lilliput.memory.meter import Meter
from lilliput.memory.planners.budget import frontier
from lilliput.memory.profile import measure
from lilliput.models.decoder import Decoder
from lilliput.models.sizes import PRESETS


def main(name: str, tokens: int) -> None:
    show = Show()
    torch.set_num_threads(1)
    spec = PRESETS[name]
    model = Decoder(spec)
    model.init_weights(0)
    batch = [torch.randint(0, spec.vocab, (1, tokens), generator=torch.Generator().manual_seed(i)) for i in (0, 1)]
    step = lambda m, x, y: torch.nn.functional.cross_entropy(m(x).flatten(0, 1), y.flatten())
    begin = time.perf_counter()
    trace, funcs = capture(model, step, batch, gradients=True)  # those of an earlier micro-batch: what remains is activations
    show.line(f"traced {len(trace.ops)} operations, {len(trace.saved())} saved storages in {time.perf_counter() - begin:.1f} s")

    zeros = [torch.zeros_like(p) for p in model.parameters()]

    def clear() -> None:
        for parameter, gradient in zip(model.parameters(), zeros, strict=True):
            parameter.grad = gradient.zero_()

    measure(trace, lambda: step(model, *batch), clear, repeats=2)
    begin = time.perf_counter()
    options = frontier(trace)
    show.line(f"{options.tried} plans judged in {time.perf_counter() - begin:.1f} s, {len(options.options)} on the frontier")
    clear()
    step(model, *batch).backward()
    expected = [p.grad.clone() for p in model.parameters()]
    small, large = options.options[0].peak, options.options[-1].peak
    rows = []
    for i in range(10):
        budget = small + (large - small) * i // 9
        option = options.pick({"device": budget})
        executor = Executor(lower(trace, option.decisions), funcs)
        clear()
        with Meter(known=[*model.parameters(), *zeros, *batch], budget={"device": budget}) as meter:
            with executor.forward():
                loss = step(model, *batch)
            loss.backward()
        same = all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), expected, strict=True))
        del loss
        best = float("inf")
        for _ in range(2):
            begin = time.perf_counter()
            with executor.forward():
                loss = step(model, *batch)
            loss.backward()
            best = min(best, time.perf_counter() - begin)
            del loss
        off = meter.peak - option.peak
        rows.append({"budget": size(budget), "peak": size(meter.peak), "off by": f"{off} B", "predicted s": round(option.simulation.seconds, 3),
                     "timed s": round(best, 3), "bitwise": str(same), "plan": option.name})  # fmt: skip
        show.line(f"{rows[-1]}")
    show.table(rows, tuple(rows[0]), f"{name}, 1 x {tokens} tokens: bytes that a micro-batch makes beside weights, gradients and optimizer")
    try:
        options.pick({"device": small - 1})
    except DoesNotFit as refusal:
        show.line(str(refusal))


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "smollm2-135m", int(sys.argv[2]) if len(sys.argv) > 2 else 512)
