"""An objective under a memory plan: traced and planned for a batch shape once, executed from then on.

Two plans a shape, since a second micro-batch finds gradients there already. A smaller batch runs under the plan of a larger one as
long as it does the same operations; otherwise it gets a plan of its own, about a second after 30 blocks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any

import torch
from torch import nn

from lilliput.memory.capture import capture
from lilliput.memory.execute import Executor, Mismatch
from lilliput.memory.lower import Schedule, lower
from lilliput.memory.meter import Meter
from lilliput.memory.plan import Decision, MemoryPlan
from lilliput.memory.planners.budget import written
from lilliput.memory.simulate import Rates, Simulation, simulate
from lilliput.memory.stores import Store
from lilliput.memory.trace import Trace

Objective = Callable[[nn.Module, Any], tuple[torch.Tensor, int]]
Choose = Callable[[Trace], tuple[str, Mapping[int, Decision]]]


@dataclasses.dataclass
class Ready:
    """A planned batch shape. Its executor, and the files that it pages to, are made when they are asked for: a plan alone makes none."""

    schedule: Schedule
    plan: MemoryPlan
    simulation: Simulation
    sizes: tuple[int, ...]  # elements of the batch's tensors
    make: Callable[[], Executor]

    @cached_property
    def executor(self) -> Executor:
        """Carries the plan out."""
        return self.make()


class Planned:
    """Stands in for an objective (model, micro-batch) -> (loss sum, weight), whose loss is divided by the weight before it goes backward.

    choose(trace) -> (name, decisions). The micro-batch is a dataclass with tensors in it. device, dtype(name): where and how parameters
    on meta will lie. stores(trace): where its pages go, by tier. leave: gradients leave the device as they come (memory.capture).
    summon: fills a parameter that is not on the device before an operation runs again with it. pinned: plans by their trace's digest,
    taken instead of choosing. rates: of the simulated seconds. meter: told which bytes are another tier's.
    """

    def __init__(self, objective: Objective, choose: Choose, device: str, dtype: Callable[[str], torch.dtype],
                 stores: Callable[[Trace], Mapping[str, Store]] = lambda trace: {}, leave: bool = False,
                 summon: Callable[[torch.Tensor], None] | None = None, pinned: Mapping[str, MemoryPlan] = {},
                 rates: Rates = Rates(), meter: Meter | None = None) -> None:  # fmt: skip
        self.objective, self.choose, self.device, self.dtype, self.stores, self.leave = objective, choose, device, dtype, stores, leave
        self.summon, self.pinned, self.rates, self.meter = summon, pinned, rates, meter
        self.ready: dict[Any, Ready] = {}

    def __call__(self, model: nn.Module, micro: Any) -> tuple[torch.Tensor, int]:
        """The objective; with gradients, under a plan."""
        if not torch.is_grad_enabled():
            return self.objective(model, micro)
        gradients = any(p.grad is not None for p in model.parameters())
        state = torch.get_rng_state()
        try:
            with self.nearest(model, micro, gradients).executor.forward():
                return self.objective(model, micro)
        except Mismatch:
            torch.set_rng_state(state)
        with self.prepare(model, micro, gradients).executor.forward():
            return self.objective(model, micro)

    def nearest(self, model: nn.Module, micro: Any, gradients: bool) -> Ready:
        """The plan of this shape, else the smallest of those that are larger in every tensor, else a new one."""
        key = self.key(micro, gradients)
        if key in self.ready:
            return self.ready[key]
        sizes = tuple(t.numel() for t in _tensors(micro).values())
        larger = [r for (_, g), r in self.ready.items() if g == gradients and all(a <= b for a, b in zip(sizes, r.sizes, strict=True))]
        return min(larger, key=lambda r: r.sizes) if larger else self.prepare(model, micro, gradients)

    def prepare(self, model: nn.Module, micro: Any, gradients: bool) -> Ready:
        """Trace, choose, lower. DoesNotFit when no plan fits."""
        given = _tensors(micro)

        def step(twin: nn.Module, *tensors: torch.Tensor) -> torch.Tensor:
            return self.objective(twin, dataclasses.replace(micro, **dict(zip(given, tensors, strict=True))))[0]

        weight = max(1, micro.weight)
        trace, funcs = capture(
            model, step, list(given.values()), gradients=gradients, device=self.device, dtype=self.dtype, leave=self.leave,
            then=lambda loss: loss / weight,
        )  # fmt: skip
        pinned = self.pinned.get(trace.digest())
        name, decisions = (pinned.planner, pinned.decisions()) if pinned else self.choose(trace)
        schedule = lower(trace, decisions)
        simulation = simulate(schedule, self.rates)
        plan, sizes = pinned or written(trace, name, decisions, simulation), tuple(t.numel() for t in given.values())
        ready = Ready(schedule, plan, simulation, sizes, lambda: Executor(schedule, funcs, self.stores(trace), self.meter, self.summon))
        self.ready[self.key(micro, gradients)] = ready
        return ready

    def open(self) -> None:
        """Make the executors of all plans, and so their stores: what has no room on a disk is refused now."""
        for ready in self.ready.values():
            assert ready.executor, "made now and kept"

    @staticmethod
    def key(micro: Any, gradients: bool) -> tuple[Any, bool]:
        """Shapes of the batch, and whether gradients are there."""
        return tuple((n, t.shape, t.dtype) for n, t in _tensors(micro).items()), gradients


def _tensors(micro: Any) -> dict[str, torch.Tensor]:
    return {f.name: getattr(micro, f.name) for f in dataclasses.fields(micro) if isinstance(getattr(micro, f.name), torch.Tensor)}
