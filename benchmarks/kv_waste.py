"""How much of the cache holds live tokens, and what sharing saves: request lengths through the real scheduler and block pool, no model.

    make bench X=kv_waste            (ARGS="--requests 1000" by default; --trace FILE.csv reads prompt and answer tokens from its first two columns)

The default trace is log-normal with ShareGPT's means of the PagedAttention paper (161.31 prompt, 337.99 answer tokens). Four ways to take
blocks at admission; block sizes are arithmetic on the same replay. Sharing is counted against a brute-force count of distinct histories
at every step: a difference is an error (exit code 1). Beams choose among candidates of random logits.
"""

from __future__ import annotations

import argparse
import csv
import sys
from pathlib import Path

from lilliput.base.show import Show
from lilliput.papers import paged_attention as paper


def read(path: str, count: int) -> paper.Lengths:
    """The first requests of a file that fit into the context."""
    with Path(path).open(newline="") as file:
        rows = [(int(row[0]), int(row[1])) for row in csv.reader(file) if row[0].isdecimal()]
    return [(p, n) for p, n in rows if p > 0 and n > 0 and p + n <= paper.CONTEXT][:count]


def main() -> int:
    """Replay, print, and fail where shared blocks are not the distinct histories or more than 4 % of the cache is wasted."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--trace", default="")
    options.add_argument("--requests", type=int, default=1000)
    options.add_argument("--sharing", type=int, default=200, help="requests whose sharing is counted")
    options.add_argument("--json", action="store_true")
    args = options.parse_args()
    show = Show(json=args.json)
    trace = read(args.trace, args.requests) if args.trace else paper.lengths(paper.SHAREGPT, args.requests)
    prompt, new = (sum(column) / len(trace) for column in zip(*trace))
    waste = []
    for way in ("needed", "oracle", "pow2", "max"):
        seen = paper.replay(trace, way)
        sizes = {f"blocks of {size}, wasted %": round(100 * (1 - used), 1) for size, used in seen.by_block.items()} if way == "needed" else {}
        waste.append({"taken at admission": way, "live %": round(100 * seen.used, 1), "published %": paper.ORCA[way],
                      "requests at once": round(seen.running, 1), "steps": seen.steps, **sizes})  # fmt: skip
    saved = []
    for name, means in (("Alpaca", paper.ALPACA), ("ShareGPT", paper.SHAREGPT)):
        small = paper.lengths(means, args.sharing if name == "Alpaca" else args.sharing // 5)
        for kind, count in (("parallel", paper.parallel), ("beam", paper.beams)):
            for width in (2, 4, 6):
                seen = count(small, width)
                published = paper.SAVED[kind, width] if name == "Alpaca" else "16.2-30.5" if kind == "parallel" else "44.3-66.3"
                saved.append({"lengths": name, "answers": f"{kind} {width}", "saved %": round(100 * seen.saved, 2), "published %": published,
                              "blocks x steps": seen.shared, "distinct histories": seen.oracle})  # fmt: skip
    show.data({"requests": len(trace), "prompt": prompt, "answer": new, "waste": waste, "sharing": saved})
    show.table(waste, tuple(waste[0]), f"{len(trace)} requests, mean {prompt:.0f} tokens of prompt and {new:.0f} of answer, 1,024 blocks of 16")
    show.table(saved, tuple(saved[0]), "blocks that sharing saves")
    return int(waste[0]["live %"] < 96 or any(row["blocks x steps"] != row["distinct histories"] for row in saved))


if __name__ == "__main__":
    sys.exit(main())
