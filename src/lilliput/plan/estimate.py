"""Estimate: what a job will cost on one device, before it runs. Arithmetic over facts: no torch, no weights, milliseconds.

    base ledger -> rooms edit it -> peak, its moment, the biggest terms -> does it fit, and if not, the nearest fix

Predicted bytes are held to measured ones by tests (parameters, gradients, optimizer exactly; activations within 10 %).
Seconds are a lower bound: all work at the device's peak rates.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from lilliput.base.errors import DoesNotFit
from lilliput.base.facts import Facts
from lilliput.base.hardware import DeviceSpec, Hardware
from lilliput.base.job import Job
from lilliput.base.ledger import Lane, Ledger, Moment
from lilliput.base.protocols import Site
from lilliput.base.show import size
from lilliput.plan.choose import Choice, choose
from lilliput.plan.ledgers import ELEMENT, fits, over, room, serving_ledger, tiers, training_ledger
from lilliput.plan.search import Fix, Trial, fixes, largest_micro_batch


@dataclass(frozen=True)
class Fit:
    """A ledger held against the device it is for; what both estimates below say."""

    ledger: Ledger
    site: Site

    @property
    def device(self) -> DeviceSpec:
        """The device that computes."""
        return self.site.hardware.device

    @property
    def budget(self) -> int:
        """Bytes it may use."""
        return room(self.site.hardware)

    @property
    def peak(self) -> int:
        """Bytes at the worst moment (on a CPU those of the host tier too, which are in the same memory)."""
        return self.ledger.peak(*tiers(self.site.hardware))[0]

    @property
    def moment(self) -> Moment:
        """The worst moment."""
        return self.ledger.peak(*tiers(self.site.hardware))[1]

    @property
    def fits(self) -> bool:
        """Whether the peak is within the budget, and what lies on the host within the host's."""
        return fits(self.ledger, self.site.hardware)

    @property
    def biggest(self) -> list[tuple[str, int]]:
        """The three terms that weigh most at the peak."""
        return self.ledger.biggest(3, *tiers(self.site.hardware))


@dataclass(frozen=True)
class Estimate(Fit):
    """The predicted cost of a training job on one device."""

    dtype: str
    micro_batches: int  # of one optimizer step
    reason: str = ""  # why this many sequences are in a micro-batch; empty when the job says how many
    fixes: tuple[Fix, ...] = ()  # nearest first; none when it fits
    rooms: Mapping[str, Any] = field(default_factory=dict)  # the job's, and those that were chosen
    choice: Choice | None = None  # where the job said how much memory it may use

    @property
    def fits(self) -> bool:
        """As every estimate has it; not where a plan to the byte has refused every set of sections."""
        return super().fits and (self.choice is None or self.choice.fits)

    @property
    def step_flops(self) -> float:
        """The model's own arithmetic of one optimizer step, forward and backward, nothing recomputed: what MFU counts."""
        return self.ledger.terms["forward"].flops + self.ledger.terms["backward"].flops

    @property
    def seconds(self) -> dict[Lane, float]:
        """Seconds of one step by lane at peak rates; the lanes overlap, so the step takes at least the longest. Unknown rates are left out."""
        return lanes(self.ledger, self.site.hardware, self.dtype)

    @property
    def settled(self) -> dict[str, tuple[Any, str]]:
        """Answers to the job's `auto` values: key -> (value, reason)."""
        return {"train.micro_batch": (self.site.sequences, self.reason)} if self.reason else {}

    def verdict(self) -> tuple[str, str, str]:
        """(what, why, fix) of the fault when it does not fit."""
        big = ", ".join(f"{name} {size(count)}" for name, count in self.biggest)
        most = f"{self.device.name} has {size(self.budget)} to use ({size(self.device.free)} free)"
        why = f"needs {size(self.peak)} at its peak ({self.moment}), {most}; biggest: {big}"
        tier = next(iter(over(self.ledger, self.site.hardware, "host", "disk")), None)
        if self.peak <= self.budget and tier is not None:
            host = self.site.hardware.host
            whose = f"{host.name} has" if tier == "host" else "its folder has"
            free = f" ({size(host.free)} free)" if tier == "host" else ""
            why = f"the {tier} needs {size(self.ledger.peak(tier)[0])}, {whose} {size(room(self.site.hardware, tier))} to use{free}"
        least = self.choice.least if self.choice else ""
        nearest = min(self.fixes, key=lambda fix: (not fix.fits, 0 if fix.fits else fix.peak), default=None)
        if least or (nearest is not None and nearest.fits):
            edit = nearest.words if nearest is not None and nearest.fits else ""
            return "the job does not fit", why, ", or ".join(filter(None, (least and f"{least} (the least that it takes)", edit)))
        tried = "a smaller model, or a device with more memory"
        return "the job does not fit", why, f"{tried} ({nearest.words} comes nearest: {size(nearest.peak)})" if nearest else tried


@dataclass(frozen=True)
class ServingEstimate(Fit):
    """The predicted cost of serving on one device; `site` has the sequences at a time and the tokens of each."""

    max_context: int  # longest context that fits with this many sequences, at most the model's; 0 when not even one token does
    max_sequences: int  # most sequences of this context that fit

    @property
    def tokens_per_second(self) -> float | None:
        """New tokens a second over all sequences, at most: weights and cache are read once a step. None when a rate is unknown."""
        dtype = next((name for name, element in ELEMENT.items() if element == self.site.element), "fp32")
        spent = lanes(self.ledger, self.site.hardware, dtype)
        return self.site.sequences / max(spent.values()) if spent else None


def estimate_training(job: Job, facts: Facts, hardware: Hardware, refused: Mapping[str, DoesNotFit] | None = None) -> Estimate:
    """The cost of a job on one device of `hardware`; an `auto` micro-batch becomes the largest that fits. refused: as plan.choose takes it.

    UserError when the job's device is not there or the model cannot be planned. Not fitting is an answer, not an error.
    """
    given, reason, choice = job.train.micro_batch, "", None
    machine = replace(hardware.select(job.top.device).reaching(job.folders()), limits=job.memory.limits())
    trial = Trial(
        facts, machine, job.train.tokens_per_step, given if isinstance(given, int) else 1, job.data.sequence, job.top.dtype, job.rooms
    )
    if machine.limits:
        seconds = lambda ledger, option: max(lanes(ledger, machine, option.dtype).values(), default=0.0)
        trial, choice = choose(trial, given == "auto", job.memory.disk, seconds, refused)
    if given == "auto":
        trial, reason = largest_micro_batch(trial)
    ledger = training_ledger(facts, trial.site, trial.rooms, trial.dtype, trial.micro_batches)
    estimate = Estimate(ledger, trial.site, trial.dtype, trial.micro_batches, reason, rooms=trial.rooms, choice=choice)
    return estimate if estimate.fits else replace(estimate, fixes=tuple(fixes(trial)))


def estimate_serving(
    facts: Facts, hardware: Hardware, sequences: int, context: int, element: int = 4, batch_tokens: int = 512, weights: int = 0, kv_token: int = 0
) -> ServingEstimate:
    """The cost of serving `sequences` requests at a time with `context` tokens each, weights stored in `element` bytes.

    hardware: its first device serves (Hardware.select chooses). batch_tokens: tokens of one engine step. weights, kv_token:
    bytes where storage is not `element` bytes a number (plan/serving.py).
    """

    def build(sequences: int, context: int) -> ServingEstimate:
        site = Site(hardware, {}, sequences, context, element)
        return ServingEstimate(serving_ledger(facts, site, batch_tokens, weights, kv_token), site, 0, 0)

    longest = _most(lambda n: build(sequences, n).fits, facts.context)
    most = _most(lambda n: build(n, context).fits, 1 << 24)
    return replace(build(sequences, context), max_context=longest, max_sequences=most)


def lanes(ledger: Ledger, hardware: Hardware, dtype: str) -> dict[Lane, float]:
    """Seconds of the ledger's work by lane at the peak rates of the hardware; lanes without work or with an unknown rate are left out.

    A term's own speed (a setting that slows its lane down) goes before the hardware's, where it is the slower one or the only one."""
    rate = hardware.device.peak("fp32" if hardware.device.kind == "cpu" else dtype)
    links = hardware.links
    speeds: dict[Lane, float] = {"compute": hardware.device.bandwidth, "host": hardware.host.bandwidth, "link": links.pcie, "disk": links.nvme_read}
    found: dict[Lane, float] = {}
    for lane, speed in speeds.items():
        terms = [t for t in ledger.terms.values() if t.lane == lane and (t.flops or t.traffic)]
        known = all((rate or not t.flops) and (t.speed or speed or not t.traffic) for t in terms)
        if terms and known:
            slower = lambda t, given: min(filter(None, (t.speed, given)))
            read = sum((t.traffic - t.written) / slower(t, speed) for t in terms if t.traffic)
            write = sum(t.written / slower(t, links.nvme_write or speed) for t in terms if t.written)
            found[lane] = (sum(t.flops for t in terms) / rate if rate else 0.0) + read + write
    return found


def _most(good: Callable[[int], bool], limit: int) -> int:
    """The largest number of 1..limit that is good, where all smaller ones are good too; 0 when 1 is not."""
    low, high = 0, limit + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if good(middle) else (low, middle)
    return low
