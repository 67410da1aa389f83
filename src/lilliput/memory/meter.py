"""Meter: bytes that are really alive, counted tensor by tensor, to hold the ledger to its word.

A dispatch mode sees every op, forward and backward. Each new storage is counted once when an op returns it and taken
off when Python and autograd have let it go, so the figures are exact and do not depend on the allocator, on the page
cache or on other processes. What it cannot see: memory inside one kernel (workspaces), and storages made before it
began (`known` leaves them out for good, `adopt` counts them). Costs 80 us
an op and more on a busy core (benchmarks/memory.md): only runs with a budget train under it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lilliput.base.errors import DoesNotFit
from lilliput.base.show import size


def storage_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of the distinct storages behind these tensors (views and tied tensors count once)."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


class Meter(TorchDispatchMode):
    """`with Meter() as meter: ...` then meter.peak, meter.live (bytes) and meter.calls (op name -> count).

    Only storages created inside the block count, and those of `watch`, whose sizes are looked up at every operation. `mark()` restarts
    the peak at what is alive now. `budget` (tier -> bytes) is enforced: DoesNotFit at the first operation whose result does not fit,
    after `relieve` was asked to free the missing bytes of the device tier. What is made under `placing` is another tier's. `contiguous`: bytes
    that one storage may have at most (a fragmented device), watched ones too; enforced.
    """

    def __init__(self, known: Iterable[torch.Tensor] = (), budget: Mapping[str, int] | None = None, relieve: Callable[[int], None] | None = None,
                 watch: Iterable[torch.Tensor] = (), contiguous: int | None = None) -> None:  # fmt: skip
        super().__init__()
        self.contiguous = contiguous
        self.tiers: dict[str, list[int]] = {"device": [0, 0]}  # tier -> [live, peak] bytes
        self.budget, self.relieve = dict(budget or {}), relieve
        self._tier = "device"
        self.calls: dict[str, int] = {}
        self._seen: dict[int, Any] = {}
        self._watched: list[torch.UntypedStorage] = []
        for tensor in known:
            self._seen[tensor.untyped_storage()._cdata] = None
        self.largest = 0  # bytes of the largest storage that was made
        self.visiting = 0  # bytes of watched storages
        self.watch(watch)

    @property
    def live(self) -> int:
        """Bytes alive in the device tier."""
        return self.tiers["device"][0]

    @property
    def peak(self) -> int:
        """The most there ever were."""
        return self.tiers["device"][1]

    def adopt(self, tensors: Iterable[torch.Tensor]) -> None:
        """Count tensors that were made before, as if they were made now. DoesNotFit where they do not."""
        for tensor in tensors:
            self._count(tensor.untyped_storage())

    def watch(self, tensors: Iterable[torch.Tensor]) -> None:
        """Look at the sizes of these from now on."""
        self._watched += [tensor.untyped_storage() for tensor in tensors]
        for storage in self._watched:
            self._seen[storage._cdata] = None
        self._look()

    def mark(self) -> int:
        """Set the device tier's peak to the live bytes and return them."""
        self.tiers["device"][1] = self.live
        return self.live

    @contextmanager
    def placing(self, tier: str) -> Iterator[None]:
        """What is made inside belongs to another tier."""
        before, self._tier = self._tier, tier
        try:
            yield
        finally:
            self._tier = before

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the op, then count the storages it made."""
        self._look()
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        self.calls[name] = self.calls.get(name, 0) + 1
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and leaf.device.type != "meta":
                self._count(leaf.untyped_storage())
        return result

    def _look(self) -> None:
        if not self._watched:
            return
        sizes = [storage.nbytes() for storage in self._watched]
        self._whole(max(sizes))
        now, tier = sum(sizes), self.tiers["device"]
        tier[0] += now - self.visiting
        tier[1], self.visiting = max(tier), now
        limit = self.budget.get("device")
        if limit is not None and tier[0] > limit:
            raise DoesNotFit("what came to the device does not fit", f"{size(tier[0])} are in use, {size(limit)} is the budget",
                             f"{tier[0]} bytes would be enough here")  # fmt: skip

    def _whole(self, count: int) -> None:
        if self.contiguous is not None and count > self.contiguous:
            why = f"no piece of free memory is larger than {size(self.contiguous)}"
            raise DoesNotFit(f"{size(count)} in one piece are refused", why, "smaller tensors (infinity.tiles)")

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, count = storage._cdata, storage.nbytes()
        if key in self._seen or count == 0:
            return
        self._whole(count)
        tier = self.tiers.setdefault(self._tier, [0, 0])
        limit = self.budget.get(self._tier)
        if limit is not None and tier[0] + count > limit and self._tier == "device" and self.relieve is not None:
            self.relieve(tier[0] + count - limit)
        if limit is not None and tier[0] + count > limit:
            raise DoesNotFit(f"an allocation of {size(count)} is refused", f"{size(tier[0])} of the {self._tier} tier's {size(limit)} are in use",
                             f"{tier[0] + count} bytes would be enough here")  # fmt: skip
        self._seen[key] = weakref.finalize(storage, self._release, key, count, tier)
        tier[0] += count
        tier[1], self.largest = max(tier), max(self.largest, count)

    def _release(self, key: int, count: int, tier: list[int]) -> None:
        self._seen.pop(key, None)
        tier[0] -= count
