"""Report: an estimate in words, as table rows and as JSON. The three sentences: does it fit, what weighs most, the nearest fix."""

from __future__ import annotations

from typing import Any

from lilliput.base.ledger import Term
from lilliput.base.show import count, size
from lilliput.plan.estimate import Estimate, ServingEstimate
from lilliput.plan.ledgers import tiers

COLUMNS = ("term", "bytes", "share", "bar", "alive", "tier")  # of rows(), for Show.table
WIDTH = 30  # characters of the longest bar


def rows(estimate: Estimate | ServingEstimate) -> list[dict[str, Any]]:
    """A row for each term that holds bytes, largest first, and the peak; `share` is of the budget, so 100 % is a full device."""
    terms = [(name, term) for name, term in estimate.ledger.terms.items() if term.bytes]
    top = max(estimate.peak, 1)
    return [
        *(_row(name, term, estimate, top) for name, term in sorted(terms, key=lambda pair: -pair[1].bytes)),
        {
            "term": "PEAK",
            "bytes": size(estimate.peak),
            "share": _share(estimate.peak, estimate),
            "bar": _bar(estimate.peak, top),
            "alive": estimate.moment,
            "tier": "device",
        },
    ]


def sentences(estimate: Estimate | ServingEstimate) -> tuple[str, str, str]:
    """(fits or not, the three biggest terms, the nearest fix or what else is worth knowing)."""
    device = f"{estimate.device.name} has {size(estimate.budget)} to use of {size(estimate.device.free)} free"
    verdict = f"{'Fits' if estimate.fits else 'Does not fit'}: {size(estimate.peak)} at the peak ({estimate.moment}); {device}."
    big = "Biggest at the peak: " + ", ".join(f"{name} {size(weight)}" for name, weight in estimate.biggest) + "."
    return verdict, big, _training(estimate) if isinstance(estimate, Estimate) else _serving(estimate)


def chosen(estimate: Estimate | ServingEstimate) -> list[str]:
    """What was added to the job to make it fit, and the reason for everything that was not."""
    return estimate.choice.lines() if isinstance(estimate, Estimate) and estimate.choice else []


def moves(estimate: Estimate | ServingEstimate) -> list[str]:
    """What crosses a link or goes to a disk in a step, how fast that is, and how it is known."""
    ledger, hardware = estimate.ledger, estimate.site.hardware
    if not ledger.moved():
        return []
    used = {t.lane for t in ledger.terms.values() if t.traffic} & {"link", "disk"}
    throttled = min((t.speed for t in ledger.terms.values() if t.speed), default=0.0)
    speed = lambda rate, what: f"{what} {size(rate)}/s" if rate else f"{what} of unknown speed"
    words = []
    if "link" in used:
        words.append(speed(min(filter(None, (throttled, hardware.links.pcie)), default=0.0), "link to the host at"))
    if "disk" in used:
        words += [speed(hardware.links.nvme_read, "disk reads at"), speed(hardware.links.nvme_write, "writes at")]
    source = ", ".join(name for name in hardware.estimated if name.startswith(tuple(used))) or hardware.source
    return [f"Moves {size(ledger.moved())} a step: {', '.join(words)} ({'as set' if throttled else source})."]


def to_dict(estimate: Estimate | ServingEstimate) -> dict[str, Any]:
    """The estimate as plain values for --json; bytes, flops and seconds are numbers."""
    site = estimate.site
    shared = {
        "fits": estimate.fits, "peak_bytes": estimate.peak, "moment": estimate.moment, "budget_bytes": estimate.budget,
        "device": {"kind": estimate.device.kind, "name": estimate.device.name, "free_bytes": estimate.device.free, "memory_bytes": estimate.device.memory},
        "sequences": site.sequences, "tokens": site.tokens, "estimated": list(site.hardware.estimated),
        "biggest": [{"term": name, "bytes": weight} for name, weight in estimate.biggest],
        "links": {"host": site.hardware.links.pcie, "disk_read": site.hardware.links.nvme_read, "disk_write": site.hardware.links.nvme_write},
        "terms": {name: _plain(term) for name, term in estimate.ledger.terms.items()},
    }  # fmt: skip
    if isinstance(estimate, ServingEstimate):
        return shared | {"max_context": estimate.max_context, "max_sequences": estimate.max_sequences, "tokens_per_second_at_most": estimate.tokens_per_second}
    return shared | {
        "dtype": estimate.dtype, "micro_batches": estimate.micro_batches, "reason": estimate.reason,
        "step_flops": estimate.step_flops, "seconds_at_least": dict(estimate.seconds),
        **({"chosen": estimate.choice.lines()} if estimate.choice else {}),
        "fixes": [{"words": fix.words, "peak_bytes": fix.peak, "fits": fix.fits} for fix in estimate.fixes],
    }  # fmt: skip


def _training(estimate: Estimate) -> str:
    if not estimate.fits:
        nearest = estimate.verdict()[2]
        peak = next((f" (peak {size(fix.peak)})" for fix in estimate.fixes if fix.words == nearest), "")
        tried = "; ".join(f"{fix.words} {size(fix.peak)}{'' if fix.fits else ' (does not fit)'}" for fix in estimate.fixes if fix.words != nearest)
        return f"Nearest fix: {nearest}{peak}." + (f" Also tried: {tried}." if tried else "")
    shape = f"One step is {estimate.micro_batches} x {estimate.site.sequences} sequences of {estimate.site.tokens} tokens"
    seconds = estimate.seconds
    if not seconds:
        return f"{shape}, {count(estimate.step_flops)} flops; the device's rates are unknown."
    lane = max(seconds, key=lambda name: seconds[name])
    guess = ", which are estimated themselves" if estimate.site.hardware.estimated and estimate.device.kind == "cpu" else ""
    return f"{shape}, {count(estimate.step_flops)} flops: at least {seconds[lane]:.3g} s ({lane} lane; an estimate at the device's peak rates{guess})."


def _serving(estimate: ServingEstimate) -> str:
    site = estimate.site
    speed = estimate.tokens_per_second
    rate = f"; at most {speed:,.0f} new tokens/s (an estimate at the device's peak rates)" if speed else ""
    room = f"room for {estimate.max_context:,} tokens each, or for {estimate.max_sequences:,} sequences of {site.tokens:,}"
    return f"{site.sequences} x {site.tokens:,} tokens of context asked; {room}{rate}."


def _row(name: str, term: Term, estimate: Estimate | ServingEstimate, top: int) -> dict[str, Any]:
    share = _share(term.bytes, estimate) if term.tier in tiers(estimate.site.hardware) else ""
    return {"term": name, "bytes": size(term.bytes), "share": share, "bar": _bar(term.bytes, top), "alive": " ".join(term.moments), "tier": term.tier}


def _share(weight: int, estimate: Estimate | ServingEstimate) -> str:
    return f"{weight / estimate.budget:.1%}" if estimate.budget else "no room"


def _bar(weight: int, top: int) -> str:
    return "#" * min(WIDTH, round(WIDTH * max(0, weight) / top))


def _plain(term: Term) -> dict[str, Any]:
    work = {"flops": term.flops, "traffic": term.traffic, "written": term.written}
    return {"bytes": term.bytes, "tier": term.tier, "alive": list(term.moments), **work, "lane": term.lane}
