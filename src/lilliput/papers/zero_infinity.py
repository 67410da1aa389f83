"""ZeRO-Infinity: every state of ZeRO-3 may lie on the device, the host or NVMe; a prefetcher overlaps disk, link and compute,
every parameter is split over all ranks so that their links add up, and big layers run as a sequence of tiles.

The run computes the paper's table of memory needs, then trains a decoder with everything on disk beside the plain run: bits, the bytes
of parameters that the device ever held, and the files.

Rajbhandari et al. 2021, SC 2021, arXiv 2104.07857.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from lilliput.papers.paper import Finding, Paper

SIZES = ((80, 10240), (100, 20480), (128, 25600), (195, 65536), (315, 163840))  # (layers, hidden) of figure 2a
STEPS = 5


def run() -> Finding:
    """The table, and two runs of five steps; a few seconds on one core."""
    from lilliput.plan.scale import Scale, efficiency

    rows = [
        {
            "parameters, trillions": round(s.parameters / 1e12, 2), "states, TiB": round(s.states / 2**40, 2),
            "checkpoints, TiB": round(s.checkpoints / 2**40, 2), "largest operator, GiB": round(s.working_states / 2**30, 2),
        }
        for s in (Scale(*size) for size in SIZES)
    ]  # fmt: skip
    half = efficiency(Scale(1, 1, sequences=1).intensity["parameters"], 70e9)
    with tempfile.TemporaryDirectory() as folder:
        (losses, weights, rig), (expected, plain, _) = _trained(Path(folder)), _trained(None)
        same = losses == expected and all(bool((weights[n] == plain[n]).all()) for n in plain)
        count = sum(weight.numel() for weight in plain.values())
        visits = rig.optimizer.residents.peak
        files = sum(path.stat().st_size for path in Path(folder).iterdir())
        for tier in rig.optimizer.tiers.values():
            tier.close()
    summary = (
        f"a model of {rows[2]['parameters, trillions']} trillion needs {rows[2]['states, TiB']} TiB, and 70 GB/s leave {half:.1%} of the peak; "
        f"with everything on disk {STEPS} steps are {'bitwise' if same else 'NOT'} the plain run's, {16 * count / visits:.1f} times the bytes "
        f"that the device ever held of them, in files of {files / count:.1f} bytes a parameter"
    )
    return Finding(summary, tuple(rows), same and visits <= 16 * count / 4)


def _trained(folder: Path | None) -> tuple[list[float], dict[str, Any], Any]:
    """(losses, weights, rig) of a decoder after a few steps; folder: where all of it lies, None = in memory."""
    import torch

    from lilliput.data.batch import MicroBatch
    from lilliput.models.sizes import PRESETS
    from lilliput.papers import small
    from lilliput.train.infinity import Infinity

    spec = PRESETS["tiny"]
    rooms: dict[str, Any] = {"infinity": Infinity(parameters="disk", optimizer="disk", folder=str(folder), tiles=1)} if folder else {}
    rig = small.rig(spec, rooms, sequences=2, tokens=32)
    draw = torch.Generator().manual_seed(0)
    tokens = lambda: torch.randint(0, spec.vocab, (2, 32), generator=draw)
    batches = [MicroBatch(tokens(), tokens(), 64) for _ in range(STEPS)]
    losses = [rig.step([micro], 1e-2, step).mean for step, micro in enumerate(batches)]
    return losses, {name: rig.weight(rig, name).clone() for name in rig.facts.shapes}, rig


PAPER = Paper(
    name="zero-infinity",
    system="ZeRO-Infinity",
    title="ZeRO-Infinity: Breaking the GPU Memory Wall for Extreme Scale Deep Learning",
    authors="Rajbhandari et al.",
    year=2021,
    where="SC 2021, arXiv 2104.07857",
    claim="32 trillion parameters fit on 32 DGX-2 nodes (512 V100), 50x what 3D parallelism holds, at over 25 petaFLOP/s.",
    measured=(
        "a model of 1.01 trillion needs 18.31 TiB, and 70 GB/s leave 50.6% of the peak; "
        "with everything on disk 5 steps are bitwise the plain run's, 4.9 times the bytes that the device ever held of "
        "them, in files of 29.0 bytes a parameter"
    ),
    lacks="several ranks: parameters split over all of them, so that their links add up",
    switches=("infinity.parameters=disk", "infinity.optimizer=disk", "infinity.folder=scratch"),
    run=run,
)
