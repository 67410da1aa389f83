"""The base ledgers: what a training step and a serving engine hold on one device, and how rooms edit them.

Training, bytes a parameter: weight and gradient in the stored dtype, AdamW's two moments in fp32: fp32 16, bf16 (with
stochastic rounding, no master copy) 12. Activations are what facts.activations states for one micro-batch.

    term                moments                      note
    parameters          all
    gradients           backward update              and forward, when several micro-batches add up
    optimizer           forward backward update
    activations.*       forward backward             what loss and head keep: forward; what is recomputed: backward
    transient.*         one                          the turn from forward to backward counts as forward
    gradients not yet   backward, negative           those that come only while activations go: the two never add up
    forward backward update                          work: flops and traffic of one optimizer step

Rooms edit the ledger in phase order, each a pure function; what depends on all of them is settled last.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from lilliput.base.errors import UserError
from lilliput.base.facts import Activation, Facts
from lilliput.base.hardware import DeviceSpec, Hardware
from lilliput.base.ledger import Lane, Ledger, Term, Tier
from lilliput.base.protocols import Site, in_order
from lilliput.ops import native

ELEMENT = {"fp32": 4, "bf16": 2}  # bytes of a stored weight
ADAMW = 8  # bytes of optimizer state a trainable parameter: two fp32 moments
ROUNDING = 19  # bytes an element of the bf16 tensor that is being updated: its fp32 copies, random bits, masks (measured); the compiled AdamW needs none
RESERVE, SHARE = 512 << 20, 0.05  # kept free for Python, torch and its workspaces; and for what an allocator cannot use


def budget(device: DeviceSpec) -> int:
    """Bytes that a plan may use: what is free on the device less 5 %, less 512 MiB."""
    return max(0, round(device.free * (1 - SHARE)) - RESERVE)


def room(hardware: Hardware, tier: Tier = "device") -> int:
    """Bytes that a plan may use in a tier: the job's own limit, else the budget of what is free."""
    if tier in hardware.limits:
        return hardware.limits[tier]
    if tier == "device":
        return budget(hardware.device)
    taken = hardware.limits.get("device", 0) if hardware.device.kind == "cpu" else 0
    return max(0, budget(hardware.host) - taken)


def tiers(hardware: Hardware) -> tuple[Tier, ...]:
    """The tiers that lie in the device's memory: what a CPU's job leaves to the host is in the same one, unless the job says how much of it is which."""
    return ("device", "host") if hardware.device.kind == "cpu" and not hardware.limits else ("device",)


def fits(ledger: Ledger, hardware: Hardware) -> bool:
    """Whether the peak is within what the device, its host and the disk may use."""
    return ledger.peak(*tiers(hardware))[0] <= room(hardware) and not over(ledger, hardware, "host", "disk")


def over(ledger: Ledger, hardware: Hardware, *among: Tier) -> dict[Tier, int]:
    """Tier -> bytes that it lacks, of those tiers that have too few. A disk that nobody named is as large as it takes."""
    apart = [tier for tier in among if tier not in tiers(hardware)[1:] and (tier != "disk" or tier in hardware.limits)]
    return {tier: lacking for tier in apart if (lacking := ledger.peak(tier)[0] - room(hardware, tier)) > 0}


def training_ledger(facts: Facts, site: Site, rooms: Mapping[str, Any], dtype: str, micro_batches: int = 1, optimizer: int = ADAMW) -> Ledger:
    """The ledger of one optimizer step of `micro_batches` micro-batches of the shape that `site` states.

    dtype: "fp32" | "bf16", how weights are stored. optimizer: bytes of state a trainable parameter. UserError when the
    model states no activations or no flops.
    """
    ledger = _base(facts, site, ELEMENT[dtype], optimizer)
    whole = ledger.bytes("gradients")
    by_phase = dict(sorted(rooms.items(), key=lambda pair: (min(pair[1].acts()), pair[0])))
    for _, room in in_order(by_phase):
        ledger = room.cost(ledger, facts, site)
    away = ledger.terms["gradients"].tier != "device"  # such a room trains every weight
    trained = 1.0 if away else min(1.0, ledger.bytes("gradients") / whole)
    ledger = _work(ledger, trained, micro_batches, site.hardware)
    compiled = native.missing() is None and site.hardware.device.kind == "cpu"
    rounding = 0 if dtype == "fp32" or compiled else ROUNDING
    return _gradients(ledger, facts, trained, rounding, micro_batches, site.sequences * site.tokens, ELEMENT[dtype])


def serving_ledger(facts: Facts, site: Site, batch_tokens: int, weights: int = 0, kv_token: int = 0) -> Ledger:
    """The ledger of an engine that holds site.sequences requests of site.tokens tokens each; work is that of one new token of each.

    weights: bytes of all of them; 0 = site.element each. kv_token: bytes of a token's keys and values; 0 = as computed, and
    activations are computed in fp32 on CPUs. batch_tokens: tokens of one engine step. Activations are an upper bound: a block's
    saved terms, though inference frees most of them earlier.
    """
    if facts.kv is None or facts.activations is None or facts.flops is None:
        missing = next(name for name in ("kv", "activations", "flops") if getattr(facts, name) is None)
        raise UserError(f"the {facts.family} model cannot be planned for serving", f"it states no facts.{missing}", "choose a decoder: model=smollm2-135m")
    computed = site.computed
    rows = min(batch_tokens, site.sequences * site.tokens)
    block = sum(a.size for a in facts.activations(1, rows, computed) if a.per == "block" and a.saved)
    weights = weights or facts.parameters * site.element
    kv = (kv_token or facts.kv.bytes_per_token(computed)) * site.sequences * site.tokens
    return Ledger(
        {
            "parameters": Term(weights, traffic=float(weights)),
            "kv": Term(kv, traffic=float(kv)),
            "activations.one block": Term(block, moments=("forward",)),
            "activations.logits": Term(2 * site.sequences * facts.vocab * 4, moments=("forward",)),
            "forward": Term(flops=site.sequences * facts.flops(1, site.tokens)),
        }
    )


def _base(facts: Facts, site: Site, element: int, optimizer: int) -> Ledger:
    if facts.activations is None or facts.flops is None:
        missing = "activations" if facts.activations is None else "flops"
        raise UserError(f"the {facts.family} model cannot be planned", f"it states no facts.{missing}", "choose a decoder: model=smollm2-135m")
    activations = facts.activations(site.sequences, site.tokens, site.computed)
    terms = {
        "parameters": Term(facts.parameters * element),
        "gradients": Term(facts.parameters * element, moments=("backward", "update")),
        "optimizer": Term(facts.parameters * optimizer, moments=("forward", "backward", "update")),
        "forward": Term(flops=facts.flops(site.sequences * site.tokens, site.tokens)),
        "transient.one tensor loaded": Term(_largest(facts) * 4, moments=("load",)),
    }
    return Ledger(terms | dict(_activation(a, facts.layers) for a in activations))


def _activation(a: Activation, layers: int) -> tuple[str, Term]:
    if not a.saved:
        return f"transient.{a.name}", Term(a.size, moments=("backward",) if a.per == "block" else ("forward",))
    blocks = layers if a.per == "block" else 0
    return f"activations.{a.name}", Term(a.size * max(1, blocks), moments=("forward",) if a.early else ("forward", "backward"), blocks=blocks)


def _work(ledger: Ledger, trained: float, micro_batches: int, hardware: Hardware) -> Ledger:
    """Rooms count one micro-batch; this makes it a step. `trained`: share of the gradients that are made."""
    forward = ledger.terms["forward"].flops  # once more for the gradients of the inputs, and once for those of the weights
    ledger = ledger.put(backward=Term(flops=forward * (1 + trained)))
    ledger = ledger.put(**{name: term.times(micro_batches) for name, term in ledger.terms.items()})
    moved = 2 * ledger.bytes("optimizer") + ledger.bytes("gradients") + 2 * trained * ledger.bytes("parameters")
    lane: Lane = "compute" if ledger.terms["optimizer"].tier in tiers(hardware) or hardware.device.kind == "cpu" else "host"
    return ledger.put(update=Term(traffic=moved, lane=lane))  # moments and weights are read and written, gradients read


def _gradients(ledger: Ledger, facts: Facts, trained: float, rounding: int, micro_batches: int, tokens: int, element: int) -> Ledger:
    """Which gradients are alive beside which activations.

    Several micro-batches: all of them, always. One: a segment of blocks frees its activations while its gradients come,
    and what falls along the whole backward pass is gone by the time the gradients of the other blocks are there. Those of
    what stands before the blocks come when all activations are gone. Where the head is tied, its share waits for the
    embedding's (the model's transients count it, which is too much when the table is frozen), and their sum is the last
    thing the backward pass makes. Gradients that leave the device as they come take nothing of this.
    """
    if micro_batches > 1:
        waiting = Term((micro_batches - 1) * tokens * 16, moments=("forward", "backward"))  # int64 tokens and targets
        ledger = ledger.put(**{"waiting micro-batches": waiting})
    gradients = ledger.terms["gradients"]
    if gradients.tier != "device":
        return ledger
    each = gradients.bytes / facts.parameters
    tied = sum(_count(facts, lambda name, group=group: name in group) for group in facts.tied)  # type: ignore[misc]
    absent = tied * element * (1 - trained)
    if micro_batches > 1:
        ledger = ledger.put(gradients=replace(gradients, moments=("forward", *gradients.moments)))
    else:
        held = [t for t in ledger.terms.values() if t.blocks]
        whole = each * _count(facts, lambda name: name.startswith("layers."))
        inside = whole * max((t.blocks for t in held), default=0) / max(1, facts.layers)
        early = facts.chain[: facts.chain.index("layers.*")] if "layers.*" in facts.chain else ()
        absent += each * _count(facts, lambda name: name.split(".")[0] in early) + min(inside, sum(t.bytes for t in held))
        absent += min(whole - inside, sum(t.bytes for t in ledger.terms.values() if t.falling))
    last = max(2 * tied * each, trained * rounding * _largest(facts))
    return ledger.put(
        **{"gradients not yet": Term(-round(absent), moments=("backward",)), "transient.one tensor updated": Term(round(last), moments=("update",))}
    )


def _count(facts: Facts, wanted: Callable[[str], bool]) -> int:
    return sum(count for name, count in facts.counts.items() if wanted(name))


def _largest(facts: Facts) -> int:
    return max(facts.counts.values())
