"""FP8 training: where a constant exponent works, and which exponents tensors want; on the GPTs of `lilliput papers run fp8`.

    make bench X=fp8 ARGS="interval --out /tmp/fp8"      held-out loss over fp32's for b = -8..16, three sizes; CSV, PNG
    make bench X=fp8 ARGS="biases --out /tmp/fp8"        AMAX's b of every weight, activation and gradient through training; CSV, PNG
    make bench X=fp8 ARGS="text --path tinyshakespeare/input.txt"    3 seeds on characters of a text: fp32, amax, unscaled

One thread. Losses depend on the machine in the last bits, which training spreads to about 0.1 %.
"""

from __future__ import annotations

import argparse
import csv
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from lilliput.base.show import Show
from lilliput.papers import fp8 as paper

SIZES = {"2 layers, 64 wide": (2, 64), "3 layers, 96 wide": (3, 96), "6 layers, 160 wide": (6, 160)}


def interval(out: Path, steps: int, show: Show, sizes: int) -> list[dict[str, Any]]:
    """Rows of (size, b, loss over fp32's), and the valid b of each size."""
    rows, figure = [], _figure()
    for name, (layers, dim) in list(SIZES.items())[:sizes]:
        train = lambda rooms, layers=layers, dim=dim: paper.trained(rooms, 0, layers, dim, steps)
        plain = train({})
        own = train(paper.room()) / plain
        found = {b: train(paper.room(b)) / plain for b in range(-8, 17, 2)}
        valid = [b for b, ratio in found.items() if ratio <= paper.KEEPS]
        show.line(f"{name}: fp32 {plain:.4f}, amax {own:.4f} of it; b within 0.5 %: {f'{valid[0]} to {valid[-1]}' if valid else 'none'}")
        rows += [{"size": name, "b": b, "over fp32": round(ratio, 4)} for b, ratio in (("amax", own), *found.items())]
        figure.axes[0].plot(list(found), [100 * (ratio - 1) for ratio in found.values()], "o-", label=f"{name} (amax {100 * (own - 1):+.2f} %)")
    figure.axes[0].axhline(0.5, color="grey", linewidth=1)
    figure.axes[0].set(xlabel="b, the same for every tensor", ylabel="held-out loss over fp32's, %", yscale="symlog", title="CSCALE: where one exponent works")
    _save(out, "interval", rows, figure)
    return rows


def biases(out: Path, steps: int, show: Show) -> list[dict[str, Any]]:
    """Counts of (kind, b) in the first and the last tenth of training, all Linears together; of each Linear: the run's own biases.csv and biases.png."""
    held: list[Any] = []
    rooms = {"fp8": paper.room()["fp8"].model_copy(update={"histogram": True})}
    paper.trained(rooms, 0, steps=steps, watch=lambda rig, done: held.append(rig) if done == steps - 1 else None)
    (out / "linears").mkdir(parents=True, exist_ok=True)
    show.line(held[0].exports["fp8"](held[0], out / "linears"))
    with (out / "linears" / "biases.csv").open() as file:
        notes = [{name: int(value) if value.lstrip("-").isdigit() else value for name, value in row.items()} for row in csv.DictReader(file)]
    rows, figure = [], _figure(3)
    for axes, kind in zip(figure.axes, ("weights", "activations", "gradients"), strict=True):
        for name, first, last in (("first tenth", 0, steps // 10), ("last tenth", steps * 9 // 10, steps)):
            counts: Counter[int] = Counter()
            for note in notes:
                if note["tensor"] == kind and first <= note["first step"] < last:
                    counts[note["b"]] += note["count"]
            rows += [{"tensor": kind, "when": name, "b": b, "count": counts[b]} for b in sorted(counts)]
            axes.bar([b + (0.2 if name[0] == "l" else -0.2) for b in counts], counts.values(), width=0.4, label=name)
            show.line(f"{kind}, {name}: b from {min(counts)} to {max(counts)}")
        axes.set(title=kind, xlabel="b = floor(log2(largest / amax))")
    _save(out, "biases", rows, figure)
    return rows


def text(path: Path, steps: int, show: Show) -> list[dict[str, Any]]:
    """The same three runs on the characters of a text."""
    words = path.read_text()
    ids = {c: i for i, c in enumerate(sorted(set(words)))}
    tokens = torch.tensor([ids[c] for c in words])
    paper.SYMBOLS, paper.text = len(ids), lambda count: tokens[:count]  # type: ignore[assignment]
    rows = []
    for seed in paper.SEEDS:
        plain, own, unscaled = (paper.trained(rooms, seed, steps=steps) for rooms in ({}, paper.room(), paper.room(0)))
        rows.append({"seed": seed, "fp32": round(plain, 4), "amax / fp32": round(own / plain, 4), "unscaled / fp32": round(unscaled / plain, 4)})
    show.line(f"amax {sum(float(r['amax / fp32']) for r in rows) / len(rows):.4f}, unscaled {sum(float(r['unscaled / fp32']) for r in rows) / len(rows):.4f}")
    return rows


def _figure(panels: int = 1) -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot.subplots(1, panels, figsize=(7 if panels == 1 else 11, 4), layout="constrained")[0]


def _save(out: Path, name: str, rows: list[dict[str, Any]], figure: Any) -> None:
    out.mkdir(parents=True, exist_ok=True)
    for axes in figure.axes:
        axes.grid(alpha=0.25)
        axes.legend(frameon=False)
    figure.savefig(out / f"{name}.png", dpi=120)
    with (out / f"{name}.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def main() -> int:
    """Measure and print a table."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("what", choices=("interval", "biases", "text"))
    options.add_argument("--out", type=Path, default=Path("fp8"))
    options.add_argument("--path", type=Path, help="a text, for `text`")
    options.add_argument("--sizes", type=int, default=len(SIZES), help="how many models, smallest first, for `interval`")
    options.add_argument("--steps", type=int, default=paper.STEPS)
    options.add_argument("--json", action="store_true")
    args = options.parse_args()
    show = Show(json=args.json)
    torch.set_num_threads(1)
    if args.what == "text":
        rows = text(args.path, args.steps, show)
    else:
        rows = biases(args.out, args.steps, show) if args.what == "biases" else interval(args.out, args.steps, show, args.sizes)
    show.data({"what": args.what, "steps": args.steps, "rows": rows})
    show.table(rows, tuple(rows[0]), f"{args.what}, {args.steps} steps")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
