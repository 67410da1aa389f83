"""A published system, as the table of `lilliput papers` shows it.

Nothing is marked as working by hand: a paper works when it has a `run` that measures its claim here and every room
that it names is registered; in part, where what its claim rests on is not all here. Numbers in `claim` are the
authors', measured on their machines; ours come from `run`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from lilliput.base import registry


@dataclass(frozen=True)
class Finding:
    """What one `run` measured here, beside what was published."""

    summary: str  # one sentence with our numbers
    rows: tuple[Mapping[str, str | int | float], ...]  # the table behind it, all rows with the same keys
    holds: bool  # the claim's shape shows up on this machine


@dataclass(frozen=True)
class Paper:
    """Reference, claim and switch of one system. `run` is None until the system is built here."""

    name: str  # what `lilliput papers NAME` takes
    system: str  # the authors' name for it
    title: str
    authors: str
    year: int
    where: str  # venue and arXiv id or DOI
    claim: str  # one sentence with the published number
    measured: str = ""  # one sentence with our numbers, the `summary` of the run (a test holds it to that)
    switches: tuple[str, ...] = ()  # config keys that turn it on, "section.key=value"; empty when nothing has to be asked for
    lacks: str = ""  # what of the claim nothing here can do yet; empty when the whole of it can be switched on
    run: Callable[[], Finding] | None = None

    @property
    def sections(self) -> tuple[str, ...]:
        """The config sections behind the switches."""
        return tuple(dict.fromkeys(switch.partition(".")[0] for switch in self.switches))

    @property
    def runs(self) -> bool:
        """There is a run that measures the claim or a part of it, and every section it switches on is a registered room, or `serve`."""
        registered = {"serve"}.union(*registry.ROOMS.values())
        return self.run is not None and registered.issuperset(self.sections)

    @property
    def works(self) -> bool:
        """It runs and lacks nothing."""
        return self.runs and not self.lacks

    @property
    def status(self) -> str:
        """`works`, `in part` or `not yet`."""
        return "works" if self.works else "in part" if self.runs else "not yet"
