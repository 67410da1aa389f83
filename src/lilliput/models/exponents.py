"""Exponents that FP8 chose, counted: for each Linear, its weights, activations and gradients, how often which b, and when.

Time is kept in at most 64 spans of equal length; when they are full, two become one. Operations that run again (remat) are not counted again.
"""

from __future__ import annotations

import csv
import math
from collections import Counter
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from lilliput.base import records
from lilliput.ops.fp8 import Coded

SPANS = 64
KINDS = ("weights", "activations", "gradients")


class Exponents:
    """`clock.step` is the step that is running."""

    def __init__(self, clock: Any) -> None:
        self.clock, self.width = clock, 1  # width: steps of a span
        self.counts: Counter[tuple[int, str, str, int]] = Counter()  # (span, Linear, kind, b) -> times

    def note(self, path: str, kind: str, coded: Coded) -> None:
        """Count one tensor; what a plan is made with (a fake one) and what is not finite are left out."""
        if type(coded.unscale) is not Tensor:
            return
        with _disable_current_modes():  # no memory plan sees it
            unscale = float(coded.unscale)
        if not math.isfinite(unscale):
            return
        while self.clock.step // self.width >= SPANS:
            self.width *= 2
            halved: Counter[tuple[int, str, str, int]] = Counter()
            for (span, *rest), times in self.counts.items():
                halved[(span // 2, *rest)] += times  # type: ignore[index]
            self.counts = halved
        self.counts[self.clock.step // self.width, path, kind, round(-math.log2(unscale))] += 1

    def write(self, folder: Path) -> str:
        """biases.csv, a line each (steps, Linear, kind, b), and biases.png: a panel a kind, a row a Linear, the share of each b. Answers the ranges."""
        rows = sorted(self.counts.items())
        with (folder / "biases.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(("first step", "last step", "linear", "tensor", "b", "count"))
            writer.writerows((span * self.width, (span + 1) * self.width - 1, *rest, times) for (span, *rest), times in rows)
        self.draw(folder / "biases.png")
        seen = {kind: [b for _, _, k, b in self.counts if k == kind] for kind in KINDS}
        ranges = ", ".join(f"{kind} {min(found)} to {max(found)}" for kind, found in seen.items() if found)
        return f"exponents of FP8: {ranges} ({folder.name}/biases.csv)"

    def draw(self, path: Path) -> None:
        """The picture."""
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot

        paths = list(dict.fromkeys(p for _, p, _, _ in self.counts))
        figure, panels = pyplot.subplots(1, len(KINDS), figsize=(13, 2 + 0.16 * len(paths)), layout="constrained", sharey=True)
        for axes, kind in zip(panels, KINDS, strict=True):
            times = Counter[tuple[str, int]]()
            for (_, p, k, b), count in self.counts.items():
                if k == kind:
                    times[p, b] += count
            low, high = (edge(b for _, b in times) if times else 0 for edge in (min, max))
            share = [[times[p, b] / max(1, sum(c for (q, _), c in times.items() if q == p)) for b in range(low, high + 1)] for p in paths]
            axes.imshow(share, aspect="auto", cmap="Blues", vmin=0, vmax=1, extent=(low - 0.5, high + 0.5, len(paths) - 0.5, -0.5), interpolation="nearest")
            axes.set(title=kind, xlabel="b = floor(log2(largest / amax))")
        panels[0].set_yticks(range(len(paths)), paths, fontsize=6)
        records.picture(path, figure)
        pyplot.close(figure)
