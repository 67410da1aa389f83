"""What a training job will cost on one device, by arithmetic over its facts: no torch, no weights, milliseconds.

    base ledger (parameters, gradients, optimizer, activations, work) -> each room edits it, in phase order -> settle
    -> peak, its moment, the biggest terms, does it fit, and the nearest edit of the job that makes it fit

The rooms come from the job and from the registry; none is named here. Each fix is judged by the same arithmetic, so a
new room is offered as a fix as soon as it is registered.

Bytes: weights and gradients in the stored dtype, AdamW's two moments in fp32 (fp32: 16 bytes a parameter; bf16 with
stochastic rounding, no master copy: 12). Activations are those that facts.activations states for one micro-batch.
Seconds are a lower bound: the work at the device's peak rate.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from lilliput.base import registry
from lilliput.base.errors import UserError
from lilliput.base.facts import Activation, Facts
from lilliput.base.hardware import DeviceSpec, Hardware
from lilliput.base.job import Job
from lilliput.base.ledger import Lane, Ledger, Moment, Term
from lilliput.base.protocols import Phase, Site
from lilliput.base.show import size

ELEMENT = {"fp32": 4, "bf16": 2}  # bytes of a stored weight
ADAMW = 8  # bytes of optimizer state a trainable parameter: two fp32 moments
ROUNDING = 18  # bytes an element of the tensor being rounded to bf16: fp32 copies of weight and sum, random bits, masks (measured)
RESERVE, SHARE = 512 << 20, 0.05  # kept free for Python, torch and its workspaces; and for what an allocator cannot use
SHORTEST = 64  # tokens; no fix proposes shorter sequences


def budget(device: DeviceSpec) -> int:
    """Bytes that a plan may use: what is free on the device less 512 MiB, and less 5 %."""
    return max(0, round(device.free * (1 - SHARE)) - RESERVE)


def training_ledger(facts: Facts, site: Site, rooms: Mapping[str, Any], dtype: str, micro_batches: int = 1, optimizer: int = ADAMW) -> Ledger:
    """The ledger of one optimizer step of `micro_batches` micro-batches as `site` states them.

    dtype: "fp32" | "bf16", how weights are stored. optimizer: bytes of state a trainable parameter. UserError when the
    model states no activations or no flops.
    """
    ledger = _base(facts, site, ELEMENT[dtype], optimizer)
    whole = ledger.bytes("gradients")
    for room in _in_order(rooms):
        ledger = room.cost(ledger, facts, site)
    return _settle(ledger, facts, ledger.bytes("gradients") / whole, micro_batches, site)


def _base(facts: Facts, site: Site, element: int, optimizer: int) -> Ledger:
    if facts.activations is None or facts.flops is None:
        missing = "facts.activations" if facts.activations is None else "facts.flops"
        raise UserError(f"the {facts.family} model cannot be planned", f"it states no {missing}", "choose a decoder: lilliput plan model=smollm2-135m")
    count, largest = facts.parameters, max(math.prod(shape) for shape in facts.shapes.values())
    computed = 4 if site.hardware.device.kind == "cpu" else element
    terms = {
        "parameters": Term(count * element),
        "gradients": Term(count * element, moments=("backward", "update")),
        "optimizer": Term(count * optimizer, moments=("forward", "backward", "update")),
        "forward": Term(flops=facts.flops(site.sequences * site.tokens, site.tokens)),
        "one tensor loaded": Term(largest * 4, moments=("load",)),
    }
    if element < 4:
        terms["one tensor rounded"] = Term(largest * ROUNDING, moments=("update",))
    return Ledger(terms | dict(_activation(a, facts.layers) for a in facts.activations(site.sequences, site.tokens, computed)))


def _activation(a: Activation, layers: int) -> tuple[str, Term]:
    """Saved terms live from forward to backward. The turn from one to the other, where the loss's gradients are made, counts as forward."""
    if not a.saved:
        return f"transient.{a.name}", Term(a.size, moments=("backward",) if a.per == "block" else ("forward",))
    blocks = layers if a.per == "block" else 0
    return f"activations.{a.name}", Term(a.size * max(1, blocks), moments=("forward", "backward"), blocks=blocks)


def _in_order(rooms: Mapping[str, Any]) -> Iterator[Any]:
    """Rooms by their first phase, after those they need; ties by name."""
    waiting = dict(sorted(rooms.items(), key=lambda pair: (min(pair[1].acts()), pair[0])))
    while waiting:
        ready = next((n for n, room in waiting.items() if not any(need in waiting for need in room.needs)), None)
        if ready is None:
            raise UserError(f"rooms wait for each other: {', '.join(waiting)}", fix="switch one of them off")
        yield waiting.pop(ready)


def _settle(ledger: Ledger, facts: Facts, trained: float, micro_batches: int, site: Site) -> Ledger:
    """What follows from the folded terms: the work of a whole step, and which gradients are alive beside which activations.

    trained: gradient bytes as a share of those of the whole model; the backward pass needs as much as the forward one
    for the inputs' gradients, and this share of it for the weights'.
    """
    work = ledger.terms["forward"].flops
    ledger = ledger.put(backward=Term(flops=work * (1 + min(1.0, trained))))
    ledger = ledger.put(**{n: replace(t, flops=t.flops * micro_batches, traffic=t.traffic * micro_batches) for n, t in ledger.terms.items()})
    moved = ledger.bytes("optimizer") * 2 + ledger.bytes("gradients") + ledger.bytes("parameters") * 2 * min(1.0, trained)
    ledger = ledger.put(update=Term(traffic=moved))  # moments and trained weights are read and written, gradients read
    if "one tensor rounded" in ledger.terms:
        ledger = ledger.scale("one tensor rounded", min(1.0, trained))
    gradients = ledger.terms["gradients"]
    if micro_batches > 1:
        others = (micro_batches - 1) * site.sequences * site.tokens * 16  # int64 tokens and targets of the micro-batches that wait
        return ledger.put(gradients=replace(gradients, moments=("forward", *gradients.moments)), **{"batches that wait": Term(others, moments=("forward", "backward"))})
    # The only micro-batch: a segment of blocks frees its activations while its gradients come, so the two never add up.
    held = [t for t in ledger.terms.values() if t.blocks]
    blocks = max((t.blocks for t in held), default=0)
    inside = sum(math.prod(shape) for name, shape in facts.shapes.items() if name.startswith("layers.")) / facts.parameters
    coming = round(gradients.bytes * inside * blocks / max(1, facts.layers))
    return ledger.put(**{"gradients still to come": Term(-min(coming, sum(t.bytes for t in held)), moments=("backward",))})


@dataclass(frozen=True)
class Fix:
    """An edit of the job: what to paste, the peak it leads to, and whether that fits."""

    words: str
    peak: int
    fits: bool


@dataclass(frozen=True)
class Estimate:
    """The predicted cost of a training job on one device."""

    ledger: Ledger
    site: Site
    device: DeviceSpec
    budget: int  # bytes
    dtype: str
    micro_batches: int  # of one optimizer step
    reason: str  # why this many sequences are in a micro-batch; empty when the job says how many
    fixes: tuple[Fix, ...] = ()  # nearest first; none when it fits

    @property
    def peak(self) -> int:
        """Bytes at the worst moment."""
        return self.ledger.peak()[0]

    @property
    def moment(self) -> Moment:
        """The worst moment."""
        return self.ledger.peak()[1]

    @property
    def fits(self) -> bool:
        """Whether the peak is within the budget."""
        return self.peak <= self.budget

    @property
    def biggest(self) -> list[tuple[str, int]]:
        """The three terms that weigh most at the peak."""
        return self.ledger.biggest(3)

    @property
    def step_flops(self) -> float:
        """The model's own arithmetic of one optimizer step, forward and backward, nothing recomputed: what MFU counts."""
        return self.ledger.terms["forward"].flops + self.ledger.terms["backward"].flops

    @property
    def seconds(self) -> dict[Lane, float]:
        """Seconds of one step by lane, at the device's peak rates: a lower bound. A lane of unknown rate is left out."""
        rate = self.device.peak("fp32" if self.device.kind == "cpu" else self.dtype)
        links = self.site.hardware.links
        speeds: dict[Lane, float] = {"compute": self.device.bandwidth, "link": links.pcie, "disk": links.nvme_read}
        found: dict[Lane, float] = {}
        for lane, speed in speeds.items():
            terms = [t for t in self.ledger.terms.values() if t.lane == lane]
            flops, traffic = sum(t.flops for t in terms), sum(t.traffic for t in terms)
            if (flops or traffic) and (rate or not flops) and (speed or not traffic):
                found[lane] = (flops / rate if flops else 0.0) + (traffic / speed if traffic else 0.0)
        return found

    @property
    def settled(self) -> dict[str, tuple[Any, str]]:
        """Answers to the job's `auto` values: key -> (value, reason)."""
        return {"train.micro_batch": (self.site.sequences, self.reason)} if self.reason else {}

    def verdict(self) -> tuple[str, str, str]:
        """(what, why, fix) of the fault when it does not fit."""
        big = ", ".join(f"{name} {size(count)}" for name, count in self.biggest)
        why = f"needs {size(self.peak)} in the {self.moment} pass, {self.device.name} has {size(self.budget)} to use ({size(self.device.free)} free); biggest: {big}"
        nearest = next((fix for fix in self.fixes if fix.fits), None)
        if nearest is not None:
            return "the job does not fit", why, nearest.words
        least = min(self.fixes, key=lambda fix: fix.peak, default=None)
        tried = f"a smaller model or more memory; `{least.words}` comes nearest with {size(least.peak)}" if least else "a smaller model or more memory"
        return "the job does not fit, whatever is switched on", why, tried


@dataclass(frozen=True)
class _Trial:
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
        return Site(self.hardware, {}, self.sequences, self.tokens, ELEMENT[self.dtype])

    @property
    def micro_batches(self) -> int:
        return max(1, self.tokens_per_step // (self.sequences * self.tokens))

    def ledger(self) -> Ledger:
        return training_ledger(self.facts, self.site, self.rooms, self.dtype, self.micro_batches)

    def fix(self) -> Fix:
        peak = self.ledger().peak()[0]
        return Fix(" ".join(self.words), peak, peak <= budget(self.hardware.device))

    def edit(self, words: str, **fields: Any) -> _Trial:
        key = words.partition("=")[0]
        kept = tuple(w for w in self.words if w.partition("=")[0] != key)
        return replace(self, words=(*kept, words), **fields)


def estimate_training(job: Job, facts: Facts, hardware: Hardware) -> Estimate:
    """The cost of a job on one device of `hardware`; an `auto` micro-batch becomes the largest that fits.

    UserError when the job's device is not there or the model cannot be planned. Not fitting is an answer, not an error.
    """
    hardware = hardware.select(job.top.device)
    given = job.train.micro_batch
    trial = _Trial(facts, hardware, job.train.tokens_per_step, 1 if given == "auto" else given, job.data.sequence, job.top.dtype, job.rooms)
    reason = ""
    if given == "auto":
        trial, reason = _auto(trial)
    limit = budget(hardware.device)
    estimate = Estimate(trial.ledger(), trial.site, hardware.device, limit, trial.dtype, trial.micro_batches, reason)
    return estimate if estimate.fits else replace(estimate, fixes=tuple(_fixes(trial)))


def _auto(trial: _Trial) -> tuple[_Trial, str]:
    """The largest power of two of sequences that divides a step and fits, and the reason in words."""
    limit = size(budget(trial.hardware.device))
    sizes = _powers(trial.tokens_per_step, trial.tokens)
    for tried, sequences in enumerate(sizes):
        option = replace(trial, sequences=sequences)
        peak = option.ledger().peak()[0]
        if peak <= budget(trial.hardware.device):
            step = f"the largest power of two that divides a step of {trial.tokens_per_step} tokens"
            return option, f"{step}{' and fits' if tried else ''}: {size(peak)} of {limit}"
    return replace(trial, sequences=1), f"no micro-batch fits: one sequence needs {size(peak)} of {limit}"


def _powers(tokens_per_step: int, tokens: int) -> list[int]:
    """Powers of two that divide the sequences of a step, largest first; [1] when a step is no whole number of sequences."""
    sequences = tokens_per_step // tokens if tokens_per_step % tokens == 0 else 1
    return [1 << bit for bit in reversed(range((sequences & -sequences).bit_length()))]


def _fixes(trial: _Trial) -> list[Fix]:
    """Edits that lower the peak, tried alone; where none fits alone, first the combination that takes the best one again and again."""
    before = trial.ledger().peak()[0]
    singles = [fix for fix in (option.fix() for option in _options(trial)) if fix.peak < before]
    singles.sort(key=lambda fix: not fix.fits)  # stable: fitting ones first, else in the order of the options
    if not singles or singles[0].fits:
        return singles
    best, peak = trial, before
    while True:
        option = min(_options(best), key=lambda o: o.fix().peak, default=best)
        found = option.fix()
        if found.peak >= peak:
            return singles if len(best.words) < 2 else [best.fix(), *singles]
        best, peak = option, found.peak
        if found.fits:
            return [found, *singles]


def _options(trial: _Trial) -> Iterator[_Trial]:
    """Single edits of a job. First what leaves the numbers as they are, then what changes how they are computed, then the data's shape."""
    smaller = [n for n in _powers(trial.tokens_per_step, trial.tokens) if n < trial.sequences]
    if smaller:
        yield _largest([trial.edit(f"train.micro_batch={n}", sequences=n) for n in smaller])
    rooms = list(_rooms(trial))
    yield from (option for option, slots in rooms if not slots)
    if trial.dtype == "fp32":
        yield trial.edit("dtype=bf16", dtype="bf16")
    yield from (option for option, slots in rooms if slots)
    shorter = [trial.tokens >> bit for bit in range(1, trial.tokens.bit_length()) if trial.tokens % (1 << bit) == 0 and trial.tokens >> bit >= SHORTEST]
    if shorter:
        yield _largest([trial.edit(f"data.sequence={n}", tokens=n) for n in shorter])


def _largest(options: list[_Trial]) -> _Trial:
    """The first that fits, or the last."""
    return next((option for option in options if option.fix().fits), options[-1])


def _rooms(trial: _Trial) -> Iterator[tuple[_Trial, bool]]:
    """The job with one more room at its defaults, for every room that nobody refuses; and whether it sets slots on the Linears.

    Rooms that act in Phase.SWAP change the mathematics; the others recompute, move or divide what is there.
    """
    for name in registry.names("train"):
        if name in trial.rooms:
            continue
        room = registry.find("train", name)()
        rooms = {**trial.rooms, name: room}
        if any(need not in rooms for need in room.needs):
            continue
        if any(r.refuses({k: v for k, v in rooms.items() if k != n}, trial.facts) for n, r in rooms.items()):
            continue
        yield trial.edit(f"{name}=on", rooms=rooms), Phase.SWAP in room.acts()
