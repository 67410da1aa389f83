"""Mixed-precision AdamW on the host: the device keeps bf16 weights, the host fp32 masters, both moments and the gradients' way through.

    backward   a gradient that is complete leaves at once: one on the way down while the next is computed
    update     norm and clipping on the host, AdamW tile by tile in one pass (ops/adamw.py); while a tile's bf16 weights go up, the
               next tile is computed
    delayed    the update of step i runs beside the forward and backward pass of step i + 1, which computes with the weights of
               step i - 1; a tensor's new weights go up as soon as that backward pass is done with the old ones: when its gradient is complete.
               `predict`: what goes up has the update added once more, for the one that is still to come

A link carries 2 bytes a parameter down a micro-batch and 2 up a step. Several micro-batches are summed in fp32 on the host.
Every number's update depends on itself alone and sums have one order, so tiles, links and threads change no bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import torch

from lilliput.dist.link import Link, lasting, resting
from lilliput.ops.adamw import Rule, update_master
from lilliput.parallel.leaving import when_complete

STORED = torch.bfloat16
RATES = "pending.numbers"  # name of the tensor that keeps a waiting update's learning rate and scale


@dataclass
class Pending:
    """An update that waits: gradients by name, and the numbers it will be made with."""

    gradients: Mapping[str, torch.Tensor]
    lr: float
    scale: float


@dataclass
class Down:
    """Gradients on the host: `sums` by name (flat), which of them came this step, and the one that is on the way."""

    sums: dict[str, torch.Tensor]
    came: set[str] = field(default_factory=set)


class HostAdamW:
    """Stands where parallel.optimizer.AdamW stands; `parameters` are on the device and in bf16.

    master(name): the fp32 value that a parameter starts from. tile: numbers of one copy up. speed: bytes/s of the link each way, 0 =
    as fast as it goes. several: a step has several micro-batches, so gradients are summed (found out otherwise). delayed: updates may wait.
    predict: what the device gets of a delayed update is where the next one will probably lead.
    """

    def __init__(self, parameters: Mapping[str, torch.nn.Parameter], master: Callable[[str], torch.Tensor], *, betas: tuple[float, float], eps: float,
                 weight_decay: float, tile: int, speed: float, several: bool, delayed: bool, predict: bool = False) -> None:  # fmt: skip
        self.parameters = dict(parameters)
        self.betas, self.eps, self.weight_decay, self.tile = betas, eps, weight_decay, tile
        self.steps, self.predict = 0, predict
        self.device = next(iter(self.parameters.values())).device
        wide = lambda: {n: lasting(p.shape, torch.float32) for n, p in self.parameters.items()}
        self.masters, self.first, self.second = wide(), wide(), wide()
        for n, tensor in self.masters.items():
            tensor.copy_(master(n))
        self.down, self.up = Link(speed, self.device), Link(speed, self.device)
        self.largest = max(p.numel() for p in self.parameters.values())
        self.landing: torch.Tensor | None = None  # what comes down before it is added, where gradients are summed
        self.gradients = Down({} if several else self.room(STORED))
        self.spare = Down({} if several else self.room(STORED)) if delayed else None
        if several:
            self.sum()
        self.stages = [resting((min(tile, self.largest),), STORED, self.device) for _ in range(2)]
        self.rounded = self.room(STORED) if delayed else {}  # weights that wait until the backward pass is done with the old ones
        self.computed: set[str] = set()  # of those, the ones that are there
        self.times: dict[str, int] = {}  # gradients of this step that came, by name
        self.guessed: set[str] = set()  # what the device has of these is ahead of the masters
        self.sent: dict[str, Future[None]] = {}  # weights on their way up beside the step
        self.leaving: tuple[str, torch.Tensor, Future[None]] | None = None
        self.pending: Pending | None = None
        self.micros = 1
        self.worker = ThreadPoolExecutor(1, "update") if delayed else None
        self.working: Future[None] | None = None

    def room(self, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """A flat tensor for each parameter in the host's memory."""
        return {n: lasting((p.numel(),), dtype, self.device) for n, p in self.parameters.items()}

    def held(self) -> list[torch.Tensor]:
        """Everything that lies on the host."""
        halves = [half.sums.values() for half in (self.gradients, self.spare) if half is not None]
        states = [*self.masters.values(), *self.first.values(), *self.second.values()]
        return [*states, *(t for half in halves for t in half), *self.stages, *self.rounded.values(), *([] if self.landing is None else [self.landing])]

    # ---- gradients go down

    def sum(self) -> None:
        """From now on gradients are summed, in fp32."""
        self.landing = resting((self.largest,), STORED, self.device)
        for half in (self.gradients, self.spare):
            if half is not None:
                before, half.sums = half.sums, self.room(torch.float32)
                for name in half.came:
                    half.sums[name].copy_(before[name])

    def watch(self) -> None:
        """From now on each gradient leaves the device when the backward pass has completed it."""
        when_complete(self.parameters, lambda name, gradient: self._leave(name, gradient))

    def _leave(self, name: str, gradient: torch.Tensor) -> None:
        self.drain()
        self.times[name] = self.times.get(name, 0) + 1
        if self.working is not None:
            self._send(n for n in self.computed - self.sent.keys() if self.times.get(n) == self.micros)
        if name in self.gradients.came and self.landing is None:
            self.sum()
        into = self.gradients.sums[name] if self.landing is None else self.landing[: gradient.numel()]
        self.leaving = name, gradient, self.down.copy(into, gradient.detach().reshape(-1))

    @torch.no_grad()
    def drain(self) -> None:
        """Wait for the gradient that is on its way; its bytes on the device are free after that."""
        if self.leaving is None:
            return
        name, gradient, copied = self.leaving
        copied.result()
        self.leaving = None
        if self.landing is not None:
            total, came = self.gradients.sums[name], self.landing[: gradient.numel()]
            total.add_(came) if name in self.gradients.came else total.copy_(came)
        self.gradients.came.add(name)

    @torch.no_grad()
    def norm(self) -> float:
        """Norm of all gradients of this step, in the parameters' order."""
        self.drain()
        norms = [torch.linalg.vector_norm(self.gradients.sums[n], dtype=torch.float32) for n in self.parameters if n in self.gradients.came]
        return float(torch.linalg.vector_norm(torch.stack(norms))) if norms else 0.0

    def take(self, lr: float, scale: float) -> Pending:
        """This step's gradients as an update that waits; the next step's find room elsewhere, or in their place."""
        ready = Pending({n: self.gradients.sums[n] for n in self.parameters if n in self.gradients.came}, lr, scale)
        self.zero_grad()
        if self.spare is not None:
            self.gradients, self.spare = self.spare, self.gradients
        return ready

    def zero_grad(self) -> None:
        """Forget this step's gradients."""
        self.gradients.came.clear()

    # ---- weights go up

    @torch.no_grad()
    def apply(self, ready: Pending) -> None:
        """Update now: a tile is computed while the one before goes up."""
        self.steps += 1
        moving: list[Future[None]] = []
        for name, part in self._tiles(ready, ready.gradients):
            if len(moving) >= 2:
                moving[-2].result()
            stage = self.stages[len(moving) % 2][: part.stop - part.start]
            self._tile(name, part, ready, stage)
            moving.append(self.up.copy(self.parameters[name].detach().view(-1)[part], stage))
        for last in moving[-2:]:
            last.result()

    def begin(self, micros: int) -> None:
        """Start the waiting update, if there is one, beside a step of so many micro-batches: after as many gradients, nothing in it uses a weight."""
        self.times, self.micros = {}, micros
        if self.pending is not None and self.working is None:
            assert self.worker is not None, "only a delayed update waits"
            self.working = self.worker.submit(self._beside, self.pending)

    @torch.no_grad()
    def _beside(self, ready: Pending) -> None:
        self.steps += 1
        for name, part in self._tiles(ready, reversed(list(ready.gradients))):  # as the backward pass comes by
            self._tile(name, part, ready, self.rounded[name][part], self.predict)
            if part.stop == ready.gradients[name].numel():
                self.computed.add(name)

    def _send(self, names: Iterable[str]) -> None:
        for name in names:
            self.sent[name] = self.up.copy(self.parameters[name].detach().view(-1), self.rounded[name])

    def receive(self) -> None:
        """Wait for the update that was begun, and send up what is not on its way yet."""
        self.begin(self.micros)
        if self.working is None or self.pending is None:
            return
        self.working.result()
        self._send(self.computed - self.sent.keys())
        self.guessed |= self.computed if self.predict else set()
        for weights in self.sent.values():
            weights.result()
        self.computed, self.sent = set(), {}
        self.pending = self.working = None

    def settle(self) -> None:
        """Nothing waits any more, and the device has the masters themselves."""
        self.receive()
        for name in self.guessed:
            self.rounded[name].copy_(self.masters[name].view(-1))
        self._send(self.guessed)
        self.up.finish()
        self.sent, self.guessed = {}, set()

    def _tiles(self, ready: Pending, names: Iterable[str]) -> Iterator[tuple[str, slice]]:
        for name in names:
            gradient = ready.gradients[name]
            yield from ((name, slice(start, min(start + self.tile, gradient.numel()))) for start in range(0, gradient.numel(), self.tile))

    def _tile(self, name: str, part: slice, ready: Pending, into: torch.Tensor, ahead: bool = False) -> None:
        rule = Rule(ready.lr, self.betas, self.eps, self.weight_decay if self.parameters[name].dim() >= 2 else 0.0, self.steps)
        flat = (self.masters[name].view(-1)[part], ready.gradients[name][part], self.first[name].view(-1)[part], self.second[name].view(-1)[part])
        update_master(*flat, into, rule, ready.scale, ahead)

    # ---- what is saved

    def state(self) -> dict[str, torch.Tensor]:
        """Masters and moments by `master.<name>`, `first.<name>`, `second.<name>`; an update that waits by `pending.<name>`."""
        kinds = {"master": self.masters, "first": self.first, "second": self.second}
        kept = {f"{kind}.{n}": t for kind, tensors in kinds.items() for n, t in tensors.items()}
        if self.pending is None:
            return kept
        numbers = torch.tensor([self.pending.lr, self.pending.scale], dtype=torch.float64)
        return kept | {RATES: numbers} | {f"pending.gradient.{n}": t for n, t in self.pending.gradients.items()}

    def restore(self, tensors: Mapping[str, torch.Tensor], steps: int) -> None:
        """Copy a saved state back; KeyError when a tensor is missing. The weights on the device are restored by whoever saved them."""
        self.pending = None
        for name, tensor in self.state().items():
            tensor.copy_(tensors[name])
        self.steps = steps
        if RATES not in tensors:
            return
        waiting = {n: tensors[f"pending.gradient.{n}"] for n in self.parameters if f"pending.gradient.{n}" in tensors}
        if self.landing is None and any(t.dtype != STORED for t in waiting.values()):
            self.sum()
        for name, gradient in waiting.items():
            self.gradients.sums[name].copy_(gradient)
            self.gradients.came.add(name)
        self.pending = self.take(*tensors[RATES].tolist())

    def close(self) -> None:
        """End the threads."""
        self.down.close()
        self.up.close()
        if self.worker is not None:
            self.worker.shutdown()
