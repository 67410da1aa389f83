"""The fastest plan within a budget of bytes: every planner proposes, the simulator judges, the frontier of bytes and seconds stays.

What is proposed does not depend on the budget, so a larger one is never slower, and nothing above it is ever run. The smallest
peak of all proposals is what a refusal names. About 70 simulations: a few seconds for a deep model, once a batch shape.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from lilliput.base.errors import DoesNotFit
from lilliput.base.ledger import Tier
from lilliput.base.show import size
from lilliput.memory.lower import first_asked, lower
from lilliput.memory.plan import KEEP, Decision, MemoryPlan, Row
from lilliput.memory.planners import chain_dp, chen, hierarchical
from lilliput.memory.planners.chain import Chain, chain
from lilliput.memory.planners.greedy import greedy
from lilliput.memory.planners.recursive import recursive
from lilliput.memory.planners.selective import selective
from lilliput.memory.planners.sqrt import every, segments, sqrt
from lilliput.memory.simulate import Rates, Simulation, simulate
from lilliput.memory.trace import UNPACK, Trace

STAGES = 48  # the dynamic program's time grows with their cube
LEVELS = 8

Decisions = dict[int, Decision]


@dataclass(frozen=True)
class Option:
    """A proposal and what it comes to."""

    name: str
    decisions: Mapping[int, Decision]
    simulation: Simulation

    @property
    def peak(self) -> int:
        """Bytes of the device tier."""
        return self.simulation.peak["device"]


@dataclass(frozen=True)
class Frontier:
    """Options that no other one beats in bytes of every tier and seconds; smallest first."""

    trace: Trace
    options: tuple[Option, ...]
    tried: int

    def pick(self, budget: Mapping[str, int]) -> Option:
        """The fastest that fits; DoesNotFit with the smallest feasible budget when none does."""
        fits = [o for o in self.options if all(o.simulation.peak.get(tier, 0) <= limit for tier, limit in budget.items())]
        if fits:
            return min(fits, key=lambda o: (o.simulation.seconds, o.peak))
        others = {t: b for t, b in budget.items() if t != "device"}
        allowed = [o for o in self.options if all(o.simulation.peak.get(t, 0) <= b for t, b in others.items())]
        small = min(allowed or self.options, key=lambda o: o.peak)
        why = f"of {self.tried} plans the smallest ({small.name}) needs {size(small.peak)} ({small.peak:,} bytes)"
        raise DoesNotFit(f"no plan fits in {size(budget['device'])}", why, f"a budget of {small.peak}B, or a smaller batch", small.peak)


def written(trace: Trace, name: str, decisions: Mapping[int, Decision], simulation: Simulation) -> MemoryPlan:
    """Decisions as the plan that is written down."""
    rows = {f"{s.index} {s.name}": Row(s.bytes, decisions.get(s.index, KEEP), (), s.dtype if s.dtype != "float32" else "") for s in trace.saved()}
    predicted = {f"{tier} peak": float(peak) for tier, peak in simulation.peak.items()} | {"seconds": simulation.seconds}
    return MemoryPlan(trace.digest(), name, rows, {}, predicted)


def frontier(
    trace: Trace, rates: Rates = Rates(), tiers: Sequence[Tier] = (), more: Iterable[tuple[str, Decisions]] = (), planner: str = "all"
) -> Frontier:
    """Judge every proposal. tiers: where tensors may be paged to; more: further proposals, those that a user allows to round; planner: one alone."""
    found: list[Option] = []
    seen: set[frozenset[tuple[int, Decision]]] = set()
    count = 0
    for name, decisions in itertools.chain(proposals(trace, rates, tiers, planner), more):
        key = frozenset((s, d) for s, d in decisions.items() if d != KEEP or not trace.storages[s].packs)
        if key in seen:
            continue
        seen.add(key)
        count += 1
        found.append(Option(name, decisions, simulate(lower(trace, decisions), rates)))
    beaten = lambda a: any(b is not a and _beats(b.simulation, a.simulation) for b in found)
    return Frontier(trace, tuple(sorted((o for o in found if not beaten(o)), key=lambda o: o.peak)), count)


def _beats(one: Simulation, two: Simulation) -> bool:
    tiers = {*one.peak, *two.peak}
    pairs = [(one.peak.get(t, 0), two.peak.get(t, 0)) for t in tiers] + [(one.seconds, two.seconds)]
    return all(a <= b for a, b in pairs) and any(a < b for a, b in pairs)


def proposals(trace: Trace, rates: Rates, tiers: Sequence[Tier], planner: str = "all") -> Iterator[tuple[str, Decisions]]:
    """(name, decisions) of every planner, or of one of PLANNERS, at several settings."""
    yield "keep everything", {}
    whole = chain(trace)
    for name, propose in PLANNERS.items():
        if planner in ("all", name):
            yield from propose(whole, rates, tiers)


def _between(whole: Chain) -> set[int]:
    return {s for stage in whole.stages for s in stage.boundary}


def _selective(whole: Chain, rates: Rates, tiers: Sequence[Tier]) -> Iterator[tuple[str, Decisions]]:
    for share in (1 / 3, 2 / 3, 1.0):
        yield f"cheap operations again ({share:.0%})", selective(whole.trace, share, but=_between(whole))


def _sqrt(whole: Chain, rates: Rates, tiers: Sequence[Tier]) -> Iterator[tuple[str, Decisions]]:
    yield "sqrt", sqrt(whole)


def _recursive(whole: Chain, rates: Rates, tiers: Sequence[Tier]) -> Iterator[tuple[str, Decisions]]:
    yield "recursive", recursive(whole)


def _chen(whole: Chain, rates: Rates, tiers: Sequence[Tier]) -> Iterator[tuple[str, Decisions]]:
    for split in chen.grid([s.saved for s in whole.stages], [s.crossing for s in whole.stages]):
        yield f"segments of at most {size(split.segment)}", segments(whole, list(split.starts))


def _segments(whole: Chain, rates: Rates, tiers: Sequence[Tier]) -> Iterator[tuple[str, Decisions]]:
    n = len(whole)
    for group in dict.fromkeys((1, 2, 4)):
        for until in dict.fromkeys(round(n * i / LEVELS) for i in range(1, LEVELS + 1)):
            some = segments(whole, list(range(0, n, group)), until=until)
            yield f"the first {until} of {n} stages again by {group}", some
            if group == 1:
                yield f"the first {until} of {n} stages and cheap operations again", selective(whole.trace, 1.0, some, _between(whole))


def _greedy(whole: Chain, rates: Rates, tiers: Sequence[Tier]) -> Iterator[tuple[str, Decisions]]:
    for freed, decisions in greedy(whole, 2 * LEVELS):
        yield f"greedy, {size(freed)} again", decisions


def _dynamic(whole: Chain, rates: Rates, tiers: Sequence[Tier]) -> Iterator[tuple[str, Decisions]]:
    for budget, short, per_byte, tier in _bounds(whole, rates, tiers):
        solved = chain_dp.solve(chain_dp.costs(short, per_byte), budget)
        if solved is not None:
            yield f"dynamic program for {size(budget)}{f' with {tier} pages' if tier else ''}", chain_dp.decisions(short, solved[1], tier or "host")


def _hierarchical(whole: Chain, rates: Rates, tiers: Sequence[Tier]) -> Iterator[tuple[str, Decisions]]:
    parts: list[list[hierarchical.Part]] = []
    for budget, short, per_byte, tier in _bounds(whole, rates, tiers):
        parts = parts or hierarchical.parts(short)
        solved = chain_dp.solve(hierarchical.costs(short, parts, per_byte), budget)
        if solved is not None:
            yield f"hierarchical for {size(budget)}{f' with {tier} pages' if tier else ''}", hierarchical.decisions(short, parts, solved[1], tier or "host")


def _bounds(whole: Chain, rates: Rates, tiers: Sequence[Tier]) -> Iterator[tuple[int, Chain, float | None, Tier | None]]:
    """(budget, chain, seconds to page a byte, where to) that a dynamic program is solved for."""
    short = whole.merged(STAGES)
    small, large = (simulate(lower(whole.trace, d)).peak["device"] for d in (every(short, 1), {}))
    for tier in (None, *tiers):
        link = rates.link(tier) if tier else None
        for i in range(LEVELS):
            yield round(small * 0.8 + (large - small * 0.8) * i / LEVELS), short, 1 / min(link.read, link.write) if link else None, tier


def _paging(whole: Chain, rates: Rates, tiers: Sequence[Tier]) -> Iterator[tuple[str, Decisions]]:
    for tier in tiers:
        yield from _paged(whole.trace, whole, tier)


def _paged(trace: Trace, whole: Chain, tier: Tier) -> Iterator[tuple[str, Decisions]]:
    order = [k for kind, k in trace.events if kind == UNPACK]
    place = {k: i for i, k in enumerate(order)}
    asked = first_asked(trace)
    ends = [max((k for s in stage.members for k in trace.storages[s].packs), default=None) for stage in whole.stages]

    def page(stages: range, late: bool) -> Decisions:
        some: Decisions = {}
        for number in stages:
            stage = whole.stages[number]
            before = whole.stages[number + 1].asked if late and number + 1 < len(whole) else None
            for s in stage.members:
                if s in asked:
                    out = ends[min(number + 1, len(whole) - 1)] if late else None
                    early = before is not None and place[before] < place[asked[s]]
                    some[s] = Decision("page", tier, out=out, spans=((before, None),) if early and before is not None else ())
        return some

    n = len(whole)
    for until in dict.fromkeys(max(1, round(n * i / 4)) for i in range(1, 5)):
        for late in (False, True):
            paged = page(range(until), late)
            yield f"the first {until} of {n} stages paged to the {tier}{', overlapped' if late else ''}", paged
            rest = segments(whole, list(range(n)), until=n)
            yield f"... the others again{', overlapped' if late else ''} ({until})", {**rest, **paged}
    entering = {s for stage in whole.stages[1:] for s in stage.boundary}
    again = every(whole, 1)
    yield (
        f"stages again from inputs paged to the {tier}",
        {s: replace(d, place="page", tier=tier) if s in entering and trace.storages[s].packs and d == KEEP else d for s, d in again.items()},
    )


PLANNERS: Mapping[str, Callable[[Chain, Rates, Sequence[Tier]], Iterator[tuple[str, Decisions]]]] = {
    "selective": _selective, "sqrt": _sqrt, "recursive": _recursive, "chen": _chen, "segments": _segments, "dynamic": _dynamic, "greedy": _greedy,
    "hierarchical": _hierarchical, "paging": _paging,
}  # fmt: skip
