"""Choose: which sections make a job fit into the bytes that `memory.device` and `memory.host` allow.

Every set of rooms that can be set to a budget (they say so with `within`) is tried beside the job's own, and judged by the ledger. Of
those that fit the one with the fewest rooms is taken, the quickest where several have as few; each of the others leaves with its reason.
The run then plans to the byte and refuses before anything is loaded where closed forms were too kind.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from lilliput.base import registry
from lilliput.base.ledger import Ledger, Tier
from lilliput.base.protocols import refusal
from lilliput.base.show import size
from lilliput.plan.ledgers import fits, room
from lilliput.plan.search import Trial, largest_micro_batch


@dataclass(frozen=True)
class Choice:
    """What was added to a job, why, and why nothing else was: (sections, reason) pairs."""

    added: Mapping[str, Any]
    reason: str
    rejected: tuple[tuple[str, str], ...]

    def lines(self) -> list[str]:
        """In words: the choice first."""
        return [f"chosen: {words(self.added)} ({self.reason})", *(f"not {names}: {why}" for names, why in self.rejected)]


def words(rooms: Mapping[str, Any]) -> str:
    """Sections as they are written on the command line."""
    told = lambda name, section: [f"{name}.{k}={getattr(section, k)}" for k in sorted(section.model_fields_set)] or [f"{name}=on"]
    return " ".join(word for name, section in rooms.items() for word in told(name, section)) or "nothing more"


def sets(trial: Trial) -> Iterator[dict[str, Any]]:
    """Rooms to add, fewest first."""
    allowed = [room(trial.hardware, tier) for tier in ("device", "host")]
    makers = {name: getattr(registry.find("train", name), "within", None) for name in registry.names("train") if name not in trial.rooms}
    able = {name: maker(*allowed) for name, maker in makers.items() if maker is not None}
    for count in range(len(able) + 1):
        yield from ({name: able[name] for name in chosen} for chosen in itertools.combinations(able, count))


def choose(trial: Trial, free: bool, seconds: Callable[[Ledger, Trial], float]) -> tuple[Trial, Choice]:
    """(the variant to run, what was chosen). free: its micro-batch may be set too. Nothing that fits: the one that comes nearest."""
    fitting: list[tuple[float, Trial, dict[str, Any]]] = []
    rejected: list[tuple[str, str]] = []
    near: list[tuple[int, int, Trial, dict[str, Any]]] = []
    for number, added in enumerate(sets(trial)):
        option = replace(trial, rooms={**trial.rooms, **added})
        refused = [f"{name}: {reason}" for name in option.rooms if (reason := refusal(name, option.rooms, trial.facts))]
        if refused:
            rejected.append((words(added), refused[0]))
            continue
        if free:
            option = largest_micro_batch(option)[0]
        ledger = option.ledger()
        if fits(ledger, option.hardware):
            fitting.append((seconds(ledger, option), option, added))
            continue
        rejected.append((words(added), _short(ledger, option)))
        near.append((sum(max(0, ledger.peak(tier)[0] - room(option.hardware, tier)) for tier in ("device", "host")), number, option, added))
    if not fitting:
        _, _, option, added = min(near)
        return option, Choice(added, "nothing fits; this comes nearest", tuple(pair for pair in rejected if pair[0] != words(added)))
    best = min(fitting, key=lambda found: (len(found[2]), found[0]))
    more = lambda took, added: "fits, with more sections than it takes" if len(added) > len(best[2]) else f"fits, but takes {took / best[0]:.2f} times as long"
    slower = [(words(added), more(took, added)) for took, _, added in fitting if added is not best[2]]
    return best[1], Choice(best[2], f"{_needs(best[1].ledger(), best[1])}; at least {best[0]:.3g} s a step", (*rejected, *slower))


def _needs(ledger: Ledger, trial: Trial) -> str:
    tiers: tuple[Tier, ...] = ("device", "host")
    return ", ".join(f"{size(ledger.peak(tier)[0])} of {size(room(trial.hardware, tier))} on the {tier}" for tier in tiers if ledger.peak(tier)[0])


def _short(ledger: Ledger, trial: Trial) -> str:
    tiers: tuple[Tier, ...] = ("device", "host")
    over = [t for t in tiers if ledger.peak(t)[0] > room(trial.hardware, t)]
    return "needs " + " and ".join(f"{size(ledger.peak(t)[0])} on the {t}, which has {size(room(trial.hardware, t))}" for t in over)
