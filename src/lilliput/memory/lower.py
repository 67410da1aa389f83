"""Lowering: decisions become actions at the only moments when an eager run can act: when autograd saves a tensor, and
when it asks for one. The simulator and the executor both carry out this schedule and nothing else. No torch.

At an UNPACK the actions are, in this order: drop what a span ends for, fetch what is paged (all begin, then those that are needed at once
are awaited), run operations again. A run again has one pass in the order of the program: it reads what is in memory, keeps its
targets, and drops everything else as soon as its last reader is done.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from lilliput.base.errors import UserError
from lilliput.memory.plan import KEEP, Decision
from lilliput.memory.trace import PACK, RELEASE, UNPACK, Trace, closure


@dataclass
class Replay:
    """Operations to run again in order; `targets` stay. For the i-th of them: `given[i]`, the storages that it reads from what is in
    memory (others it reads from this run), and `last[i]`, those that nobody needs after it."""

    ops: list[int]
    targets: frozenset[int]
    sources: frozenset[int]
    given: list[frozenset[int]]
    last: list[tuple[int, ...]]


@dataclass
class Actions:
    """What happens before one UNPACK."""

    drop: list[int] = field(default_factory=list)
    fetch: list[int] = field(default_factory=list)  # begin to bring back
    wait: list[int] = field(default_factory=list)  # must be here now
    replay: Replay | None = None
    release: list[int] = field(default_factory=list)  # kept longer than autograd did, for this moment


@dataclass
class Schedule:
    """The whole of it. `hold`: kept though autograd does not; `leave`: PACK k -> paged storages whose copy must be done by then."""

    trace: Trace
    decisions: Mapping[int, Decision]
    before: dict[int, Actions]
    hold: frozenset[int]
    until: dict[int, int]  # kept storage -> UNPACK k up to which somebody reads it, when that is after autograd's last release
    record: frozenset[int]  # operations whose arguments must be known later
    first: dict[int, int]  # PACK k -> the storage that is kept or sent away at it
    late: dict[int, list[int]]  # operation -> storages that are sent away after it, since it still changes them after their first PACK
    leave: dict[int, list[int]]

    def of(self, storage: int) -> Decision:
        """A storage's decision; KEEP when the plan says nothing."""
        return self.decisions.get(storage, KEEP)


def lower(trace: Trace, decisions: Mapping[int, Decision]) -> Schedule:
    """UserError when a tensor can neither be kept nor had again."""
    for s, decision in decisions.items():
        if trace.storages[s].external or (decision.away and not trace.storages[s].packs):
            raise UserError(f"{trace.storages[s].name} has no place in a plan", "it is not a saved activation", "plan saved tensors only")
        if decision.codec != "exact" and trace.storages[s].dtype not in ("float32", ""):
            raise UserError(f"{trace.storages[s].name} cannot lie in {decision.codec}", f"its numbers are {trace.storages[s].dtype}", "codec=exact")
        if decision.place == "page" and decision.codec not in ("exact", "bf16"):
            raise UserError(f"{trace.storages[s].name} cannot be paged in {decision.codec}", "pages are exact or bf16", "place=keep, or codec=bf16")
    saved = {s.index for s in trace.saved()}
    away = {s for s, d in decisions.items() if d.away}
    hold = frozenset(s for s in decisions if s not in saved) | _pinned(trace)
    kept = (saved - away) | hold
    starts, ends = _spans(decisions)
    pending = {s: len(trace.storages[s].packs) for s in saved}
    here, coming = set(kept), set[int]()  # in the device tier now; being fetched
    gone: set[int] = set()  # kept ones that autograd has released
    before: dict[int, Actions] = {}
    until: dict[int, int] = {}
    record: set[int] = set()
    for kind, k in trace.events:
        if kind == RELEASE:
            s = trace.packs[k]
            pending[s] -= 1
            if pending[s] == 0:
                (gone.add if s in kept else here.discard)(s)
        if kind != UNPACK:
            continue
        now = Actions(drop=[s for s in ends.get(k, ()) if s in here])
        here -= set(now.drop)
        asked = trace.packs[k]
        back = [s for s in starts.get(k, ()) if s not in here and s not in coming and pending[s]]
        if asked not in here and asked not in back and asked not in coming:
            back.append(asked)
        now.fetch = [s for s in back if decisions[s].place != "recompute"]
        coming |= set(now.fetch)
        targets = frozenset(s for s in back if decisions[s].place == "recompute")
        if targets:
            now.replay = _replay(trace, targets, here | coming)
            record |= set(now.replay.ops)
            for s in now.replay.sources:
                if s in gone or s in hold:
                    until[s] = k
        needed = {asked} | set(now.replay.sources if now.replay else ())
        now.wait = sorted(coming & needed)
        coming -= set(now.wait)
        here |= set(now.wait) | targets
        if now != Actions():
            before[k] = now
    for s, k in until.items():
        before[k].release.append(s)
    first = {min(trace.storages[s].packs): s for s in saved if s in kept or decisions[s].place != "recompute"}
    leave: dict[int, list[int]] = {}
    for s, d in decisions.items():
        if d.place == "page" and d.out is not None:
            leave.setdefault(d.out, []).append(s)
    late: dict[int, list[int]] = {}
    ran = packed_in(trace)
    for s in away - {s for s, d in decisions.items() if d.place == "recompute"}:
        if trace.storages[s].writers[-1] >= ran[s]:
            late.setdefault(trace.storages[s].writers[-1], []).append(s)
            first.pop(min(trace.storages[s].packs))
    return Schedule(trace, decisions, before, frozenset(s for s in hold if s in until), until, frozenset(record), first, late, leave)


def _pinned(trace: Trace) -> set[int]:
    """What autograd does not save and no run again can make: kept where one needs it."""
    writers = [op for op in trace.ops[: trace.forwards] if not op.replayable]
    return {s for op in writers for s in (*op.news, *op.writes) if not trace.storages[s].external and not trace.storages[s].packs}


def _spans(decisions: Mapping[int, Decision]) -> tuple[dict[int, list[int]], dict[int, list[int]]]:
    starts: dict[int, list[int]] = {}
    ends: dict[int, list[int]] = {}
    for s, decision in decisions.items():
        for start, end in decision.spans:
            starts.setdefault(start, []).append(s)
            if end is not None:
                ends.setdefault(end, []).append(s)
    return starts, ends


def _replay(trace: Trace, targets: frozenset[int], here: set[int]) -> Replay:
    ops, sources = closure(trace, targets, here.__contains__)
    last_reader: dict[int, int] = {}
    made: set[int] = set()
    given = []
    for place, number in enumerate(ops):
        op = trace.ops[number]
        given.append(frozenset(s for s in op.reads if s in sources and s not in op.writes and trace.version(s, number)))
        made |= set(op.news)
        last_reader |= dict.fromkeys(({*op.reads} - given[-1]) | {*op.writes} | {*op.news}, place)
    last: list[list[int]] = [[] for _ in ops]
    for s in made - targets:
        last[last_reader[s]].append(s)
    return Replay(ops, targets, frozenset(s for s in sources if not trace.storages[s].external), given, [tuple(x) for x in last])


def first_asked(trace: Trace) -> dict[int, int]:
    """Saved storage -> the k of the first UNPACK that asks for it."""
    found: dict[int, int] = {}
    for kind, k in trace.events:
        if kind == UNPACK:
            found.setdefault(trace.packs[k], k)
    return found


def packed_in(trace: Trace) -> dict[int, int]:
    """Saved storage -> forward operations that had run at its first PACK."""
    found: dict[int, int] = {}
    done = 0
    for kind, k in trace.events:
        if kind == "op":
            done = k + 1
        elif kind == PACK:
            found.setdefault(trace.packs[k], done)
    return found
