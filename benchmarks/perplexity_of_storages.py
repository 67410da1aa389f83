"""What storing weights, rows and the cache in fewer bits costs: perplexity of the native runner in each storage.

    make bench X=perplexity_of_storages ARGS="wiki.test.raw --windows 40"

The first row is the eager model in fp32. `file` of a GGUF multiplies its own 4-bit blocks by int8 rows: its ratio to fp32, which has the
same blocks dequantised, is what int8 rows cost. KV codecs stand beside fp32 weights; `before RoPE`: keys are stored so and rotated when
read.
`--only nf4 "kv int8"` runs the storages whose names contain one of these words, beside fp32.
Deterministic: figures depend on the machine by rounding alone.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator
from functools import partial

import torch

from lilliput.base.hardware import cpus
from lilliput.base.show import Show
from lilliput.loops.evaluate import perplexity, read_text
from lilliput.models import hub
from lilliput.models.load import load_model, open_checkpoint
from lilliput.models.native import NativeDecoder
from lilliput.ops import native, paged


def sides(name: str) -> Iterator[tuple[str, Callable[[], object]]]:
    """(what, what makes its model): only one is in memory."""
    yield "fp32, eager", lambda: load_model(name, "cpu")[0]
    checkpoint = open_checkpoint(hub.locate(name))
    decoder = partial(NativeDecoder, checkpoint.spec, checkpoint.read, checkpoint.layout, checkpoint.packed)
    for weights in ("file", "fp16", "w8", "q4", "nf4", "fp8", "fp8_rows"):
        yield f"weights {weights}", partial(decoder, weights)
    for kv in paged.CODECS[1:]:
        for before in (False, True):
            yield f"kv {kv}" + (", keys before RoPE" if before else ""), partial(decoder, "fp32", kv=kv, rotate_on_read=before)


def main() -> int:
    """Measure and print a table."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("text", help="a text file; .raw is read as WikiText's rows")
    options.add_argument("--model", default="smollm2-135m")
    options.add_argument("--window", type=int, default=1024)
    options.add_argument("--windows", type=int, default=40)
    options.add_argument("--only", nargs="+", default=[""], metavar="WORD")
    options.add_argument("--json", action="store_true")
    args = options.parse_args()
    show = Show(json=args.json)
    torch.set_num_threads(cpus())
    native.threads(cpus())
    rows, first, ids = [], 0.0, []
    for what, make in sides(args.model):
        if rows and not any(word in what for word in args.only):
            continue
        model = make()
        ids = ids or load_model(args.model, "cpu")[1].encode(read_text(args.text))
        value = perplexity(model, ids, window=args.window, batch=1, limit=args.windows, show=show)  # type: ignore[arg-type]
        first = first or value.nll
        rows.append({"storage": what, "perplexity": f"{math.exp(value.nll):.3f}", "to fp32": f"{math.exp(value.nll - first):.4f}"})
    show.data({"model": args.model, "windows": args.windows, "rows": rows})
    show.table(rows, tuple(rows[0]), f"{args.model}, {args.windows} windows of {args.window}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
