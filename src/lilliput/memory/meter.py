"""Meter: bytes that are really alive, counted tensor by tensor, to hold the ledger to its word.

A dispatch mode sees every op, forward and backward. Each new storage is counted once when an op returns it and taken
off when Python and autograd have let it go, so the figures are exact and do not depend on the allocator, on the page
cache or on other processes. What it cannot see: memory inside one kernel (workspaces), and storages made before it
began (pass them in `known`). Costs ~10 us an op: for tests, papers and `plan` checks, not for training.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def storage_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of the distinct storages behind these tensors (views and tied tensors count once)."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


class Meter(TorchDispatchMode):
    """`with Meter() as meter: ...` then meter.peak, meter.live (bytes) and meter.calls (op name -> count).

    Only storages created inside the block count. `mark()` restarts the peak at what is alive now.
    """

    def __init__(self, known: Iterable[torch.Tensor] = ()) -> None:
        super().__init__()
        self.live = 0
        self.peak = 0
        self.calls: dict[str, int] = {}
        self._seen: dict[int, Any] = {}
        for tensor in known:
            self._seen[tensor.untyped_storage()._cdata] = None

    def mark(self) -> int:
        """Set the peak to the live bytes and return them."""
        self.peak = self.live
        return self.live

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the op, then count the storages it made."""
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        self.calls[name] = self.calls.get(name, 0) + 1
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and leaf.device.type != "meta":
                self._count(leaf.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._seen or size == 0:
            return
        self._seen[key] = weakref.finalize(storage, self._release, key, size)
        self.live += size
        self.peak = max(self.peak, self.live)

    def _release(self, key: int, size: int) -> None:
        self._seen.pop(key, None)
        self.live -= size
