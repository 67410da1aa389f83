"""Choose: which sections make a job fit into what `memory.device`, `memory.host` and `memory.disk` allow.

Every set of rooms that can be set to a budget (`within` gives a room's settings, the quickest first) is tried beside the job's own, and judged
by the ledger. Of those that fit the one with the fewest rooms is taken, the quickest where several have as few, the one that moves the fewest
bytes where they are as quick; each of the others leaves with its reason. Where nothing fits, the smallest budgets that would do are said.
The run then plans to the byte, before anything is loaded. Where closed forms were too kind the set is `refused` and the next one is taken.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from lilliput.base import registry
from lilliput.base.errors import DoesNotFit
from lilliput.base.ledger import Ledger, Tier
from lilliput.base.protocols import refusal
from lilliput.base.show import size
from lilliput.plan.ledgers import fits, over, room
from lilliput.plan.search import Trial, largest_micro_batch

TIERS: tuple[Tier, ...] = ("device", "host", "disk")


@dataclass(frozen=True)
class Choice:
    """What was added to a job, why, and why nothing else was: (sections, reason) pairs. least: budgets that would do, where none of them did."""

    added: Mapping[str, Any]
    reason: str
    rejected: tuple[tuple[str, str], ...]
    least: str = ""
    fits: bool = True

    def lines(self) -> list[str]:
        """In words: the choice first."""
        return [f"chosen: {words(self.added)} ({self.reason})", *(f"not {names}: {why}" for names, why in self.rejected)]


def words(rooms: Mapping[str, Any]) -> str:
    """Sections as they are written on the command line."""
    told = lambda name, section: [f"{name}.{k}={getattr(section, k)}" for k in sorted(section.model_fields_set)] or [f"{name}=on"]
    return " ".join(word for name, section in rooms.items() for word in told(name, section)) or "nothing more"


def sets(trial: Trial, folder: str) -> Iterator[dict[str, Any]]:
    """Rooms to add, fewest first."""
    makers = {name: getattr(registry.find("train", name), "within", None) for name in registry.names("train") if name not in trial.rooms}
    able = {name: maker(room(trial.hardware), folder) for name, maker in makers.items() if maker is not None}
    for count in range(len(able) + 1):
        for chosen in itertools.combinations(able, count):
            yield from (dict(zip(chosen, settings, strict=True)) for settings in itertools.product(*(able[name] for name in chosen)))


def choose(
    trial: Trial, free: bool, folder: str, seconds: Callable[[Ledger, Trial], float], refused: Mapping[str, DoesNotFit] | None = None
) -> tuple[Trial, Choice]:
    """(the variant to run, what was chosen). free: its micro-batch may be set too. folder: of the disk that may be used, empty = none.
    refused: sets in `words` that a plan to the byte has refused. Nothing that fits: the one that comes nearest."""
    refused = refused or {}
    fitting: list[tuple[tuple[int, float, float], Trial, dict[str, Any]]] = []
    rejected: dict[str, str] = {}
    near: list[tuple[tuple[int, int], Trial, dict[str, Any]]] = []
    for number, added in enumerate(sets(trial, folder)):
        option = replace(trial, rooms={**trial.rooms, **added})
        reasons = [f"{name}: {reason}" for name in option.rooms if (reason := refusal(name, option.rooms, trial.facts))]
        if reasons:
            together = words({name: type(section)() for name, section in added.items()})
            rejected.setdefault(words(added) if together in rejected and rejected[together] != reasons[0] else together, reasons[0])
            continue
        if free:
            option = largest_micro_batch(option)[0]
        ledger, exact = option.ledger(), refused.get(words(added))
        if exact is not None:
            rejected[words(added)] = f"planned to the byte: {exact.what}" + (f", {exact.needs:,} bytes are the least" if exact.needs else "")
            near.append(((max(0, exact.needs - room(option.hardware)), number), option, added))
            continue
        if fits(ledger, option.hardware):
            fitting.append(((len(added), seconds(ledger, option), ledger.moved()), option, added))
            continue
        rejected[words(added)] = _short(ledger, option)
        lacking = over(ledger, option.hardware, *TIERS)
        near.append(((sum(lacking.values()), number), option, added))
    if not fitting:
        _, option, added = min(near, key=lambda found: found[0])
        others = tuple(pair for pair in rejected.items() if pair[0] != words(added))
        least = f"memory.device={refused[words(added)].needs}B" if words(added) in refused else _least(option.ledger(), option)
        return option, Choice(added, "nothing fits; this comes nearest", others, least, fits=False)
    best = min(fitting, key=lambda found: found[0])
    slower = [(words(added), _slower(key, best[0])) for key, _, added in fitting if added is not best[2]]
    return best[1], Choice(best[2], f"{_needs(best[1].ledger(), best[1])}; at least {best[0][1]:.3g} s a step", (*rejected.items(), *slower))


def _least(ledger: Ledger, trial: Trial) -> str:
    """The budgets that lack something, as large as it takes."""
    needs = {tier: ledger.peak(tier)[0] for tier in over(ledger, trial.hardware, *TIERS)}
    return " ".join(f"memory.{tier}={count}B" if tier != "disk" else f"{size(count)} in memory.disk" for tier, count in needs.items())


def _slower(key: tuple[int, float, float], best: tuple[int, float, float]) -> str:
    """Why one that fits was not taken: (sections, seconds, bytes moved) of both."""
    if key[0] > best[0]:
        return "fits, with more sections than it takes"
    if key[1] > best[1]:
        return f"fits, but takes {key[1] / best[1]:.2f} times as long"
    return "fits, but moves more bytes" if key[2] > best[2] else "fits, but is no quicker"


def _needs(ledger: Ledger, trial: Trial) -> str:
    told = lambda tier: f" of {size(room(trial.hardware, tier))}" if tier != "disk" or tier in trial.hardware.limits else ""
    return ", ".join(f"{size(ledger.peak(tier)[0])}{told(tier)} on the {tier}" for tier in TIERS if ledger.peak(tier)[0])


def _short(ledger: Ledger, trial: Trial) -> str:
    lacking = over(ledger, trial.hardware, *TIERS)
    return "needs " + " and ".join(f"{size(ledger.peak(t)[0])} on the {t}, which has {size(room(trial.hardware, t))}" for t in lacking)
