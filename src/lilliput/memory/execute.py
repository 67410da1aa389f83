"""The one place that carries out a memory plan, on any nn.Module: what autograd saves is kept, dropped and run again, or paged.

    with executor.forward():            every operation of the forward pass is checked against the trace; those that will
        loss = objective(model, batch)  run again leave their arguments and, where they draw random numbers, the generator's state
    loss.backward()                     the schedule's actions happen when autograd asks for what it saved

The same kernels run again on the same bytes, so loss and gradients are bitwise those of the plain run. The cost of watching is
about 5 us an operation forward. torch runs only the innermost pair of saved-tensor hooks: no other file may install any.
Random numbers: a generator's state is kept for each operation to run again (5 KB on the host, not in any tier).
A model that does other operations than it was planned for is refused at the first one that differs, and so is a larger batch; a
smaller one that does the same operations runs under the same plan, in fewer bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from lilliput.base.errors import UserError
from lilliput.memory import codecs
from lilliput.memory.capture import STATISTICS
from lilliput.memory.lower import Replay, Schedule
from lilliput.memory.meter import Meter
from lilliput.memory.stores import Store
from lilliput.memory.trace import UNPACK

AGAIN = "plan again for this model and batch shape"
PAGES = {"bf16": torch.bfloat16}  # codecs in which a store's copy converts


class Mismatch(UserError):
    """The run is not the one that was planned. Nothing was changed yet: plan again and run the forward pass again."""


class Executor:
    """Carries out one schedule, step after step. `funcs`: the trace's operation objects; `stores`: tier -> where paged bytes go.

    meter: told which bytes are not the device's. summon: called with every external tensor before an
    operation runs again with it. One forward at a time; its backward pass may come later.
    """

    def __init__(self, schedule: Schedule, funcs: Sequence[Any], stores: Mapping[str, Store] | None = None, meter: Meter | None = None,
                 summon: Callable[[torch.Tensor], None] | None = None) -> None:  # fmt: skip
        self.schedule, self.funcs, self.stores, self.meter = schedule, funcs, dict(stores or {}), meter
        self.summon = summon
        self.asked = [k for kind, k in schedule.trace.events if kind == UNPACK]
        self.holding = {schedule.trace.storages[s].writers[-1]: s for s in schedule.hold}
        missing = {d.tier for d in schedule.decisions.values() if d.place == "page"} - set(self.stores)
        if missing:
            raise UserError(f"the plan pages to the {min(missing)} tier", "no store was given for it", f"stores={{'{min(missing)}': ...}}")

    @contextmanager
    def forward(self) -> Iterator[None]:
        """Around the forward pass of one micro-batch. Without gradients it does nothing."""
        if not torch.is_grad_enabled():
            yield
            return
        step = _Step(self)
        with step, saved_tensors_hooks(step.pack, step.unpack):
            yield
        if step.at != self.schedule.trace.forwards:
            raise Mismatch("the forward pass ended early", f"it ran {step.at} operations, planned were {self.schedule.trace.forwards}", AGAIN)


class _Saved:
    """What autograd holds in place of a saved tensor; tells its step when it is forgotten."""

    __slots__ = ("device", "dtype", "k", "offset", "shape", "step", "stride")

    def __init__(self, step: _Step, k: int, tensor: torch.Tensor) -> None:
        self.step, self.k, self.dtype, self.device = step, k, tensor.dtype, tensor.device
        self.shape, self.stride, self.offset = tensor.shape, tensor.stride(), tensor.storage_offset()

    def __del__(self) -> None:
        self.step.release(self.k)


class _Argument:
    """A tensor argument to find again: a view of a storage of the trace."""

    __slots__ = ("device", "dtype", "offset", "shape", "storage", "stride")

    def __init__(self, storage: int, tensor: torch.Tensor) -> None:
        self.storage, self.dtype, self.device = storage, tensor.dtype, tensor.device
        self.shape, self.stride, self.offset = tensor.shape, tensor.stride(), tensor.storage_offset()


def tensors(tree: Any) -> list[torch.Tensor]:
    """The tensors in a nest of arguments, in order."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def _view(like: _Saved | _Argument, storage: torch.UntypedStorage) -> torch.Tensor:
    return torch.empty(0, dtype=like.dtype, device=like.device).set_(storage, like.offset, like.shape, like.stride)


class _Step(TorchDispatchMode):
    """One forward pass and its backward pass."""

    def __init__(self, owner: Executor) -> None:
        super().__init__()
        self.owner, self.schedule, self.trace = owner, owner.schedule, owner.schedule.trace
        self.at = self.packed = self.unpacked = 0
        self.own = False
        self.here: dict[int, torch.UntypedStorage] = {}
        self.pending = {s.index: len(s.packs) for s in self.trace.saved()}
        self.recorded: dict[int, tuple[list[Any], Any, Any]] = {}
        self.leaving: dict[int, Any] = {}
        self.coming: dict[int, Any] = {}
        self.encoded: dict[int, torch.Tensor] = {}
        self.sizes: dict[int, int] = {}  # bytes of what was sent away

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Check the operation, keep what it takes to run it again, run it."""
        number, kwargs = self.at, kwargs or {}
        if self.own:
            return func(*args, **kwargs)
        if number >= self.trace.forwards or self.owner.funcs[number] is not func:
            planned = self.trace.ops[number].name if number < self.trace.forwards else "the end"
            raise Mismatch("the model does not do what was planned", f"operation {number} is {func}, planned was {planned}", AGAIN)
        if number in self.schedule.record:
            self.record(number, args, kwargs)
        result = func(*args, **kwargs)
        self.at = number + 1
        if number in self.owner.holding:
            self.hold_result(number, args, kwargs, result)
        for storage in self.schedule.late.get(number, ()):
            self.send(storage, next(t for s, t in zip(self.trace.ops[number].reads, tensors((args, kwargs)), strict=True) if s == storage))
        return result

    def record(self, number: int, args: Any, kwargs: Any) -> None:
        """Arguments of an operation: tensors by their storage, external ones themselves, numbers as they are now."""
        op = self.trace.ops[number]
        leaves, form = tree_flatten((args, kwargs))
        reads = iter(op.reads)
        for place, leaf in enumerate(leaves):
            if isinstance(leaf, torch.Tensor):
                storage = next(reads)
                leaves[place] = leaf.detach() if self.trace.storages[storage].external else _Argument(storage, leaf)
        self.recorded[number] = leaves, form, torch.get_rng_state() if op.random else None

    def hold_result(self, number: int, args: Any, kwargs: Any, result: Any) -> None:
        """Keep a storage that autograd does not."""
        storage, op = self.owner.holding[number], self.trace.ops[number]
        if storage in op.news:
            self.here[storage] = self.fresh(result, set())[op.news.index(storage)]
            return
        self.here[storage] = next(t for s, t in zip(op.reads, tensors((args, kwargs)), strict=True) if s == storage).untyped_storage()

    @staticmethod
    def fresh(result: Any, old: set[int]) -> list[torch.UntypedStorage]:
        """Distinct storages of a result that are not among the old ones, in order."""
        found: dict[int, torch.UntypedStorage] = {}
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                storage = leaf.untyped_storage()
                if storage.nbytes() and storage._cdata not in old:
                    found.setdefault(storage._cdata, storage)
        return list(found.values())

    def pack(self, tensor: torch.Tensor) -> Any:
        """What autograd keeps of its next saved tensor."""
        k, self.packed = self.packed, self.packed + 1
        storage = self.trace.packs[k] if k < len(self.trace.packs) else None
        if storage is None or (storage >= 0 and self.trace.storages[storage].bytes < tensor.untyped_storage().nbytes()):
            raise Mismatch("autograd saves other tensors than planned", f"saved tensor {k} has {tensor.untyped_storage().nbytes()} bytes", AGAIN)
        if storage < 0 or self.trace.storages[storage].external:
            return tensor
        if k in self.schedule.first:
            self.here.setdefault(storage, tensor.untyped_storage())
            if self.schedule.of(storage).away:
                self.send(storage, tensor)
        for leaving in self.schedule.leave.get(k, ()):
            self.left(leaving)
        return _Saved(self, k, tensor)

    def send(self, storage: int, tensor: torch.Tensor) -> None:
        """Begin to write a storage to its tier, or encode it where it is."""
        decision, held = self.schedule.of(storage), self.here.setdefault(storage, tensor.untyped_storage())
        self.sizes[storage] = held.nbytes()
        with torch.no_grad(), self.quiet():
            flat = torch.empty(0, dtype=tensor.dtype if decision.codec != "exact" else torch.uint8, device=tensor.device)
            flat = flat.set_(held, 0, (held.nbytes() // flat.element_size(),), (1,))
            if decision.place == "keep":
                self.encoded[storage] = codecs.encode(flat, decision.codec)
            else:
                with self.owner.meter.placing(decision.tier) if self.owner.meter else nullcontext():
                    self.leaving[storage] = self.owner.stores[decision.tier].write(storage, flat, PAGES.get(decision.codec, flat.dtype))
        if decision.place == "keep":
            self.here.pop(storage)
        elif decision.out is None:
            self.left(storage)

    @contextmanager
    def quiet(self) -> Iterator[None]:
        """Operations of our own in the forward pass are not the model's."""
        self.own = True
        try:
            yield
        finally:
            self.own = False

    def left(self, storage: int) -> None:
        if storage in self.leaving:
            self.leaving.pop(storage).result()
            self.here.pop(storage, None)

    def unpack(self, saved: Any) -> torch.Tensor:
        """The saved tensor again, after the actions that were planned for this moment."""
        if not isinstance(saved, _Saved):
            return saved
        expected = self.owner.asked[self.unpacked] if self.unpacked < len(self.owner.asked) else None
        if saved.k != expected:
            why = f"it asks for saved tensor {saved.k}, planned was {expected}"
            raise UserError("the backward pass does not go as planned", why, "one backward pass a forward pass")
        self.unpacked += 1
        for late in list(self.leaving):
            self.left(late)
        actions = self.schedule.before.get(saved.k)
        if actions is not None:
            with torch.no_grad(), torch._C._DisableAutocast():
                for s in actions.drop:
                    self.here.pop(s, None)
                for s in actions.fetch:
                    self.fetch(s, saved)
                for s in actions.wait:
                    self.wait(s)
                if actions.replay is not None:
                    self.replay(actions.replay)
                for s in actions.release:
                    self.here.pop(s, None)
        return _view(saved, self.here[self.trace.packs[saved.k]])

    def fetch(self, storage: int, like: _Saved) -> None:
        """Begin to bring a storage back."""
        size, decision = self.sizes[storage], self.schedule.of(storage)
        if decision.codec == "exact":
            back = torch.empty(size, dtype=torch.uint8, device=like.device)
            self.coming[storage] = self.owner.stores[decision.tier].read(storage, back)
        elif decision.place == "keep":
            back, self.coming[storage] = codecs.decode(self.encoded[storage], size // 4, decision.codec), None
        else:
            back, self.coming[storage] = torch.empty(size // 4, dtype=torch.float32, device=like.device), None
            self.owner.stores[decision.tier].read(storage, back).result()
        self.here[storage] = back.untyped_storage()

    def wait(self, storage: int) -> None:
        future, decision = self.coming.pop(storage), self.schedule.of(storage)
        if future is not None:
            future.result()
        if len(decision.spans) <= 1:
            self.forget(storage)

    def forget(self, storage: int) -> None:
        """A storage's copy elsewhere is not needed any more."""
        self.encoded.pop(storage, None)
        decision = self.schedule.of(storage)
        if decision.place == "page":
            self.owner.stores[decision.tier].free(storage)

    def replay(self, replay: Replay) -> None:
        """Run operations again; targets stay, the rest goes as soon as nobody needs it."""
        made: dict[int, torch.UntypedStorage] = {}
        for number, given, last in zip(replay.ops, replay.given, replay.last, strict=True):
            self.again(number, given, made)
            for s in last:
                del made[s]
        self.here |= made

    def again(self, number: int, given: frozenset[int], made: dict[int, torch.UntypedStorage]) -> None:
        """Run one operation again; its new storages join `made`."""
        recorded, form, state = self.recorded[number]
        op, leaves, old = self.trace.ops[number], list(recorded), set()
        for place, leaf in enumerate(leaves):
            if isinstance(leaf, _Argument):
                leaves[place] = _view(leaf, (self.here if leaf.storage in given else made)[leaf.storage])
            elif isinstance(leaf, torch.Tensor) and self.owner.summon is not None:
                self.owner.summon(leaf)
            if isinstance(leaves[place], torch.Tensor):
                old.add(leaves[place].untyped_storage()._cdata)
        args, kwargs = tree_unflatten(leaves, form)
        if op.name in STATISTICS and args[5]:  # training: the moving averages have moved already
            args = (*args[:3], None, None, *args[5:])
        with _generator(state):
            result = self.owner.funcs[number](*args, **kwargs)
        made |= zip(op.news, self.fresh(result, old), strict=True)

    def release(self, k: int) -> None:
        """Autograd has forgotten a saved tensor."""
        storage = self.trace.packs[k]
        self.pending[storage] -= 1
        if self.pending[storage] == 0:
            if storage not in self.schedule.until:
                self.here.pop(storage, None)
            if self.schedule.of(storage).away:
                self.forget(storage)


@contextmanager
def _generator(state: torch.Tensor | None) -> Iterator[None]:
    """The default generator in an earlier state for a while; None: as it is."""
    if state is None:
        yield
        return
    now = torch.get_rng_state()
    torch.set_rng_state(state)
    try:
        yield
    finally:
        torch.set_rng_state(now)
