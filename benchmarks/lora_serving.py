"""LoRA serving: tokens a second of a batch whose requests use 0, 1, 2, 4, 8 adapters, in turns; medians.

    make bench X=lora_serving ARGS="--runner native"     the compiled kernels
    make bench X=lora_serving ARGS="--runner eager"      PyTorch
    make bench X=lora_serving ARGS="--saved fp16"        adapters that were saved in half precision are kept so

One engine holds all adapters; a round gives each mix the same number of steps, so that what else runs on the machine hits all alike.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import lilliput
from lilliput.base.hardware import cpus
from lilliput.base.show import Show
from lilliput.models.adapters import write_adapter
from lilliput.ops import native
from lilliput.serve.request import Sampling


def adapters(folder: Path, spec: Any, count: int, rank: int, saved: str) -> None:
    """Random ones on every Linear, small enough that answers stay sensible."""
    for seed in range(count):
        generator = torch.Generator().manual_seed(seed)
        pairs = {}
        for name, shape in spec.shapes().items():
            if name.endswith("_proj.weight"):
                a, b = torch.randn(rank, shape[1], generator=generator) / shape[1] ** 0.5, 1e-2 * torch.randn(shape[0], rank, generator=generator)
                pairs[name.removesuffix(".weight")] = (a.half().float(), b.half().float()) if saved == "fp16" else (a, b)
        (folder / f"a{seed}").mkdir()
        write_adapter(folder / f"a{seed}", spec, pairs, rank=rank, alpha=float(rank), dropout=0.0)


def steps(engine: Any, mix: int, batch: int, count: int) -> float:
    """Tokens a second of a batch in which request i uses adapter i modulo `mix` (0: none), after its prompts are read."""
    ids = [engine.add([1000 + (i * 7 + b) % 5000 for i in range(128)], Sampling(count + 8, ignore_eos=True, adapter=f"a{b % mix}" if mix else ""))
           for b in range(batch)]  # fmt: skip
    while any(not answer.tokens for answer in engine._answers.values()):
        engine.step()
    start = time.perf_counter()
    for _ in range(count):
        engine.step()
    rate = count * batch / (time.perf_counter() - start)
    for id in ids:
        engine.cancel(id)
    engine.step()
    return rate


def main() -> int:
    """Measure and print a table."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--model", default="smollm2-135m")
    options.add_argument("--runner", default="native", choices=("native", "eager"))
    options.add_argument("--weights", default="file")
    options.add_argument("--saved", default="fp32", choices=("fp32", "fp16"))
    options.add_argument("--rank", type=int, default=8)
    options.add_argument("--batch", type=int, default=8)
    options.add_argument("--rounds", type=int, default=7)
    options.add_argument("--steps", type=int, default=16)
    options.add_argument("--json", action="store_true")
    args = options.parse_args()
    show = Show(json=args.json)
    torch.set_num_threads(cpus())
    native.threads(cpus())
    mixes = [0, 1, 2, 4, 8]
    with tempfile.TemporaryDirectory() as folder:
        adapters(Path(folder), lilliput.load(args.model).spec, max(mixes), args.rank, args.saved)
        weights = {"weights": args.weights} if args.runner == "native" else {}
        engine = lilliput.load(args.model, runner=args.runner, adapters=folder, sharing=False, **weights).engine
    rates: dict[int, list[float]] = {mix: [] for mix in mixes}
    for _ in range(args.rounds):
        for mix in mixes:
            rates[mix].append(steps(engine, mix, args.batch, args.steps))
    rows = []
    for mix in mixes:
        share = statistics.median(rate / base for rate, base in zip(rates[mix], rates[0]))
        rows.append({"adapters": mix, "tokens/s": round(statistics.median(rates[mix]), 1), "of the base": f"{share:.0%}"})
    load = os.getloadavg()[0]
    show.data({"arguments": vars(args), "load": load, "rows": rows})
    show.table(rows, tuple(rows[0]), f"{args.model}, {args.runner}, rank {args.rank} on every Linear in {args.saved}, {args.batch} requests, load {load:.1f}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
