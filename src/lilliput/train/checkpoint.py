"""Checkpoints: everything a run needs to go on bitwise, written whole or not at all.

checkpoints/step-000050/ holds weights.safetensors (what learns), optimizer.safetensors (both moments), state.json (step,
data position, digests) and checksums.json. The folder appears by one rename; the run's pointer moves after it. Dropout
and rounding draw from counters keyed by (seed, step), so no RNG state has to be kept. The last two checkpoints stay.
What a room keeps on disk itself (rig.keeper) is not copied: the checkpoint names its generation by `tag`.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lilliput.base import records
from lilliput.base.errors import UserError

if TYPE_CHECKING:
    from lilliput.parallel.rig import Rig

KEPT = 2


def save(run: records.Run, rig: Rig, step: int, data: Mapping[str, Any], identity: Mapping[str, str]) -> Path:
    """Write a checkpoint after `step` finished steps and point the run at it. `identity`: digests that must match on resume."""
    from safetensors.torch import save_file

    assert rig.optimizer is not None, "a rig with an optimizer is saved"
    folder = run.folder / "checkpoints" / f"step-{step:06d}"
    folder.parent.mkdir(exist_ok=True)
    with records.atomic_folder(folder) as building:
        tag = f"step {step} {os.urandom(8).hex()}"
        if rig.keeper is not None:
            rig.keeper.save(building, tag)
        else:
            save_file({n: p.detach().contiguous() for n, p in rig.trainable().items()}, building / "weights.safetensors")
            save_file(rig.optimizer.state(), building / "optimizer.safetensors")
        state = {"step": step, "tag": tag, "optimizer_steps": rig.optimizer.steps, "data": dict(data), "identity": dict(identity)}
        records.write_json(building / "state.json", state)
    run.point(folder.name)
    older = sorted(p for p in folder.parent.glob("step-*") if p.name != folder.name)
    for old in older[: max(0, len(older) + 1 - KEPT)]:
        shutil.rmtree(old)
    return folder


def latest(run: records.Run) -> Path | None:
    """The folder of the newest complete checkpoint, verified by its checksums; None when the run has none."""
    name = run.pointer()
    if not name:
        return None
    folder = run.folder / "checkpoints" / name
    if not folder.is_dir():
        raise UserError(f"checkpoint {folder} is gone", "the run points at it", f"delete {run.folder} to start over")
    records.verify(folder)
    return folder


def identity(folder: Path) -> tuple[int, dict[str, str]]:
    """(finished steps, digests) of a checkpoint, without torch."""
    state = records.read_json(folder / "state.json")
    return state["step"], state["identity"]


def restore(folder: Path, rig: Rig) -> dict[str, Any]:
    """Load weights and moments into the rig; returns the data position. Shapes that differ are a UserError."""
    import torch
    from safetensors.torch import load_file

    assert rig.optimizer is not None, "a rig with an optimizer is restored"
    state = records.read_json(folder / "state.json")
    if rig.keeper is not None:
        rig.keeper.restore(folder, state["tag"], state["optimizer_steps"])
        return state["data"]
    weights = load_file(folder / "weights.safetensors")
    for name, parameter in rig.trainable().items():
        if name not in weights or weights[name].shape != parameter.shape:
            found = list(weights[name].shape) if name in weights else "nothing"
            raise UserError(f"checkpoint {folder} is of another model", f"{name}: needs {list(parameter.shape)}, has {found}", "choose another out folder")
        with torch.no_grad():
            parameter.copy_(weights[name])
    rig.optimizer.restore(load_file(folder / "optimizer.safetensors"), state["optimizer_steps"])
    return state["data"]
