"""Rows of the memory plan for what is there beside activations: every parameter, buffer, gradient and moment, its bytes, place and codec.

They are read off the rig, so they cannot say anything else than what will be; what a room keeps beside them it states in `Rig.beside`. A room claims
an axis of a row by changing it with its act, and a row by bringing it; a second room that changes the same axis is refused, and both are named
(memory.plan.claim). Activations in a dtype that a room computes in (`Rig.computes`) are brought by it, too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from lilliput.base.protocols import Phase
from lilliput.memory.plan import Codec, Decision, MemoryPlan, Row

if TYPE_CHECKING:
    from lilliput.parallel.rig import Rig

CODECS: dict[str, Codec] = {"fp32": "exact", "bf16": "bf16", "codes": "codes"}  # of a home
AXES = ("place", "tier", "codec")
MOMENTS = 8  # bytes of optimizer state a trainable parameter


def rows(rig: Rig) -> dict[str, Row]:
    """"parameter NAME", "gradient NAME", "moments NAME" and "buffer NAME" -> what the rig says of it; and what lies beside them."""
    found: dict[str, Row] = {}
    for name, p in rig.model.named_parameters():
        home, stored = rig.home(name), p.numel() * rig.stored(name).itemsize
        found[f"parameter {name}"] = Row(stored, Decision(tier=home.tier, codec=CODECS[home.codec]))  # type: ignore[arg-type]
        if p.requires_grad:
            found[f"gradient {name}"] = Row(stored, Decision(tier=home.states))  # type: ignore[arg-type]
            found[f"moments {name}"] = Row(MOMENTS * p.numel(), Decision(tier=home.states))  # type: ignore[arg-type]
    return found | {f"buffer {name}": Row(b.nbytes) for name, b in rig.model.named_buffers()} | dict(rig.beside)


def claimed(before: MemoryPlan, room: str, rig: Rig) -> MemoryPlan:
    """The rows after a room's act: what it changed or brought is its own. UserError when another room has changed that already."""
    now = rows(rig)
    plan = replace(before, rows={name: before.rows.get(name, replace(row, claims=(("row", room),))) for name, row in now.items()})
    changes: dict[tuple[tuple[str, str], ...], list[str]] = {}
    for name, row in now.items():
        old = plan.rows[name].decision
        changed = tuple((axis, getattr(row.decision, axis)) for axis in AXES if getattr(row.decision, axis) != getattr(old, axis))
        if changed:
            changes.setdefault(changed, []).append(name)
    for changed, names in changes.items():
        plan = plan.claim(room, names, **dict(changed))
    return replace(plan, rows={name: replace(row, bytes=now[name].bytes) for name, row in plan.rows.items()})


def table(rig: Rig, acts: Iterable[tuple[Phase, str, Callable[[Rig], Rig]]], evicting: Iterable[str]) -> tuple[Rig, MemoryPlan, dict[str, str]]:
    """The rig after these acts, the rows with each act's claims, and dtype of activations -> the room that computes in it.

    evicting: rooms that send moments away when their room is needed."""
    plan, computes = MemoryPlan("", "", rows(rig)), dict.fromkeys(rig.computes, "")
    for _, name, act in acts:
        rig = act(rig)
        plan = claimed(plan, name, rig)
        computes |= {dtype: name for dtype in rig.computes if dtype not in computes}
    moments = [name for name in plan.rows if name.startswith("moments")]
    for name in evicting:
        plan = plan.claim(name, moments, place="page")
    return rig, plan, computes


def joined(plan: MemoryPlan, room: str, beside: MemoryPlan, computes: Mapping[str, str]) -> MemoryPlan:
    """A plan of activations with the rows of a table; `room` decided of those that are not kept."""
    own = {n: row for n, row in plan.rows.items() if n.partition(" ")[0].isdigit()}  # a plan that a run began with has the others too
    for name, row in own.items():
        brought = {"row": computes[row.dtype]} if row.dtype in computes else {}
        decided = {"place": room} if room and row.decision.away else {}
        own[name] = replace(row, claims=tuple(sorted((dict(row.claims) | brought | decided).items())))
    return replace(plan, rows={**beside.rows, **own})
