"""Parameters that visit the device: they rest in another tier and have bytes on the device only around their use.

A parameter stays one tensor all its life; its storage is emptied and filled again, so whatever autograd or a memory plan holds of it
keeps its meaning. A module's forward pass asks for its own (hooks around it), its backward pass when the gradient of its output is
there; an operation that a memory plan runs again asks by `summon`. At most `capacity` bytes are here at a time.
Read-ahead follows the order in which they were asked for before: what came after the last two is fetched next, as far as it fits.
Where the order changes, the new one is learned at once; a wrong guess costs time, never a wrong number. Vectors stay once they are here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import _disable_current_modes

from lilliput.dist.tiers import Tier, close
from lilliput.models.layers import Embedding


def stays(parameter: torch.Tensor) -> bool:
    """Whether it is a vector, which stays once it is here. What is stored as bytes of a codec is a matrix."""
    return parameter.dim() == 1 and parameter.is_floating_point()


class Residents:
    """capacity: bytes of matrices. `waited`: uses that were not here or on their way; `retraced`: guesses that were replaced."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.parameters: dict[str, nn.Parameter] = {}
        self.flat: dict[str, torch.Tensor] = {}  # of the same storages, but filling them is no change to autograd
        self.names: dict[int, str] = {}  # storage -> parameter
        self.here: dict[str, Future[None]] = {}  # filled or on their way, least recently used first
        self.used = self.peak = self.waited = self.fetched = self.retraced = 0
        self.pinned: dict[str, int] = {}
        self.backward: tuple[str, ...] = ()  # what the backward pass is at
        self.last: tuple[str, str] = ("", "")
        self.after: dict[tuple[str, str], str] = {}
        self.first: dict[str, Callable[[], torch.Tensor]] = {}  # values that are not written yet

    def settle(self, parameters: Mapping[str, nn.Parameter], tier: Tier) -> None:
        """The parameters, whose storages are empty, and where their bytes are."""
        self.tier, self.parameters = tier, dict(parameters)
        self.flat = {name: p.data.view(-1) for name, p in self.parameters.items()}
        self.names = {p.untyped_storage()._cdata: name for name, p in self.parameters.items()}

    def watch(self, model: nn.Module, tied: Iterable[tuple[str, ...]]) -> None:
        """Hook every module with parameters of its own, and those that use one of another module's (groups of names that are one tensor)."""
        for path, module in model.named_modules():
            every = (f"{path}.{leaf}" if path else leaf for leaf, _ in module.named_parameters(recurse=False))
            own = tuple(name for name in every if name in self.parameters)
            foreign = tuple(group[0] for group in tied if any(name.rpartition(".")[0] == path for name in group[1:]))
            if own or foreign:
                self._hook(module, (*own, *foreign))

    def _hook(self, module: nn.Module, names: tuple[str, ...]) -> None:
        table = isinstance(module, Embedding)  # whose backward pass reads no weight

        def before(which: nn.Module, given: Any) -> None:
            if which is module:  # not a copy of it that a plan is made with
                self.pin(names)

        def after(which: nn.Module, given: Any, result: torch.Tensor) -> None:
            if which is not module:
                return
            self.unpin(names)
            if result.requires_grad and not table:
                result.register_hook(lambda gradient: self.turn_to(names))

        module.register_forward_pre_hook(before)
        module.register_forward_hook(after)

    # ---- uses

    def pin(self, names: Iterable[str]) -> None:
        """They are here until `unpin`."""
        for name in names:
            self.pinned[name] = self.pinned.get(name, 0) + 1
        for name in names:
            self.need(name)

    def unpin(self, names: Iterable[str]) -> None:
        """They may leave."""
        for name in names:
            self.pinned[name] -= 1
            if not self.pinned[name]:
                del self.pinned[name]

    def turn_to(self, names: tuple[str, ...]) -> None:
        """The backward pass is at these now, and done with the ones before."""
        self.unpin(self.backward)
        self.backward = names
        self.pin(names)

    def summon(self, tensor: torch.Tensor) -> None:
        """Make a tensor usable for the next operation, if it is one of these."""
        name = self.names.get(tensor.untyped_storage()._cdata)
        if name is not None:
            self.need(name)

    def need(self, name: str) -> None:
        """Have a parameter here, and begin to fetch what probably comes next."""
        if self.first:
            self.start()
        key, self.last = self.last, (self.last[1], name)
        if self.after.get(key, name) != name:
            self.retraced += 1
        self.after[key] = name
        if name not in self.here:
            self.waited += 1
            self._leave(self.size(name), ())
            self._fetch(name)
        self.here[name] = self.here.pop(name)  # most recently used
        self.here[name].result()
        self.ahead()

    def ahead(self) -> None:
        """Fetch what came after the last two, and after that, as long as nothing that comes before it has to leave."""
        key, coming = self.last, [self.last[1]]
        while (name := self.after.get(key)) is not None and len(coming) <= len(self.flat):
            coming.append(name)
            key = (key[1], name)
            if name not in self.here:
                if not self._leave(self.size(name), coming):
                    return
                self._fetch(name)

    def size(self, name: str) -> int:
        """Bytes of a parameter."""
        return self.flat[name].numel() * self.flat[name].element_size()

    def _fetch(self, name: str) -> None:
        self.used += self.size(name) if not stays(self.parameters[name]) else 0
        self.peak, self.fetched = max(self.peak, self.used), self.fetched + self.size(name)
        self.parameters[name].untyped_storage().resize_(self.size(name))
        with _disable_current_modes(), torch.no_grad():
            self.here[name] = self.tier.read(name, self.flat[name])

    def _leave(self, count: int, but: Iterable[str]) -> bool:
        """Free room for so many bytes; False when that takes one that is pinned or in `but`."""
        while self.used + count > self.capacity:
            name = next((n for n in self.here if n not in self.pinned and n not in but and not stays(self.parameters[n])), None)
            if name is None:
                return False
            self._drop(name)
        return True

    def _drop(self, name: str) -> None:
        self.here.pop(name).result()
        self.parameters[name].untyped_storage().resize_(0)
        self.used -= self.size(name) if not stays(self.parameters[name]) else 0

    def clear(self) -> None:
        """Nothing is here: what is in the tier is about to change, or has."""
        self.unpin(self.backward)
        self.backward = ()
        for name in list(self.here):
            self._drop(name)

    def close(self) -> None:
        """Nothing is here, and the tier lets go of its files."""
        self.clear()
        close([self.tier])

    # ---- values

    def take(self, name: str, make: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Make a parameter's first value, move it to the tier and return it emptied. Where the tier holds generations that may be gone back
        to, nothing is written before it is clear that they are not."""
        value = make()
        if self.tier.holds():
            self.first[name] = make
        else:
            self.put(name, value)
        value.untyped_storage().resize_(0)
        return value

    def put(self, name: str, value: torch.Tensor) -> None:
        """Write a parameter's value."""
        self.tier.write(name, value.view(-1)).result()
        self.tier.turn(name)

    def start(self) -> None:
        """Nobody went back: write the first values that waited."""
        waiting, self.first = self.first, {}
        with _disable_current_modes(), torch.no_grad():
            for name, make in waiting.items():
                self.put(name, make())

    @contextmanager
    def present(self, path: str) -> Iterator[None]:
        """What is below a module is here until the end of the block."""
        if self.first:
            self.start()
        names = [name for name in self.parameters if name.startswith(f"{path}.")]
        self.pin(names)
        try:
            yield
        finally:
            self.unpin(names)
