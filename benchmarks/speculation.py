"""Guesses by prompt lookup against none: text that repeats itself, and text that does not; batches of 1 to 16.

    make bench X=speculation

Both sides take turns; a ratio is the median of the rounds'. Tokens are compared: they must be the same.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch

import lilliput
from lilliput.base.hardware import cpus
from lilliput.base.show import Show
from lilliput.ops import native
from lilliput.serve.request import Sampling

LIST = "".join(f'{{"id": {i}, "name": "item {i}", "price": {i * 3 % 17}.50, "in_stock": true, "tags": ["a", "b"]}},\n' for i in range(8))
PROSE = ["The harbour was quiet that morning, and", "In the year the river froze, my grandfather", "Nobody in the office had ever asked why",
         "A good loaf of bread begins"]  # fmt: skip


def main() -> int:
    """Measure and print a table."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--model", default="smollm2-135m")
    options.add_argument("--draft", default="ngram")
    options.add_argument("--new", type=int, default=128)
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--json", action="store_true")
    args = options.parse_args()
    show, rows = Show(json=args.json), []
    torch.set_num_threads(cpus())
    native.threads(cpus())
    load = lambda draft: lilliput.load(args.model, runner="native", kv="fp16", draft=draft, sharing=False).engine
    sides = {"plain": load(""), args.draft: load(args.draft)}
    for kind in ("repeats", "prose"):
        for batch in (1, 4, 16):
            texts = [LIST[: -(i % 4) * 40 or None] if kind == "repeats" else PROSE[i % 4] for i in range(batch)]
            how = Sampling(args.new, ignore_eos=True, **({} if kind == "repeats" else {"temperature": 0.8, "seed": 7}))  # type: ignore[arg-type]
            times: dict[str, list[float]] = {name: [] for name in sides}
            for turn in range(args.rounds + 1):
                said: list[Any] = []
                for name, engine in sides.items():
                    ids = [engine.add(engine.tokenizer.encode(text, special=True), how) for text in texts]
                    done: list[Any] = []
                    while not all(answer.tokens for answer in engine._answers.values()):
                        done += engine.step()
                    start = time.perf_counter()
                    while engine.busy:
                        done += engine.step()
                    if turn:
                        times[name].append(time.perf_counter() - start)
                    said.append([[delta.token for delta in done if delta.id == id] for id in ids])
                assert said[0] == said[1], "guesses changed an answer"
            ratios = [plain / ours for plain, ours in zip(times["plain"], times[args.draft])]
            control = sides[args.draft].guesses.control
            rows.append({"text": kind, "batch": batch, "plain tok/s": round(batch * args.new / statistics.median(times["plain"])),
                         f"{args.draft} tok/s": round(batch * args.new / statistics.median(times[args.draft])), "x": f"{statistics.median(ratios):.2f}",
                         "rounds": " ".join(f"{x:.2f}" for x in ratios), "accepted so far": f"{control.accepted}/{control.proposed}"})  # fmt: skip
            show.line(f"{kind}, batch {batch}: {rows[-1]['x']}")
    show.data({"arguments": vars(args), "rows": rows})
    show.table(rows, tuple(rows[0]), f"{args.model}, {args.draft}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
