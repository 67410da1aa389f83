"""The rig: everything one optimizer step needs, assembled once, in one fixed order.

    build on meta -> CUT -> SHARD -> SWAP -> REMAT -> STORE -> materialise -> optimizer -> STEP

A room's act takes the rig and gives the next one, so what a technique changes is visible in the fields it replaces.
The loop knows only `step`, `evaluate` and `export`. The rig knows no technique.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lilliput.base.errors import DoesNotFit, UserError
from lilliput.base.facts import Facts
from lilliput.base.protocols import Phase, Site, Strategy, in_order, refusal
from lilliput.data.batch import IGNORE, MicroBatch
from lilliput.memory.meter import Meter
from lilliput.memory.plan import Row
from lilliput.memory.planned import Planned
from lilliput.models.checkpoints import STORED, fill
from lilliput.models.layers import Linear
from lilliput.ops.dropout import Counter
from lilliput.parallel.budget import SCALARS, counted, planned
from lilliput.parallel.optimizer import AdamW
from lilliput.parallel.rows import MOMENTS, joined, table


@dataclass(frozen=True)
class Home:
    """Where a parameter lives between uses: how it is stored, and in which tier."""

    codec: str = "fp32"  # fp32 | bf16 | codes
    tier: str = "device"
    states: str = "device"  # where its optimizer state lies; its gradient leaves for there as soon as it is complete


@dataclass(frozen=True)
class Sums:
    """What one step measured: summed loss over its scored targets, their number, and the gradient norm before clipping."""

    loss: float
    weight: int
    norm: float
    told: Mapping[str, float] = field(default_factory=dict)  # what rooms say of this step

    @property
    def mean(self) -> float:
        """Loss per scored target, in nats."""
        return self.loss / max(1, self.weight)


@dataclass(frozen=True)
class Rig:
    """Frozen; rooms replace fields. A field is empty until its phase."""

    model: Any  # an nn.Module that states `facts` and `spec` and carries a dropout `counter`
    facts: Facts
    site: Site
    device: torch.device
    seed: int
    homes: tuple[tuple[str, Home], ...]  # (pattern over parameter names, home); the last match wins
    init: tuple[tuple[str, Callable[[str, tuple[int, ...], int], torch.Tensor]], ...]  # parameters that no file holds
    objective: Callable[[nn.Module, MicroBatch], tuple[torch.Tensor, int]]  # -> (loss_sum, weight)
    schedule: Callable[[Rig, Sequence[MicroBatch], int], torch.Tensor]  # all forwards and backwards of one step -> loss sum
    update: Callable[[Rig, float], float]  # (rig, learning rate) -> gradient norm
    counter: Counter  # keys dropout; the rig sets it, the model's modules read it
    clip: float = 0.0
    optimizer: Any = None  # parallel.optimizer.AdamW, or what `optimizing` makes in its place
    optimizing: Callable[..., Any] = lambda rig, **knobs: AdamW(rig.trainable(), seed=rig.seed, **knobs)  # makes the optimizer
    flush: Callable[[Rig], None] = lambda rig: None  # finishes what a step left for later; before weights are read for good
    close: Callable[[Rig], None] = lambda rig: None  # ends threads and lets go of files; the rig is of no use after that
    tells: Mapping[str, Callable[[], float]] = field(default_factory=dict)  # name of a metric -> its number of the last step
    summon: Callable[[torch.Tensor], None] | None = None  # fills a parameter that rests in another tier, for the next operation
    visits: int = 0  # bytes of the device for such parameters
    keeper: Any = None  # save(folder, tag) and restore(folder, tag, steps) in place of the checkpoint's own files
    plan: Any = None  # the MemoryPlan that the step is carried out under, where a room made one: the tightest of `plans`
    plans: Mapping[str, Any] = field(default_factory=dict)  # digest of a trace -> its MemoryPlan; before a room acts: those a run began with
    beside: Mapping[str, Row] = field(default_factory=dict)  # rows of the memory plan for what rooms keep beside parameters, gradients and moments
    computes: tuple[str, ...] = ()  # dtypes that rooms put activations into
    blocks: Callable[[str], tuple[str, Any] | None] = lambda name: None  # (GGUF type, rows of blocks) of a matrix that its file holds quantised
    meter: Any = None  # memory.meter.Meter: counts what a step makes against its budget, where it has one
    exports: Mapping[str, Callable[[Rig, Path], str | None]] = field(default_factory=dict)  # folder name -> writer; what it answers is shown
    weight: Callable[[Rig, str], torch.Tensor] = lambda rig, name: whole(rig.model, name)  # as files hold it

    def step(self, batch: Sequence[MicroBatch], learning_rate: float, number: int) -> Sums:
        """One optimizer step over all its micro-batches; gradients are those of the mean loss over every scored target."""
        self.model.train()
        self.counter.step = number
        batch = [micro.to(self.device) for micro in batch]
        weight = sum(micro.weight for micro in batch)
        if weight == 0:
            raise UserError("a step without a single scored target", "every target of its micro-batches is masked", "check data.format and the chat template")
        with self.counting():
            self.meter.adopt([tensor for micro in batch for tensor in (micro.tokens_BT, micro.targets_BT)] if self.meter.budget else [])
            loss = self.schedule(self, batch, weight)
            with self.meter.placing("host") if self.meter.budget and self.leaving() else nullcontext():
                norm = self.update(self, learning_rate)
        return Sums(float(loss), weight, norm, {name: tell() for name, tell in self.tells.items()})

    @torch.no_grad()
    def evaluate(self, batches: Iterable[MicroBatch]) -> Sums:
        """Loss over held-out micro-batches, without gradients or dropout."""
        self.model.eval()
        total, weight = 0.0, 0
        with self.counting():
            for micro in batches:
                loss, count = self.objective(self.model, micro.to(self.device))
                total, weight = total + float(loss), weight + count
        return Sums(total, weight, 0.0)

    def counting(self) -> AbstractContextManager[Any]:
        """Around whatever a budget is for; free where there is none."""
        return self.meter if self.meter.budget else nullcontext()

    def trainable(self) -> dict[str, nn.Parameter]:
        """Parameters that learn, by module path."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def home(self, name: str) -> Home:
        """The home of a parameter."""
        return [home for pattern, home in self.homes if fnmatch.fnmatchcase(name, pattern)][-1]

    def stored(self, name: str) -> torch.dtype:
        """The dtype that a parameter is stored in."""
        dtype: torch.dtype = getattr(torch, STORED[self.home(name).codec][0])
        return dtype

    def standing(self) -> int:
        """Bytes of weights, buffers and optimizer state that the device holds from step to step, and of a step's tokens, targets and loss; the model
        may be on meta."""
        here = lambda name: self.stored(name).itemsize if self.home(name).tier == "device" else 0
        weights = sum(p.numel() * here(name) for name, p in self.model.named_parameters())
        tokens = 2 * 8 * self.site.micro_batches * self.site.sequences * self.site.tokens
        return self.visits + weights + self.moments() + sum(b.nbytes for b in self.model.buffers()) + tokens + SCALARS

    def moments(self) -> int:
        """Bytes of optimizer state on the device."""
        return sum(MOMENTS * p.numel() for name, p in self.trainable().items() if self.home(name).states == "device")

    def leaving(self) -> bool:
        """Whether gradients leave the device as soon as they are complete."""
        return any(self.home(name).states != "device" for name in self.trainable())

    def source(self, name: str) -> Callable[[str, tuple[int, ...], int], torch.Tensor]:
        """What makes a parameter: the last `init` that matches its name."""
        return [make for pattern, make in self.init if fnmatch.fnmatchcase(name, pattern)][-1]


def whole(model: nn.Module, name: str) -> torch.Tensor:
    """A parameter by the name that files know, decoded and put together where it is stored otherwise."""
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    return (module.whole(leaf) if isinstance(module, Linear) else model.get_parameter(name)).detach()


def next_token(model: nn.Module, micro: MicroBatch) -> tuple[torch.Tensor, int]:
    """The language-model objective: summed cross-entropy (nats) of targets_BT under logits_BTV in fp32."""
    logits_BTV = model(micro.tokens_BT)
    loss = nn.functional.cross_entropy(logits_BTV.flatten(0, 1).float(), micro.targets_BT.flatten(), ignore_index=IGNORE, reduction="sum")
    return loss, micro.weight


def accumulate(rig: Rig, batch: Sequence[MicroBatch], weight: int) -> torch.Tensor:
    """The default schedule: one micro-batch after another, gradients added up; each divided by the whole step's weight."""
    total = torch.zeros((), dtype=torch.float64, device=rig.device)
    for index, micro in enumerate(batch):
        rig.counter.micro = index
        loss, _ = rig.objective(rig.model, micro)
        (loss / weight).backward()
        total += loss.detach()
        del loss  # four bytes that the next forward pass would find
    return total


def clip_and_step(rig: Rig, learning_rate: float) -> float:
    """The default update: clip by the global norm, AdamW, free the gradients. Returns the norm before clipping."""
    assert rig.optimizer is not None, "the optimizer is built before the first update"
    parameters = list(rig.optimizer.parameters.values())
    norm = float(nn.utils.clip_grad_norm_(parameters, rig.clip or float("inf"), foreach=True))
    if norm == norm and norm != float("inf"):  # a non-finite gradient would poison every weight: the step is skipped, the norm says so
        rig.optimizer.step(learning_rate)
    rig.optimizer.zero_grad()
    return norm


def order(rooms: Mapping[str, Strategy]) -> list[tuple[Phase, str, Callable[[Rig], Rig]]]:
    """Acts of all rooms: by phase, inside a phase after those that the room needs, ties by name."""
    result: list[tuple[Phase, str, Callable[[Rig], Rig]]] = []
    for phase in Phase:
        acting = {name: room for name, room in sorted(rooms.items()) if phase in room.acts()}
        result += [(phase, name, room.acts()[phase]) for name, room in in_order(acting)]
    return result


def refuse(rooms: Mapping[str, Strategy], facts: Facts) -> None:
    """UserError with the room's own reason when it cannot stand on this model or beside the others."""
    for name, room in rooms.items():
        missing = [need for need in room.needs if need not in rooms]
        if missing:
            raise UserError(f"`{name}` needs `{missing[0]}`", fix=f"add a [{missing[0]}] section")
        reason = refusal(name, rooms, facts)
        if reason:
            raise UserError(f"`{name}` cannot be used here", reason, f"take the [{name}] section out, or change what it names")


def outline(
    model: Any,
    rooms: Mapping[str, Strategy],
    *,
    site: Site,
    device: torch.device,
    seed: int,
    dtype: str,
    read: Callable[[str], torch.Tensor] | None,
    init: Callable[[str, tuple[int, ...], int], torch.Tensor],
    clip: float,
    blocks: Callable[[str], tuple[str, Any] | None] = lambda name: None,
    plans: Mapping[str, Any] | None = None,
    budget: Mapping[str, int] | None = None,
    before: Phase = Phase.STEP,
) -> Rig:
    """The rig of a model built on meta before anything is loaded: every act before a phase. Arguments and refusals as `assemble` has them."""
    facts = model.facts
    refuse(rooms, facts)
    model.counter.seed = seed
    whole = ("*", init) if read is None else ("*", lambda name, shape, seed: read(name))
    rig = Rig(
        model=model, facts=facts, site=site, device=device, seed=seed, homes=(("*", Home(dtype)),), init=(whole,),
        objective=next_token, schedule=accumulate, update=clip_and_step, clip=clip, counter=model.counter,
        blocks=blocks, plans=plans or {}, meter=Meter(budget=budget),
    )  # fmt: skip
    acts = [each for each in order(rooms) if each[0] < before]
    evicting = [name for name, room in rooms.items() if getattr(room, "evicts", False)]
    rig, beside, computes = table(rig, (each for each in acts if each[0] <= Phase.REMAT), evicting)
    rig = planned(rig, bool(evicting))
    if rig.plan is not None:
        deciding = next((name for phase, name, _ in acts if phase == Phase.REMAT), "")
        plans = {trace: joined(plan, deciding, beside, computes) for trace, plan in rig.plans.items()}
        rig = replace(rig, plans=plans, plan=joined(rig.plan, deciding, beside, computes))
    for phase, _, act in acts:
        rig = act(rig) if phase > Phase.REMAT else rig
    return rig


def assemble(model: Any, rooms: Mapping[str, Strategy], *, optimizer: Mapping[str, Any], **job: Any) -> Rig:
    """Assemble a model built on meta (it states `facts` and carries a dropout `counter`) with its rooms; order: see above.

    read(name) gives a parameter from the checkpoint (None: all from `init`); init(name, shape, seed) makes a fresh one. site, device,
    seed, dtype, clip, plans, budget (tier -> bytes): as `outline` takes them. blocks(name): the same as a GGUF stores it, (type, rows of
    blocks), where it is quantised.
    optimizer: keywords of parallel.optimizer.AdamW, or of what a room makes in its place. Raises UserError when a room refuses.
    """
    rig = outline(model, rooms, **job)
    if isinstance(rig.objective, Planned):
        rig.objective.open()
    materialise(rig)
    rig = replace(rig, optimizer=rig.optimizing(rig, **optimizer))
    for phase, _, act in order(rooms):
        if phase == Phase.STEP:
            rig = act(rig)
    try:
        return counted(rig)
    except DoesNotFit:
        rig.close(rig)
        raise


def materialise(rig: Rig) -> None:
    """Give every parameter the value of the last `init` that matches its name, stored as its home says."""

    def value(name: str, shape: tuple[int, ...]) -> torch.Tensor:
        return rig.source(name)(name, shape, rig.seed).to(device=rig.device, dtype=rig.stored(name))

    fill(rig.model, value)
