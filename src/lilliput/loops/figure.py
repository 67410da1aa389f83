"""The loss curve of a run, where people look rather than read: PNG and SVG from metrics.jsonl."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lilliput.base import records


def loss_curve(rows: Sequence[dict[str, Any]], folder: Path, title: str) -> list[Path]:
    """Write loss.png and loss.svg: training loss per step, its running mean, evaluation points. Returns the paths."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    steps = [r["step"] for r in rows if "loss" in r]
    losses = [r["loss"] for r in rows if "loss" in r]
    if not steps:
        return []
    width = max(1, len(losses) // 40)
    smooth = [sum(losses[max(0, i - width + 1) : i + 1]) / (i + 1 - max(0, i - width + 1)) for i in range(len(losses))]
    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    axes.plot(steps, losses, color="#b9cbe0", linewidth=1, label="training loss")
    axes.plot(steps, smooth, color="#1f5a96", linewidth=1.8, label=f"mean of {width} steps")
    held = [(r["step"], r["eval_loss"]) for r in rows if "eval_loss" in r]
    if held:
        axes.plot(*zip(*held, strict=True), "o", color="#c2541b", label="held-out loss")
    axes.set(xlabel="step", ylabel="loss (nats per token)", title=title)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    paths = [folder / "loss.png", folder / "loss.svg"]
    for path in paths:
        records.picture(path, figure)
    pyplot.close(figure)
    return paths
