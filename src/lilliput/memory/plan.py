"""The memory plan: one row a tensor, place x codec, and who asked for it. No torch.

    place    keep (in a tier) | recompute | page (out of the device tier and back)
    codec    exact | bf16 | fp8 | nf4: how the bytes lie while nobody computes with them (memory.codecs); a page is exact or bf16

Rooms claim rows before a planner fills the rest; two claims on one axis of one tensor are a refusal that names both. The
plan is plain JSON, one line a row, so two plans can be compared with diff, and it belongs to one trace (its digest).
Only `simulate` says what a plan costs and whether it is legal; only `execute` carries it out.

A span (in, out) says when a tensor that left comes back: before the backward pass asks for saved tensor `in`, until it
asks for saved tensor `out` (None: until its last use). Without spans it comes back when it is asked for.
"""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from lilliput.base.errors import UserError
from lilliput.base.ledger import Tier
from lilliput.ops.four_bits import NF4_BLOCK, nf4

Place = Literal["keep", "recompute", "page"]
Codec = Literal["exact", "bf16", "fp8", "nf4", "codes"]  # codes: of a weight, in its Linear's own codec
FP8_BLOCK = 256  # numbers with one scale


def stored_bytes(codec: Codec | str, size: int) -> int:
    """Bytes in which `size` bytes of fp32 numbers lie in a codec."""
    count = size // 4
    return {"exact": size, "bf16": 2 * count, "fp8": count + 4 * -(-count // FP8_BLOCK), "nf4": sum(nf4(count + -count % NF4_BLOCK, double=False))}[codec]


@dataclass(frozen=True)
class Decision:
    """Where a tensor is between the forward and the backward pass. `out`: the PACK by which a paged one has left (None: its own)."""

    place: Place = "keep"
    tier: Tier = "device"
    codec: Codec = "exact"
    out: int | None = None
    spans: tuple[tuple[int, int | None], ...] = ()

    @property
    def away(self) -> bool:
        """Whether the device tier lets go of it after the forward pass (a kept one in another codec lies there encoded)."""
        return self.place != "keep" or self.codec != "exact"


KEEP, RECOMPUTE = Decision(), Decision("recompute")
FIGURES = ("budget", "predicted", "rates", "measured")  # of a plan, by name


@dataclass(frozen=True)
class Row:
    """A tensor's bytes, its decision, and the room that claimed each axis ("" = the planner)."""

    bytes: int
    decision: Decision = KEEP
    claims: tuple[tuple[str, str], ...] = ()  # (axis, room)
    dtype: str = ""  # of an activation's numbers where that is not fp32


@dataclass(frozen=True)
class MemoryPlan:
    """Immutable. `rows`: name -> Row; activations are named "N name" after their storage number in the trace, the rest as parallel.rows says."""

    trace: str  # digest
    planner: str
    rows: Mapping[str, Row]
    budget: Mapping[str, int] = field(default_factory=dict)  # tier -> bytes, what was asked for
    predicted: Mapping[str, float] = field(default_factory=dict)  # peak bytes by tier and seconds, as simulated; `bytes`: of the device in all
    rates: Mapping[str, float] = field(default_factory=dict)  # bytes/s of the links that the seconds come from
    measured: Mapping[str, float] = field(default_factory=dict)  # peak bytes by tier, as the meter counted them in the run

    def claim(self, room: str, pattern: str | Sequence[str], **axes: Any) -> MemoryPlan:
        """Fix axes (place=, tier=, codec=) of the rows that match, or are named. UserError when another room has one of them, or nothing matches."""
        names = [name for name in self.rows if fnmatch.fnmatchcase(name, pattern)] if isinstance(pattern, str) else pattern
        if not names:
            raise UserError(f"`{room}` claims `{pattern}`", "no tensor of the plan has such a name", f"one of: {', '.join(list(self.rows)[:4])}, ...")
        rows = dict(self.rows)
        for name in names:
            row = rows[name]
            for axis in axes:
                owner = dict(row.claims).get(axis)
                if owner not in (None, room):
                    raise UserError(f"`{owner}` and `{room}` both decide the {axis} of {name}",
                                    f"{owner}: {getattr(row.decision, axis)}; {room}: {axes[axis]}", f"switch one of [{owner}] and [{room}] off")  # fmt: skip
            claims = dict(row.claims) | dict.fromkeys(axes, room)
            rows[name] = replace(row, decision=replace(row.decision, **axes), claims=tuple(sorted(claims.items())))
        return replace(self, rows=rows)

    def decisions(self) -> dict[int, Decision]:
        """Storage number -> decision of every activation row."""
        return {int(name.split(" ")[0]): row.decision for name, row in self.rows.items() if name.split(" ")[0].isdigit()}

    def to_json(self) -> str:
        """One line a row, in order; the same plan is the same text."""
        head = {"trace": self.trace, "planner": self.planner, **{name: dict(getattr(self, name)) for name in FIGURES}}
        rows = ",\n".join(f"  {json.dumps(name)}: {json.dumps(_plain(row))}" for name, row in self.rows.items())
        return json.dumps(head)[:-1] + ',\n "rows": {\n' + rows + "\n }}\n"

    @staticmethod
    def from_json(text: str) -> MemoryPlan:
        """The plan that `to_json` wrote."""
        data = json.loads(text)
        return MemoryPlan(data["trace"], data["planner"], {n: _row(r) for n, r in data["rows"].items()}, **{name: data.get(name, {}) for name in FIGURES})


def _plain(row: Row) -> dict[str, Any]:
    given = {k: v for k, v in asdict(row.decision).items() if v != getattr(KEEP, k)}
    return {"bytes": row.bytes} | ({"dtype": row.dtype} if row.dtype else {}) | given | ({"claims": dict(row.claims)} if row.claims else {})


def _row(data: dict[str, Any]) -> Row:
    data = dict(data)
    size, claims, dtype = data.pop("bytes"), data.pop("claims", {}), data.pop("dtype", "")
    spans = tuple((start, end) for start, end in data.pop("spans", ()))
    return Row(size, Decision(**data, spans=spans), tuple(sorted(claims.items())), dtype)
