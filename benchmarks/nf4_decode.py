"""NF4 decoding to fp32: Lilliput's kernel, its plain torch form and bitsandbytes' CPU kernel, in turns, in one process.

    PYTHONPATH=<folder with bitsandbytes> python benchmarks/nf4_decode.py      (--rounds 9 --threads 2 --sizes 576x1536 2048x2048 4096x4096)

bitsandbytes is no dependency. Sizes: SmolLM2-135M's largest Linear, one as large as the L3 cache, one larger than it. Both sides
allocate what they answer. Without the second level the two decoded matrices are compared bit for bit first. Nanoseconds a weight are
medians of the rounds; ratios are medians of the rounds' ratios (above 1: ours is faster).
"""

from __future__ import annotations

import argparse
import os
import statistics
from typing import Any

import bitsandbytes
import torch
from bitsandbytes import functional

from lilliput.base import hardware
from lilliput.base.show import Show
from lilliput.loops.bench import alternate, machine, ratio
from lilliput.ops import native
from lilliput.ops.nf4 import Nf4, reference


def row(outputs: int, inputs: int, double: bool, rounds: int) -> dict[str, Any]:
    """One size, with or without the second level."""
    weight, codec = torch.randn(outputs, inputs), Nf4(outputs, inputs, double)
    ours = codec.encode(weight)
    theirs, state = functional.quantize_4bit(weight, quant_type="nf4", blocksize=64, compress_statistics=double)
    decoded = functional.dequantize_4bit(theirs, state)
    same = torch.equal(codec.decode(ours), decoded) if not double else "other second level"
    sides = {
        "ours": lambda: codec.decode(ours),
        "torch": lambda: reference(ours, outputs, inputs, double),
        "bitsandbytes": lambda: functional.dequantize_4bit(theirs, state),
    }
    times = alternate(sides, rounds)
    each = {f"{name} ns": round(1e9 * statistics.median(seconds) / weight.numel(), 3) for name, seconds in times.items()}
    about = {"size": f"{outputs} x {inputs}", "scales": "int8, fp32" if double else "fp32", "bits": round(8 * ours.nbytes / weight.numel(), 3)}
    ratios = {"x bitsandbytes": round(ratio(times, "ours", "bitsandbytes"), 2), "x torch": round(ratio(times, "ours", "torch"), 2)}
    return {**about, **each, **ratios, "bitwise": str(same)}


def main() -> None:
    """Measure and print the table."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--rounds", type=int, default=9)
    options.add_argument("--threads", type=int, default=hardware.cpus())
    options.add_argument("--sizes", nargs="+", default=["576x1536", "2048x2048", "4096x4096"])
    options.add_argument("--json", action="store_true")
    args = options.parse_args()
    show = Show(json=args.json)
    torch.set_num_threads(args.threads)
    native.threads(args.threads)
    sizes = [tuple(map(int, size.split("x"))) for size in args.sizes]
    rows = [row(outputs, inputs, double, args.rounds) for outputs, inputs in sizes for double in (True, False)]
    about = machine() | {"threads": args.threads, "torch": torch.__version__, "bitsandbytes": bitsandbytes.__version__, "load": os.getloadavg()[0]}
    show.data(about | {"rows": rows})
    show.table(rows, tuple(rows[0]), ", ".join(f"{key} {value}" for key, value in about.items()))


if __name__ == "__main__":
    main()
