"""Search: the largest micro-batch that fits, and the nearest edit of a job that makes it fit.

Edits are tried in the order of what they disturb: the micro-batch and rooms that recompute, move or divide (the numbers
stay), bf16 storage, rooms that set slots on the Linears (the mathematics changes), shorter sequences (the data changes).
Rooms come from the registry by name, at their defaults, where nobody refuses; a new room is offered by being registered.
One edit alone is tried first, then every two together; where none is enough, the strongest one again and again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from lilliput.base import registry
from lilliput.base.facts import Facts
from lilliput.base.hardware import Hardware
from lilliput.base.ledger import Ledger
from lilliput.base.protocols import Phase, Site, refusal
from lilliput.base.show import size
from lilliput.plan.ledgers import ELEMENT, fits, room, tiers, training_ledger

SHORTEST = 64  # tokens; no fix proposes shorter sequences


@dataclass(frozen=True)
class Fix:
    """An edit of the job: what to paste, the peak it leads to (bytes), and whether that fits."""

    words: str
    peak: int
    fits: bool


@dataclass(frozen=True)
class Trial:
    """One variant of a job: what the arithmetic needs, and the words that lead to it from the job as given."""

    facts: Facts
    hardware: Hardware
    tokens_per_step: int
    sequences: int
    tokens: int
    dtype: str
    rooms: Mapping[str, Any]
    words: tuple[str, ...] = ()

    @property
    def site(self) -> Site:
        """Where it runs, and the shape of a micro-batch."""
        return Site(self.hardware, {}, self.sequences, self.tokens, ELEMENT[self.dtype], self.micro_batches)

    @property
    def micro_batches(self) -> int:
        """Micro-batches of one optimizer step."""
        return max(1, self.tokens_per_step // (self.sequences * self.tokens))

    def ledger(self) -> Ledger:
        """Its cost."""
        return training_ledger(self.facts, self.site, self.rooms, self.dtype, self.micro_batches)

    def fix(self) -> Fix:
        """This variant as a proposal."""
        ledger = self.ledger()
        return Fix(" ".join(self.words), ledger.peak(*tiers(self.hardware))[0], fits(ledger, self.hardware))

    def edit(self, words: str, **fields: Any) -> Trial:
        """Another variant; its words replace earlier ones of the same key."""
        key = words.partition("=")[0]
        return replace(self, words=(*(w for w in self.words if w.partition("=")[0] != key), words), **fields)


def largest_micro_batch(trial: Trial) -> tuple[Trial, str]:
    """The largest power of two of sequences that divides a step and fits (1 where none does), and the reason in words."""
    most = size(room(trial.hardware))
    for sequences in _powers(trial):
        option = replace(trial, sequences=sequences)
        found = option.fix()
        if found.fits:
            return option, f"the largest power of two that divides a step of {trial.tokens_per_step:,} tokens and fits: {size(found.peak)} of {most}"
    return option, f"no micro-batch fits: one sequence needs {size(found.peak)} of {most}"


def fixes(trial: Trial) -> list[Fix]:
    """Edits that lower the peak: first those that fit, or the combination that does; none when nothing lowers it."""
    before = trial.fix().peak
    singles = sorted((fix for fix in (option.fix() for option in _options(trial)) if fix.peak < before), key=lambda fix: not fix.fits)
    if not singles or singles[0].fits:
        return singles
    found = next((fix for fix in (option.fix() for option in _pairs(trial)) if fix.fits), None) or _strongest(trial)
    return [found, *singles] if found else singles


def _pairs(trial: Trial) -> list[Trial]:
    """Two edits together, those that disturb least first."""
    ranked: list[tuple[int, Trial]] = []
    for first, option in enumerate(_options(trial)):
        key = option.words[0].partition("=")[0]
        seconds = [other for other in _options(option) if len(other.words) == 2 and other.words[1].partition("=")[0] != key]
        ranked += [(first + second, other) for second, other in enumerate(seconds)]
    return [option for _, option in sorted(ranked, key=lambda pair: pair[0])]


def _strongest(trial: Trial) -> Fix | None:
    """The strongest edit again and again, until it fits or nothing lowers the peak; None when that is a single edit."""
    best, found = trial, trial.fix()
    while not found.fits:
        peak, option = min(((option.fix().peak, option) for option in _options(best)), key=lambda pair: pair[0], default=(found.peak, best))
        if peak >= found.peak:
            break
        best, found = option, option.fix()
    return found if len(best.words) > 1 else None


def _powers(trial: Trial) -> list[int]:
    """Powers of two that divide the sequences of a step, largest first; 1 alone when a step is no whole number of sequences."""
    whole, rest = divmod(trial.tokens_per_step, trial.tokens)
    sequences = 1 if rest else whole
    return [1 << bit for bit in reversed(range((sequences & -sequences).bit_length()))]


def _options(trial: Trial) -> Iterator[Trial]:
    """Single edits, those that disturb least first."""
    smaller = [n for n in _powers(trial) if n < trial.sequences]
    if smaller:
        yield _first_that_fits([trial.edit(f"train.micro_batch={n}", sequences=n) for n in smaller])
    rooms = list(_rooms(trial))
    yield from (option for option, slots in rooms if not slots)
    if trial.dtype == "fp32":
        yield trial.edit("dtype=bf16", dtype="bf16")
    yield from (option for option, slots in rooms if slots)
    shorter = [trial.tokens >> bit for bit in range(1, trial.tokens.bit_length()) if trial.tokens % (1 << bit) == 0 and trial.tokens >> bit >= SHORTEST]
    if shorter:
        yield _first_that_fits([trial.edit(f"data.sequence={n}", tokens=n) for n in shorter])


def _first_that_fits(options: list[Trial]) -> Trial:
    """The first that fits, or the last."""
    return next((option for option in options if option.fix().fits), options[-1])


def _rooms(trial: Trial) -> Iterator[tuple[Trial, bool]]:
    """The job with one more room at its defaults, and whether that room sets slots (Phase.SWAP)."""
    for name in registry.names("train"):
        if name in trial.rooms:
            continue
        added = registry.find("train", name)()
        rooms = {**trial.rooms, name: added}
        refused = any(refusal(other, rooms, trial.facts) for other in rooms)
        if not refused and all(need in rooms for need in added.needs):
            yield trial.edit(f"{name}=on", rooms=rooms), Phase.SWAP in added.acts()
