"""ZeRO-Offload: the device keeps bf16 weights and computes; gradients, fp32 masters, both Adam moments and the update are the host's.

Why this cut: of all partitions of mixed-precision Adam's data flow it is the one that moves the least (4 bytes a parameter and step:
gradients down, weights up, both bf16) and frees the most (2 bytes a parameter stay of 16); memory/planners/mincut.py tries them all.
Gradients leave one by one while the backward pass goes on; the host's AdamW goes tile by tile, and weights go back while the next
tile is computed (parallel/offloaded.py). The numbers are those of the same mixed precision kept in one memory, bit for bit.
delay = N: from step N on the update of step i runs beside step i + 1, which still computes with the weights of step i - 1. It
hides the host's update, and new weights go up while the backward pass moves on from the old ones, so it hides most of the link
too; the first steps, where gradients change fast, should not have it (the paper: N = 40). A late gradient costs more loss the larger
the rate is; predict (on, not the paper's) sends up where the same update made again would lead, which wins most of it back.
Cost: the link's time, and 14 bytes a parameter of the host's memory (18 with a delay; 16 and 22 with several
micro-batches a step). CPUs compute in fp32 (a bf16 weight is
widened for its product), and there device and host are the same memory: it saves bytes only of a device that is a budget.
Master weights are what the run writes into model/. Skip it when the optimizer fits beside the weights.

Ren et al. 2021, USENIX ATC 2021, arXiv 2101.06840. Published: 13B on one 32 GB V100 instead of 1.4B.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from lilliput.base.config import Section
from lilliput.base.facts import Facts
from lilliput.base.ledger import Ledger, Term, largest_two
from lilliput.base.protocols import Phase, Site
from lilliput.base.show import parse_size

if TYPE_CHECKING:
    from torch import Tensor

    from lilliput.memory.plan import Row
    from lilliput.parallel.offloaded import HostAdamW
    from lilliput.parallel.rig import Rig

WEIGHT, STATE = 2, 12  # bytes a parameter: on the device; masters and moments on the host
ALONE = ("lora", "qlora")  # rooms under which so little learns that nothing is worth sending away


class Offload(Section):
    """Fields are the knobs; see the module's lesson."""

    needs: ClassVar[tuple[str, ...]] = ()

    states: Literal["optimizer"] = Field("optimizer", description="what the host has: gradients, master weights, moments and the update")
    delay: int | Literal["off"] = Field("off", description="step from which on the update runs beside the next step; off = never")
    predict: bool = Field(True, description="with a delay: compute with weights to which the last update is added once more, for the one that waits")
    tile: int = Field(1 << 20, ge=4096, multiple_of=4096, description="parameters of one copy back to the device")
    link: str = Field("", description="slows the link down to so many bytes/s each way (12GB); empty = as fast as it goes")

    @classmethod
    def within(cls, device: int, folder: str) -> list[Offload]:
        """Settings for a budget of bytes (lilliput.plan.choose)."""
        return [cls.model_validate({})]

    def acts(self) -> Mapping[Phase, Callable[[Rig], Rig]]:
        """Stores weights in bf16 and makes the host's optimizer; then gradients leave, and the update is the host's."""
        return {Phase.SWAP: self.divide, Phase.STEP: self.watch}

    def refuses(self, others: Mapping[str, Any], facts: Facts) -> str | None:
        """Refuses rooms under which only an adapter learns, a delay before the first step, and a link without speed."""
        small = next((name for name in ALONE if name in others), None)
        if small is not None:
            return f"under {small} only an adapter learns: its gradients and moments are a few megabytes, and stay on the device"
        if "paged" in others:
            return "the optimizer of paged lies on the device and leaves it when memory is short; here it never lies there"
        if self.delay != "off" and self.delay < 1:
            return f"offload.delay={self.delay}, but steps count from 1"
        if self.link and not parse_size(self.link):
            return f"offload.link={self.link} moves nothing"
        return None

    def cost(self, ledger: Ledger, facts: Facts, site: Site) -> Ledger:
        """Closed forms, exact but for the gradients on their way: the two that follow each other and are largest."""
        count, several = facts.parameters, site.micro_batches > 1
        sizes = [math.prod(shape) for shape in facts.shapes.values()]
        leaving = WEIGHT * largest_two(sizes)
        staged = self.staged(max(sizes), several) + (WEIGHT * count if self.delay != "off" else 0)
        return ledger.put(
            parameters=replace(ledger.terms["parameters"], size=WEIGHT * count),
            gradients=replace(ledger.terms["gradients"], size=self.buffers(several) * count, tier="host", moments=("load", "forward", "backward", "update")),
            optimizer=replace(ledger.terms["optimizer"], size=STATE * count, tier="host", moments=("load", "forward", "backward", "update")),
            **{
                "staged copies": Term(staged, tier="host"),
                "norms": Term(4 * (2 * len(sizes) + 1), tier="host", moments=("update",)),  # of each gradient, the same stacked, of all
                "gradients leaving": Term(leaving, moments=("backward",)),
                "link": Term(traffic=WEIGHT * count * (1 + 1 / site.micro_batches), lane="link", speed=self.speed),  # of one micro-batch
            },
        )

    @property
    def speed(self) -> float:
        """Bytes/s of the link each way; 0 = as fast as it goes."""
        return float(parse_size(self.link)) if self.link else 0.0

    def divide(self, rig: Rig) -> Rig:
        """Weights become bf16 on the device; their fp32 values are read once more for the masters."""

        def optimizing(rig: Rig, **knobs: Any) -> HostAdamW:
            from lilliput.parallel.offloaded import HostAdamW

            trainable = rig.trainable()
            master = lambda name: rig.source(name)(name, tuple(trainable[name].shape), rig.seed)
            return HostAdamW(trainable, master, tile=self.tile, speed=self.speed, several=rig.site.micro_batches > 1, delayed=self.delay != "off",
                              predict=self.predict and self.delay != "off", **knobs)  # fmt: skip

        homes = (*rig.homes, ("*", replace(rig.homes[0][1], codec="bf16", states="host")))
        return replace(rig, homes=homes, optimizing=optimizing, beside={**rig.beside, **self.held(rig)})

    def held(self, rig: Rig) -> dict[str, Row]:
        """Rows of what the host has beside the moments."""
        from lilliput.memory.plan import Decision, Row

        several, delayed = rig.site.micro_batches > 1, self.delay != "off"
        counts = {name: p.numel() for name, p in rig.trainable().items()}
        row = lambda size: Row(size, Decision(tier="host"))
        found = {f"master {name}": row(4 * count) for name, count in counts.items()}
        found |= {f"gradient {name}": row(self.buffers(several) * count) for name, count in counts.items()}
        found |= {f"new weight {name}": row(WEIGHT * count) for name, count in counts.items()} if delayed else {}
        return found | {"staged copies": row(self.staged(max(counts.values()), several))}

    def buffers(self, several: bool) -> int:
        """Bytes a weight of room for gradients on the host. several: micro-batches a step, whose gradients are summed in fp32."""
        return (4 if several else WEIGHT) * (2 if self.delay != "off" else 1)

    def staged(self, largest: int, several: bool) -> int:
        """Bytes of copies on their way: two tiles up, and a gradient of the largest tensor down where it is added to a sum."""
        return WEIGHT * (2 * min(self.tile, largest) + (largest if several else 0))

    def watch(self, rig: Rig) -> Rig:
        """Gradients leave; a waiting update begins with the step and ends with its backward pass."""
        host, objective, schedule, weight = rig.optimizer, rig.objective, rig.schedule, rig.weight
        host.watch()

        def drained(model: Any, micro: Any) -> tuple[Tensor, int]:
            host.drain()
            return objective(model, micro)

        def beside(rig: Rig, batch: Any, weight: int) -> Tensor:
            host.begin(len(batch))
            return schedule(rig, batch, weight)

        masters = lambda rig, name: host.masters[name] if name in host.masters else weight(rig, name)
        settle, close = (lambda rig: host.settle()), (lambda rig: host.close())
        return replace(rig, objective=drained, schedule=beside, update=self.update, flush=settle, close=close, weight=masters)

    def update(self, rig: Rig, learning_rate: float) -> float:
        """Clip by the norm of this step's gradients and update, or leave it for the next step; returns the norm before clipping."""
        host = rig.optimizer
        norm = host.norm()
        host.receive()
        if not math.isfinite(norm):  # as everywhere: the step is skipped, the norm says so
            host.zero_grad()
            return norm
        ready = host.take(learning_rate, min(1.0, rig.clip / (norm + 1e-6)) if rig.clip else 1.0)
        if self.delay != "off" and rig.counter.step + 1 >= self.delay:
            host.pending = ready
        else:
            host.apply(ready)
        return norm
