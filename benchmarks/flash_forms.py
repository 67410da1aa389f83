"""The forward pass of attention by tiles (FlashAttention-2), on the fly in strips, and with all scores in memory first (E.T.).

    make bench X=flash_forms ARGS="--rounds 9"

What `auto` in lilliput.ops.flash chooses by: times are ratios to tiles, the sides take turns, figures are medians.
"""

from __future__ import annotations

import argparse
import statistics
from functools import partial

import torch

from lilliput.base.hardware import cpus
from lilliput.base.show import Show
from lilliput.loops.bench import alternate, machine, ratio
from lilliput.ops import flash, native

LENGTHS = (16, 32, 64, 128, 256, 512, 1024, 2048)


def main() -> int:
    """Measure and print a table."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--rounds", type=int, default=9)
    options.add_argument("--threads", type=int, default=cpus())
    options.add_argument("--json", action="store_true")
    args = options.parse_args()
    show, rows = Show(json=args.json), []
    native.threads(args.threads)
    for causal, heads in ((False, 12), (True, 9)):
        for length in LENGTHS:
            q, k, v = (torch.randn(max(1, 256 // length), length, heads, 64).transpose(1, 2) for _ in range(3))
            times = alternate({form: partial(flash.attention, q, k, v, causal=causal, form=form) for form in ("tiled", "strip", "partial")}, args.rounds)
            rows.append({"causal": causal, "heads": heads, "keys": length, "tiled us": round(statistics.median(times["tiled"]) * 1e6)}
                        | {f"{form} x": f"{ratio(times, form, 'tiled'):.2f}" for form in ("strip", "partial")})  # fmt: skip
    show.data({"machine": machine(), "rows": rows})
    show.table(rows, tuple(rows[0]), ", ".join(f"{key} {value}" for key, value in machine().items()))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
