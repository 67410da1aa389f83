"""The chain in a trace: where the forward pass can be cut with little crossing the cut, and what each stage between two cuts costs.

A cut before operation p is crossed by every storage that was made before p and is read at or after it. Cuts are the places where
fewer bytes cross than on either side, and not many more than at the next such places: the ends of blocks in a decoder or
a ResNet, the steps of an unrolled LSTM, every layer of an MLP. No module has to say where they are.

Planners of chains decide what to keep by stage; `Layout` turns that into decisions: a stage is kept, or its saved tensors run
again together at the first of them that the backward pass asks for.
"""

from __future__ import annotations

import bisect
import fnmatch
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from lilliput.memory.lower import first_asked
from lilliput.memory.plan import KEEP, Decision
from lilliput.memory.trace import FREE, OP, UNPACK, Trace

WIDER = 1.4  # a cut is left out when more than this many times what crosses narrower ones on both sides crosses it

MANY = 6  # a storage with so many readers all over the forward pass is no boundary
NEAR = 4  # so many neighbouring valleys are looked at


@dataclass
class Stage:
    """Operations first <= i < end. `members`: saved tensors made in it; `boundary`: what crosses the cut at its beginning."""

    first: int
    end: int
    members: list[int]
    boundary: list[int]
    saved: int = 0  # bytes of the members
    crossing: int = 0  # bytes of the boundary
    forward: float = 0.0  # seconds
    backward: float = 0.0
    other: int = 0  # most bytes that are no saved activation while its backward pass runs: gradients, what operations pass on
    asked: int | None = None  # the first saved tensor (k) that its backward pass asks for
    leaves: int = 0  # place of that among all UNPACKs


@dataclass
class Chain:
    """Stages in the order of the forward pass. `turn`: most such other bytes before the backward pass of any stage begins."""

    trace: Trace
    stages: list[Stage]
    turn: int = 0

    def __len__(self) -> int:
        return len(self.stages)

    def merged(self, most: int) -> Chain:
        """At most so many stages: neighbours joined evenly."""
        if len(self) <= most:
            return self
        borders = [round(i * len(self) / most) for i in range(most + 1)]
        return chain(self.trace, [self.stages[b].first for b in borders[1:-1]])


@dataclass
class Layout:
    """Decisions of a chain planner, stage by stage. `since`: the UNPACK from which a thing is there again; None = it was kept."""

    chain: Chain
    decisions: dict[int, Decision] = field(default_factory=dict)

    def keep(self, storages: Iterable[int], since: int | None, place: str = "keep", tier: str = "device") -> None:
        """Kept (or paged) from the forward pass on, or run again at `since`; what is decided already stays."""
        saved = self.chain.trace.storages
        for s in storages:
            if s in self.decisions:
                continue
            if since is not None:
                if saved[s].packs:
                    self.decisions[s] = Decision("recompute", spans=((since, None),))
            elif place == "page":
                self.decisions[s] = Decision("page", tier) if saved[s].packs and all(self._replayable(s)) else KEEP  # type: ignore[arg-type]
            else:
                self.decisions[s] = KEEP

    def again(self, stage: Stage) -> None:
        """A stage's members run again together when the first of them is asked for."""
        if stage.asked is not None:
            self.keep(stage.members, stage.asked)

    def done(self) -> dict[int, Decision]:
        """The decisions; tensors that cannot run again are kept."""
        trace = self.chain.trace
        return {s: d if d.place != "recompute" or all(self._replayable(s)) else KEEP for s, d in self.decisions.items() if trace.storages[s].writers}

    def _replayable(self, storage: int) -> list[bool]:
        return [self.chain.trace.ops[w].replayable for w in self.chain.trace.storages[storage].writers]


def crossing(trace: Trace) -> list[int]:
    """Bytes that cross the cut before each forward operation; what nearly all of the pass reads (tables, masks) crosses everywhere and is left out."""
    changes = [0] * (trace.forwards + 2)
    for s in trace.storages:
        if len(s.readers) >= MANY and s.writers and s.readers[-1] - s.writers[0] > trace.forwards / 3:
            continue
        if s.writers and s.writers[0] < trace.forwards and s.readers and s.readers[-1] > s.writers[0]:
            changes[s.writers[0] + 1] += s.bytes
            changes[s.readers[-1] + 1] -= s.bytes
    total, result = 0, []
    for p in range(trace.forwards + 1):
        total += changes[p]
        result.append(total)
    return result


def cuts(trace: Trace) -> list[int]:
    """Where to cut: the last operation of each valley of what crosses."""
    over = crossing(trace)
    valleys: list[int] = []
    p = 1
    while p < trace.forwards:
        q = p
        while q + 1 < trace.forwards and over[q + 1] == over[p]:
            q += 1
        if 0 < over[p] < over[q + 1] and (over[p] < over[p - 1] or over[p - 1] == 0):
            valleys.append(q)
        p = q + 1
    while True:
        narrow = []
        for place, p in enumerate(valleys):
            sides = valleys[max(0, place - NEAR) : place], valleys[place + 1 : place + 1 + NEAR]
            left, right = (min((over[v] for v in side), default=over[p]) for side in sides)
            if over[p] <= WIDER * max(left, right):
                narrow.append(p)
        if narrow == valleys:
            return valleys
        valleys = narrow


def entries(trace: Trace, modules: str) -> list[int]:
    """The first operation in each module that matches a pattern ("layers.*": one level), and the first after the last of them."""
    first: dict[str, int] = {}
    depth = modules.count(".") + 1
    last = 0
    for op in trace.ops[: trace.forwards]:
        path = ".".join(op.module.split(".")[:depth])
        if fnmatch.fnmatchcase(path, modules):
            first.setdefault(path, op.index)
            last = op.index + 1
    return [*first.values(), last]


def chain(trace: Trace, at: Sequence[int] | None = None) -> Chain:
    """The chain of a trace, cut where `cuts` says or at the given operations."""
    made = sorted(s.writers[0] for s in trace.saved())
    borders = [0]
    for border in [*(cuts(trace) if at is None else at), trace.forwards]:
        if bisect.bisect_left(made, border) > bisect.bisect_left(made, borders[-1]) or border == trace.forwards:  # no stage without a saved tensor
            borders.append(border)
    place = trace.order()
    asked = first_asked(trace)
    stages = [Stage(a, b, [], []) for a, b in itertools.pairwise(borders) if b > a]
    where = [0] * trace.forwards
    for number, stage in enumerate(stages):
        where[stage.first : stage.end] = [number] * (stage.end - stage.first)
        stage.forward = sum(op.seconds for op in trace.ops[stage.first : stage.end])
    for s in trace.storages:
        if not s.writers or s.writers[0] >= trace.forwards:
            continue
        if s.packs:
            stages[where[s.writers[0]]].members.append(s.index)
        last = s.readers[-1] if s.readers else -1
        for stage in stages[where[s.writers[0]] + 1 :]:
            if last < stage.first:
                break
            stage.boundary.append(s.index)
    for stage in stages:
        stage.saved, stage.crossing = (sum(trace.storages[s].bytes for s in group) for group in (stage.members, stage.boundary))
        ks = [asked[s] for s in stage.members if s in asked and s not in stages[min(where[stage.end - 1] + 1, len(stages) - 1)].boundary]
        stage.asked = min(ks or [asked[s] for s in stage.members if s in asked], key=lambda k: place[k], default=None)
        stage.leaves = place[stage.asked] if stage.asked is not None else 0
    found = Chain(trace, stages)
    _backward(found)
    return found


def _backward(found: Chain) -> None:
    """Seconds of each stage's backward pass, and the most bytes beside saved activations while it runs."""
    trace = found.trace
    current: Stage | None = None
    by_key = {stage.asked: stage for stage in found.stages if stage.asked is not None}
    saved = {s.index for s in trace.saved()}
    alive = 0
    for kind, i in trace.events:
        if kind == OP:
            for s in trace.ops[i].news:
                alive += 0 if s in saved else trace.storages[s].bytes
            if current is not None and not trace.ops[i].forward:
                current.backward += trace.ops[i].seconds
        elif kind == FREE:
            alive -= 0 if i in saved else trace.storages[i].bytes
        elif kind == UNPACK:
            current = by_key.get(i, current)
        if current is None:
            found.turn = max(found.turn, alive)
        else:
            current.other = max(current.other, alive)
