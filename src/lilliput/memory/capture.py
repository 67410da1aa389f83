"""Capture: the joint forward and backward of a step as a Trace, from one eager run on fake tensors: shapes, no memory, no arithmetic.

The run is eager, with autograd's own engine, and not a compiled graph: what is recorded is the order in which memory really
comes and goes, in-place writes and Python's own references included. So a plan can be judged to the byte before the model exists
(its parameters may lie on the meta device). About 0.1 ms an operation.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import flop_registry

from lilliput.base.errors import UserError
from lilliput.memory.trace import DONE, FREE, OP, PACK, RELEASE, UNPACK, Op, Storage, Trace

Step = Callable[..., torch.Tensor]
HIDDEN = ("lift_fresh", "lift_fresh_copy", "lift", "resize_", "set_")  # what they answer is not in their arguments, or they change a storage's size
STATISTICS = ("native_batch_norm", "cudnn_batch_norm", "_native_batch_norm_legit", "_batch_norm_with_update")  # arguments 3 and 4 move: replayed without them


class Handle:
    """What autograd holds in place of a saved tensor."""

    __slots__ = ("__weakref__", "k", "metadata")

    def __init__(self, k: int, metadata: Any) -> None:
        self.k, self.metadata = k, metadata


class Recorder(TorchDispatchMode):
    """Writes the trace while a step runs. `funcs`: the operation objects, by index."""

    def __init__(self, named: dict[int, tuple[str, str]]) -> None:
        super().__init__()
        self.storages: list[Storage] = []
        self.ops: list[Op] = []
        self.events: list[tuple[str, int]] = []
        self.packs: list[int] = []
        self.funcs: list[Any] = []
        self.path: list[str] = []
        self.forward = True
        self._named = named
        self._ids: dict[int, int] = {}  # storage address -> its number
        self._changes: list[tuple[int, int, Any]] = []  # (operation, storage, region) written in place
        self._regions: list[Any] = []  # of each saved tensor
        self._fake: Any = None

    def index(self, tensor: torch.Tensor) -> int:
        """The trace's number of a tensor's storage; one that no operation made is external."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._ids:
            name, kind = self._named.get(key, ("constant", "input"))
            self._ids[key] = self._add(storage.nbytes(), name, kind)
            weakref.finalize(storage, self._ids.pop, key, None)  # another may take its address
        return self._ids[key]

    def _add(self, size: int, name: str, kind: str) -> int:
        self.storages.append(Storage(len(self.storages), size, name, kind=kind))
        return len(self.storages) - 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation and write it down."""
        kwargs = kwargs or {}
        if func.namespace == "prim":  # a fake tensor asked for its device
            return func(*args, **kwargs)
        leaves = [a for a in tree_leaves((args, kwargs)) if isinstance(a, torch.Tensor)]
        reads = tuple(self.index(a) for a in leaves)
        written = [a for a in tree_leaves(_written(func, args, kwargs)) if isinstance(a, torch.Tensor)]
        writes = tuple(dict.fromkeys(self.index(a) for a in written))
        self._changes += [(len(self.ops), self.index(a), _region(a)) for a in written if self.forward]
        result = func(*args, **kwargs)
        number, name, news = len(self.ops), func.overloadpacket.__name__, []
        at = self.path[-1] if self.path else ""
        out = [r for r in tree_leaves(result) if isinstance(r, torch.Tensor)]
        for leaf in out:
            storage = leaf.untyped_storage()
            if storage._cdata in self._ids or storage.nbytes() == 0:
                continue
            made = self._add(storage.nbytes(), f"{at or 'step'} {name}", "activation" if self.forward else "gradient")
            self._ids[storage._cdata] = made
            self.storages[made].dtype = str(leaf.dtype).removeprefix("torch.")
            news.append(made)
            weakref.finalize(storage, self._gone, storage._cdata, FREE, made)
        op = Op(number, name, reads, writes, tuple(news), self.forward, at, random=torch.Tag.nondeterministic_seeded in func.tags)
        op.traffic = 0 if op.view else sum(t.numel() * t.element_size() for t in (*leaves, *out))
        op.flops = float(flop_registry[func.overloadpacket](*args, **kwargs, out_val=result)) if func.overloadpacket in flop_registry else 0.0
        moved = [w for w in writes if self.storages[w].external]
        op.replayable = name not in HIDDEN and not (moved and name not in STATISTICS) and not isinstance(kwargs.get("generator"), torch.Generator)
        if op.random and any(t.device.type != "cpu" for t in (*leaves, *out)):
            op.replayable = False  # only the CPU generator's state is kept; elsewhere what was drawn stays
        for storage_index in dict.fromkeys((*writes, *news)):
            new = storage_index in news
            if new or (self.forward and not self.storages[storage_index].external):  # what the backward pass changes, it has asked for
                self.storages[storage_index].writers.append(number)
        if self.forward:
            for read in dict.fromkeys(reads):
                self.storages[read].readers.append(number)
        self.ops.append(op)
        self.funcs.append(func)
        self.events.append((OP, number))
        return result

    def _gone(self, key: int, kind: str, index: int) -> None:
        if kind in (FREE, DONE):
            self._ids.pop(key, None)
        self.events.append((kind, index))

    def pack(self, tensor: torch.Tensor) -> Any:
        """Autograd's saved-tensor hook: keeps nothing."""
        storage, k = self.index(tensor), len(self.packs)
        self.packs.append(storage)
        self._regions.append(_region(tensor))
        if self.storages[storage].external or tensor.numel() == 0:
            self.packs[-1] = storage if self.storages[storage].external else -1
            return tensor
        self.storages[storage].packs.append(k)
        self.events.append((PACK, k))
        handle = Handle(k, (tensor.shape, tensor.stride(), tensor.dtype, tensor.device))
        weakref.finalize(handle, self._gone, 0, RELEASE, k)
        return handle

    def unpack(self, handle: Any) -> torch.Tensor:
        """Gives a fresh fake tensor and watches how long it is used."""
        if not isinstance(handle, Handle):
            return handle
        self.events.append((UNPACK, handle.k))
        shape, stride, dtype, device = handle.metadata
        with _disable_current_modes(), self._fake:
            given = torch.empty_strided(shape, stride, dtype=dtype, device=device)
        storage = given.untyped_storage()
        self._ids[storage._cdata] = self.packs[handle.k]
        weakref.finalize(storage, self._gone, storage._cdata, DONE, handle.k)
        return given

    def refuse_changes(self) -> None:
        """UserError when a saved tensor was changed later (other parts of its storage may be)."""
        packed = {k: at for at, (kind, k) in enumerate(self.events) if kind == PACK}
        done = {i: at for at, (kind, i) in enumerate(self.events) if kind == OP}
        for op, storage, region in self._changes:
            for k in self.storages[storage].packs:
                if packed[k] < done[op] and _overlap(self.storages[storage].bytes, region, self._regions[k]):
                    raise UserError(f"{self.storages[storage].name} is changed after autograd saved it", "its gradient would be wrong", "out of place instead")


def _region(tensor: torch.Tensor) -> tuple[int, tuple[int, ...], tuple[int, ...]]:
    """(first byte, extents with the element's bytes last, strides in bytes) of a tensor in its storage."""
    element = tensor.element_size()
    return int(tensor.storage_offset()) * element, (*tensor.shape, element), (*(s * element for s in tensor.stride()), 1)


def _overlap(size: int, one: tuple[int, tuple[int, ...], tuple[int, ...]], two: tuple[int, tuple[int, ...], tuple[int, ...]]) -> bool:
    """Whether two regions of a storage share a byte."""
    marks = np.zeros(size, dtype=bool)
    first, second = (np.lib.stride_tricks.as_strided(marks[offset:], shape, strides) for offset, shape, strides in (one, two))
    first[...] = True
    return bool(second.any())


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """Arguments that the operation changes in place."""
    if func.overloadpacket.__name__ in STATISTICS and "functional" not in func.overloadpacket.__name__:
        return []
    found = []
    for place, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            found.append(args[place] if place < len(args) else kwargs.get(argument.name))
    return found


def fakes(model: nn.Module, inputs: Any, mode: FakeTensorMode, device: torch.device, gradients: bool,
          dtype: Callable[[str], torch.dtype] | None) -> tuple[nn.Module, Any, dict[int, tuple[str, str]]]:  # fmt: skip
    """A twin of the model and of its inputs without memory, and storage key -> (name, kind) of each of its tensors."""
    memo: dict[int, Any] = {}
    named: dict[int, tuple[str, str]] = {}

    def fake(tensor: torch.Tensor, kind: torch.dtype | None = None) -> torch.Tensor:
        where = device if tensor.device.type == "meta" else tensor.device
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=kind or tensor.dtype, device=where)

    with mode:
        for kind, tensors in (("parameter", model.named_parameters()), ("buffer", model.named_buffers())):
            for name, tensor in tensors:
                stored = dtype(name) if dtype is not None and tensor.device.type == "meta" else tensor.dtype
                twin = fake(tensor, stored)
                if kind == "parameter":
                    twin = nn.Parameter(twin, requires_grad=tensor.requires_grad)
                    if gradients and tensor.requires_grad:
                        twin.grad = fake(tensor, stored)
                        named[twin.grad.untyped_storage()._cdata] = (f"gradient of {name}", "gradient")
                memo[id(tensor)] = twin
                named[twin.untyped_storage()._cdata] = (name, "parameter")
        given = tree_map(lambda leaf: fake(leaf).requires_grad_(leaf.requires_grad) if isinstance(leaf, torch.Tensor) else leaf, inputs)
        for place, leaf in enumerate(t for t in tree_leaves(given) if isinstance(t, torch.Tensor)):
            named[leaf.untyped_storage()._cdata] = (f"input {place}", "input")
    return copy.deepcopy(model, memo), given, named


def capture(model: nn.Module, step: Step, inputs: Sequence[Any], *, gradients: bool = False, device: str = "cpu",
            dtype: Callable[[str], torch.dtype] | None = None, leave: bool = False,
            then: Callable[[torch.Tensor], torch.Tensor] = lambda loss: loss) -> tuple[Trace, list[Any]]:  # fmt: skip
    """(trace, operation objects) of `then(step(model, *inputs)).backward()`; both give a scalar, and an executor's `forward` stands around `step`.

    gradients: every parameter has a gradient already (a second micro-batch). leave: each gradient goes away when the next one is complete,
    as parallel.offloaded sends them. device, dtype(name): where and how parameters on meta will lie.
    UserError for a step whose saved tensors are changed afterwards, or that reads values (a fake tensor has none).
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with _disable_current_modes():  # whoever counts operations outside does not count these
        twin, given, named = fakes(model, tuple(inputs), mode, torch.device(device), gradients, dtype)
    recorder = Recorder(named)
    recorder._fake = mode
    if leave:
        last: list[torch.Tensor | None] = []

        def sent(parameter: torch.Tensor) -> None:
            last[:], parameter.grad = [parameter.grad], None

        for parameter in twin.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(sent)
    for path, module in twin.named_modules():
        module.register_forward_pre_hook(lambda *_, path=path: recorder.path.append(path))
        module.register_forward_hook(lambda *_: recorder.path.__delitem__(-1), always_call=True)
    try:
        with _disable_current_modes(), mode, recorder:
            with saved_tensors_hooks(recorder.pack, recorder.unpack):
                loss = step(twin, *given)
            recorder.forward, forwards = False, len(recorder.ops)
            then(loss).backward()
    except torch._subclasses.fake_tensor.DataDependentOutputException as error:
        raise UserError("the step reads the value of a tensor", str(error), "plan only what has no .item(), nonzero or Python branch on values") from error
    recorder.refuse_changes()
    return Trace(recorder.storages, recorder.ops, list(recorder.events), recorder.packs, forwards), recorder.funcs
