"""The ladder: the largest model that trains in one fixed device and one fixed host, section by section.

    python benchmarks/ladder.py [--device 32MB] [--host 1GB] [--picture benchmarks/ladder.svg]

One family of decoders that grow in width and depth together: size k has k blocks of width 32 k, 12,288 k^3 weights and a little. For
each rung the largest size whose predicted bytes fit is built and trained two steps with the device's bytes counted and enforced
(memory.meter); the next size is refused by the prediction before anything is made. No disk: it would only move the host's bound.
"""

from __future__ import annotations

import argparse
import itertools
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from lilliput.base import records
from lilliput.base.hardware import detect
from lilliput.base.protocols import Site
from lilliput.base.show import Show, parse_size, size
from lilliput.data.batch import MicroBatch
from lilliput.memory.meter import Meter
from lilliput.memory.planned import Planned
from lilliput.models.decoder import Decoder, init_tensor
from lilliput.models.spec import DecoderSpec
from lilliput.parallel.rig import Rig, assemble, outline
from lilliput.plan.ledgers import training_ledger
from lilliput.train.infinity import Infinity
from lilliput.train.offload import Offload
from lilliput.train.qlora import Qlora
from lilliput.train.remat import Remat, under

TOKENS, VOCAB, LARGEST, STEPS = 256, 256, 40, 2
LOSS = 8  # bytes of the sum over micro-batches
ADAMW = {"betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
AGAIN: dict[str, Any] = {"remat": Remat(every=1)}
RUNGS: dict[str, dict[str, Any]] = {
    "nothing": {}, "checkpointing": AGAIN, "+ offload": {**AGAIN, "offload": Offload()}, "+ infinity": {**AGAIN, "infinity": Infinity()},
    "+ tiling": {**AGAIN, "infinity": Infinity(tiles=4)}, "+ QLoRA": {**AGAIN, "infinity": Infinity(tiles=4), "qlora": Qlora(rank=2, double=False)},
}  # fmt: skip


def spec(k: int) -> DecoderSpec:
    """Size k of the family."""
    width = 32 * k
    return DecoderSpec("gpt2", vocab=VOCAB, dim=width, layers=k, heads=k, kv_heads=k, head_dim=32, ffn=4 * width, context=TOKENS, tied=True, norm="layer",
                       positions="learned", activation="gelu", qkv_bias=True, o_bias=True, mlp_bias=True)  # fmt: skip


def job(k: int) -> tuple[Decoder, dict[str, Any]]:
    """The model on meta, and what outline and assemble take."""
    with torch.device("meta"):
        model = Decoder(spec(k))
    site = Site(hardware=detect(), sequences=1, tokens=TOKENS)
    init = lambda name, shape, seed: init_tensor(name, shape, seed, spec(k))
    return model, {"site": site, "device": torch.device("cpu"), "seed": 0, "dtype": "fp32", "read": None, "init": init, "clip": 1.0}


def predicted(k: int, rooms: dict[str, Any]) -> tuple[int, int]:
    """Bytes of the device, to the byte but for the room of visitors, which is counted as full, and of the host; nothing is made."""
    model, given = job(k)
    rig = outline(model, rooms, **given)
    if not isinstance(rig.objective, Planned):
        rig = under(rig, lambda trace: ("keep everything", {}))
    (ready,) = rig.objective.ready.values()
    ledger = training_ledger(rig.facts, rig.site, rooms, "fp32")
    norms = 4 * len(rig.trainable()) if rig.summon and rig.leaving() else 0  # of gradients that have left
    return rig.standing() + ready.simulation.peak["device"] + LOSS + norms, ledger.peak("host")[0]


def away(rig: Rig) -> list[torch.Tensor]:
    """What a rig has taken of the host."""
    optimizer = rig.optimizer
    if hasattr(optimizer, "held"):
        return list(optimizer.held())
    residents = getattr(rig.summon, "__self__", None)
    tiers = {id(t): t for t in (*getattr(optimizer, "tiers", {}).values(), *([residents.tier] if residents else []))}
    return [t for tier in tiers.values() for t in tier.tensors.values()]


def train(k: int, rooms: dict[str, Any], device: int) -> tuple[Rig, int, list[float]]:
    """(rig, peak of the device, losses) of a few steps; DoesNotFit at the first byte above the budget."""
    model, given = job(k)
    rig = assemble(model, rooms, optimizer=ADAMW, **given)
    draw, losses = torch.Generator().manual_seed(0), []
    visiting = {n: p for n, p in rig.model.named_parameters() if rig.home(n).tier != "device"}
    here = [p for n, p in rig.model.named_parameters() if n not in visiting]
    moments = [] if rig.leaving() else list(rig.optimizer.state().values())
    tokens = lambda: torch.randint(0, VOCAB, (1, TOKENS), generator=draw)
    batches = [MicroBatch(tokens(), tokens(), TOKENS) for _ in range(STEPS)]
    known = [*away(rig), *(t for micro in batches for t in (micro.tokens_BT, micro.targets_BT))]
    meter = Meter(known=known, budget={"device": device}, watch=visiting.values())
    meter.adopt([*here, *rig.model.buffers(), *moments])
    for step, micro in enumerate(batches):
        with meter:
            losses.append(rig.step([micro], 1e-3, step).mean)
    return rig, meter.peak, losses


def climb(device: int, most: int, show: Show) -> Iterator[dict[str, Any]]:
    """One row a rung."""
    k = 1
    for name, rooms in RUNGS.items():
        found, refused = (0, (0, 0)), ""
        for tried in range(k, LARGEST + 1):
            needs = predicted(tried, rooms)
            if needs[0] > device or needs[1] > most:
                refused = f"k={tried} refused: {size(needs[0])} on the device, {size(needs[1])} on the host"
                break
            found = tried, needs
        assert found[0], f"{name}: not even k={k} fits"
        k, begin = found[0], time.perf_counter()
        rig, peak, losses = train(k, rooms, device)
        seconds = time.perf_counter() - begin
        count, taken = rig.facts.parameters, sum(t.nbytes for t in away(rig))
        assert peak <= found[1][0] <= device and taken <= most, f"{name}: {peak} of {found[1]}, host {taken}"
        show.line(f"{name}: k={k}, {count:,} weights; device {peak:,} metered, {found[1][0]:,} predicted; host {taken:,} taken, {found[1][1]:,} predicted; "
                  f"losses {losses[0]:.4f} {losses[-1]:.4f}; {seconds:.1f} s; {refused}")  # fmt: skip
        yield {"rung": name, "weights": count, "metered": peak, "predicted": found[1][0]}


def draw(rows: list[dict[str, Any]], path: Path, title: str) -> None:
    """Bars of the weights of each rung, logarithmic."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 3.6), layout="constrained")
    bars = axes.bar([row["rung"] for row in rows], [row["weights"] / 1e6 for row in rows], color="#1f5a96")
    axes.bar_label(bars, [f"{row['weights'] / 1e6:.3g} M" for row in rows], fontsize="small")
    axes.set(yscale="log", ylabel="million weights", title=title)
    axes.grid(axis="y", alpha=0.25)
    records.picture(path, figure)
    pyplot.close(figure)


def main() -> None:
    """Climb, print, draw."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="32MB")
    parser.add_argument("--host", default="1GB")
    parser.add_argument("--picture", type=Path, default=None)
    given, show = parser.parse_args(), Show()
    show.line(f"load {os.getloadavg()[0]:.2f}")
    rows = list(climb(parse_size(given.device), parse_size(given.host), show))
    sizes = [row["weights"] for row in rows]
    grows = all(a < b for a, b in itertools.pairwise(sizes))
    show.line(f"{'strictly growing' if grows else 'NOT strictly growing'}, {sizes[-1] / sizes[0]:.1f} times; load {os.getloadavg()[0]:.2f}")
    if given.picture is not None:
        draw(rows, given.picture, f"the largest model that trains in {given.device} of device and {given.host} of host")


if __name__ == "__main__":
    main()
