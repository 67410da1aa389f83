"""Ledger: what a job will cost, predicted. Named terms of bytes, flops and traffic; rooms edit them in phase order.

Each term says where it lies (tier), which mesh axes divide it (shard), when it is alive (moments) and which lane its
work occupies. Peak = max over moments of the sum of the terms alive then; time = max over overlapped lanes. The same
terms are measured by memory.meter, so predicted and measured can be compared name by name.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

Tier = Literal["device", "host", "disk"]
Moment = Literal["load", "forward", "backward", "update"]
Lane = Literal["compute", "host", "link", "disk"]
MOMENTS: tuple[Moment, ...] = ("load", "forward", "backward", "update")


@dataclass(frozen=True)
class Term:
    """One line of the ledger. `size` is whole-model bytes; what one device holds is size / product(shard factors)."""

    size: int = 0  # bytes resident while alive, before sharding
    flops: float = 0.0  # arithmetic of one optimizer step (or of one token when serving)
    traffic: float = 0.0  # bytes that cross the term's lane in one optimizer step
    tier: Tier = "device"
    shard: tuple[tuple[str, int], ...] = ()  # (axis, factor) pairs that divide the term
    moments: tuple[Moment, ...] = MOMENTS  # when it is alive
    lane: Lane = "compute"
    written: float = 0.0  # bytes of the traffic that a disk is written with; the rest is read
    speed: float = 0.0  # bytes/s that a setting slows the lane down to for this term; 0 = the lane's own
    falling: bool = False  # freed piece by piece while the backward pass goes, as gradients come
    blocks: int = 0  # size and work are of this many equal blocks of the model (recomputation shortens it); 0 = not a block's

    @property
    def bytes(self) -> int:
        """Bytes on one device: size over the product of the shard factors, rounded up."""
        return math.ceil(self.size / math.prod(factor for _, factor in self.shard)) if self.shard else self.size

    def times(self, factor: float) -> Term:
        """The same bytes, and so many times the work."""
        return replace(self, flops=self.flops * factor, traffic=self.traffic * factor, written=self.written * factor)


@dataclass(frozen=True)
class Ledger:
    """Immutable; every edit gives a new ledger, so a room's cost() is a pure function."""

    terms: Mapping[str, Term]

    def put(self, **terms: Term) -> Ledger:
        """A ledger with these terms added or replaced."""
        return replace(self, terms={**self.terms, **terms})

    def drop(self, *names: str) -> Ledger:
        """A ledger without these terms."""
        return replace(self, terms={k: v for k, v in self.terms.items() if k not in names})

    def scale(self, name: str, factor: float) -> Ledger:
        """The named term's size, flops and traffic times a factor."""
        t = self.terms[name].times(factor)
        return self.put(**{name: replace(t, size=round(t.size * factor))})

    def shard(self, *names: str, axis: str, by: int) -> Ledger:
        """The named terms divided over `by` devices of a mesh axis."""
        return self.put(**{n: replace(self.terms[n], shard=(*self.terms[n].shard, (axis, by))) for n in names})

    def move(self, *names: str, to: Tier) -> Ledger:
        """The named terms laid in another tier."""
        return self.put(**{n: replace(self.terms[n], tier=to) for n in names})

    def bytes(self, name: str) -> int:
        """Bytes of one term on one device; 0 when the ledger has no such term."""
        return self.terms[name].bytes if name in self.terms else 0

    def alive(self, moment: Moment, *tiers: Tier) -> int:
        """Bytes alive in a tier (or in several together; default: the device) at a moment."""
        return sum(t.bytes for t in self.terms.values() if t.tier in (tiers or ("device",)) and moment in t.moments)

    def peak(self, *tiers: Tier) -> tuple[int, Moment]:
        """The largest sum over the moments, and the moment where it happens."""
        alive = dict.fromkeys(MOMENTS, 0)  # in one pass: a plan asks thousands of times
        for term in self.terms.values():
            if term.size and term.tier in (tiers or ("device",)):
                for moment in term.moments:
                    alive[moment] += term.bytes
        return max(((count, moment) for moment, count in alive.items()), key=lambda pair: pair[0])

    def biggest(self, count: int = 3, *tiers: Tier) -> list[tuple[str, int]]:
        """The terms that weigh most at the peak, largest first."""
        _, moment = self.peak(*tiers)
        alive = [(n, t.bytes) for n, t in self.terms.items() if t.tier in (tiers or ("device",)) and moment in t.moments]
        return sorted(alive, key=lambda pair: -pair[1])[:count]

    def flops(self) -> float:
        """Arithmetic of one step, all terms."""
        return sum(t.flops for t in self.terms.values())

    def moved(self) -> float:
        """Bytes that cross a link or go to and from a disk in one step."""
        return sum(t.traffic for t in self.terms.values() if t.lane in ("link", "disk"))


def largest_two(sizes: Sequence[int]) -> int:
    """The largest sum of two that follow each other: of gradients that leave one by one, the one that is made and the one on its way."""
    return max(a + b for a, b in zip([0, *sizes], [*sizes, 0], strict=True))
