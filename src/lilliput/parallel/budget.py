"""A budget of bytes: a step's plan is made and judged before anything is loaded, and the meter counts every step against it.

    under     the objective under memory plans for the job's batch shape, made now
    planned   under one that keeps everything, where no room made one and the job has a budget; DoesNotFit with the budget that would do
    counted   what is there between steps joins the meter, which from then on refuses the first tensor that is too much

Predicted = what stands (Rig.standing: weights, buffers, moments, the step's tokens, its loss) + gradients of earlier micro-batches + the simulated
peak; or the update's own, all gradients and the numbers that clipping takes, where that is more. benchmarks/memory.md has both beside the metered bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from lilliput.base.errors import DoesNotFit
from lilliput.base.show import size
from lilliput.data.batch import MicroBatch
from lilliput.memory.plan import MemoryPlan
from lilliput.memory.planned import Choose, Planned
from lilliput.memory.profile import estimate, links
from lilliput.memory.simulate import Rates, Simulation
from lilliput.memory.stores import Store
from lilliput.memory.trace import Trace

if TYPE_CHECKING:
    from lilliput.parallel.rig import Rig

SCALARS = 8  # bytes of the schedule's own: the step's loss in fp64


def under(rig: Rig, choose: Choose, stores: Callable[[Trace], Mapping[str, Store]] = lambda trace: {}, rates: Rates | None = None) -> Rig:
    """The rig with its objective under plans for the job's batch shape, which are made now, so that what does not fit is refused before anything
    is loaded. A run that goes on keeps the plans that it began with (rig.plans). choose, stores: as memory.planned.Planned takes them; its trace
    has seconds from the machine's rates. rates: of the plan's seconds and joules; None = this machine's links."""
    rates = rates or links(rig.site.hardware)
    timed = lambda trace: choose(estimate(trace, rig.site.hardware))
    leave = rig.leaving()
    planned = Planned(rig.objective, timed, str(rig.device), rig.stored, stores, leave, rig.summon, rig.plans, rates, rig.meter)
    tokens_BT = torch.empty(rig.site.sequences, rig.site.tokens, dtype=torch.int64, device="meta")
    micro = MicroBatch(tokens_BT, tokens_BT.clone(), tokens_BT.numel())
    finds = (False, True) if rig.site.micro_batches > 1 and not leave else (False,)  # gradients of the micro-batches before
    try:
        made = [planned.prepare(rig.model, micro, gradients) for gradients in finds]
    except DoesNotFit:
        planned.prepare(rig.model, micro, finds[-1])  # which needs more: its refusal names what is enough for all
        raise
    plans = [complete(rig, ready.plan, ready.schedule.trace, ready.simulation, rates) for ready in made]
    tightest = max(plans, key=lambda plan: plan.predicted["bytes"])
    return replace(rig, objective=planned, plan=tightest, plans={plan.trace: plan for plan in plans})


def complete(rig: Rig, plan: MemoryPlan, trace: Trace, simulation: Simulation, rates: Rates) -> MemoryPlan:
    """A plan of activations with the rest: the bytes of the device in all, and the rates that its seconds come from."""
    waiting = sum(s.bytes for s in trace.storages if s.external and s.kind == "gradient")
    told = {f"{tier} {way}": speed for tier, link in rates.links.items() for way, speed in (("read", link.read), ("write", link.write)) if speed < float("inf")}
    joules = {"joules": simulation.joules} if simulation.joules else {}
    in_all = {"standing": float(rig.standing()), "bytes": float(max(rig.standing() + waiting + simulation.peak["device"], _update(rig)))}
    return replace(plan, predicted=dict(plan.predicted) | in_all | joules, rates=told, budget=dict(rig.meter.budget))


def _update(rig: Rig) -> int:
    """Bytes of the device while weights are updated, with everything that had left for the step back on it."""
    gradients = [torch.empty_like(p, dtype=rig.stored(name)) for name, p in rig.trainable().items() if rig.home(name).states == "device"]
    numbers = sum(2 * p.element_size() for p in gradients) + max((p.element_size() for p in gradients), default=0)  # norms, twice while stacked; of all
    return rig.standing() + sum(p.numel() * p.element_size() for p in gradients) + numbers


def planned(rig: Rig, evicts: bool) -> Rig:
    """A rig with a budget has a plan, and one that fits. evicts: moments leave the device when their room is needed."""
    limit = rig.meter.budget.get("device")
    if limit is None:
        return rig
    if rig.plan is None:
        rig = under(rig, lambda trace: ("keep everything", {}))
    needs = int(rig.plan.predicted["bytes"])
    least = max(needs - rig.moments(), _update(rig)) if evicts else needs
    if least > limit:
        why = f"weights, moments and what visits take {size(rig.standing())}, a micro-batch with its gradients {size(needs - rig.standing())}"
        raise DoesNotFit(f"a step does not fit in {size(limit)}", why, f"memory.device={least}B, or a smaller train.micro_batch", least)
    return rig


def counted(rig: Rig) -> Rig:
    """The rig of an assembled run whose meter knows what is there between steps. DoesNotFit where that is too much already."""
    if not rig.meter.budget:
        return rig
    visiting = {name: p for name, p in rig.model.named_parameters() if rig.home(name).tier != "device"}
    rig.meter.watch(visiting.values())
    state = getattr(rig.optimizer, "norms", {}) if rig.leaving() else rig.optimizer.state()  # of gradients that leave, their norms stay
    rig.meter.adopt([*(p for name, p in rig.model.named_parameters() if name not in visiting), *rig.model.buffers(), *state.values()])
    with rig.meter.placing("host"):
        rig.meter.adopt(rig.optimizer.held() if rig.leaving() else [])
    return rig
