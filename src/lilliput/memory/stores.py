"""Stores: where paged tensors lie while the device does without them, the host's memory or a file.

A host store really copies, also on a machine whose device is the CPU: there the device tier is a budget. A file store is
one file that is made once in its full size (the free space is checked first), so a step cannot run out of disk halfway.
`speed` (bytes/s) slows a store down to a link that this machine does not have; nothing else about it changes.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Protocol

import torch

from lilliput.base.errors import UserError
from lilliput.dist.arena import require
from lilliput.dist.engine import Engine, File, aligned
from lilliput.dist.link import Link, resting
from lilliput.memory.trace import Trace


class Store(Protocol):
    """Where an executor sends storages by number."""

    def write(self, storage: int, flat: torch.Tensor, dtype: torch.dtype) -> Future[None]:
        """Begin to copy a flat tensor here, as this dtype."""
        ...

    def read(self, storage: int, into: torch.Tensor) -> Future[None]:
        """Begin to copy it back into a flat tensor of the same bytes (or of a wider dtype)."""
        ...

    def free(self, storage: int) -> None:
        """Forget it; nothing when it is not here."""
        ...


class HostStore:
    """Buffers in the host's memory, pinned where the tensors come from a GPU."""

    def __init__(self, speed: float = 0.0, device: torch.device | str = "cpu") -> None:
        self.link, self.device = Link(speed, device), torch.device(device)
        self.written = self.read_back = 0
        self.buffers: dict[int, torch.Tensor] = {}

    def write(self, storage: int, flat: torch.Tensor, dtype: torch.dtype) -> Future[None]:
        """See Store."""
        buffer = resting(flat.shape, dtype, self.device)
        self.buffers[storage] = buffer
        self.written += buffer.nbytes
        return self.link.copy(buffer, flat)

    def read(self, storage: int, into: torch.Tensor) -> Future[None]:
        """See Store."""
        buffer = self.buffers[storage]
        self.read_back += buffer.nbytes
        return self.link.copy(into, buffer)

    def free(self, storage: int) -> None:
        """See Store."""
        self.buffers.pop(storage, None)


class FileStore:
    """One file, a fixed place a storage. `sizes`: bytes of each storage that may come."""

    def __init__(self, path: Path, sizes: Mapping[int, int], speed: float = 0.0, device: torch.device | str = "cpu") -> None:
        self.places: dict[int, int] = {}
        self.bytes = self.written = self.read_back = 0
        for storage, count in sizes.items():
            self.places[storage] = self.bytes
            self.bytes += aligned(count)
        require(path.parent, {path: self.bytes})
        self.file, self.engine = File(path, self.bytes), Engine(speed=speed, device=device)

    def write(self, storage: int, flat: torch.Tensor, dtype: torch.dtype) -> Future[None]:
        """See Store; exact bytes only."""
        if dtype != flat.dtype:
            raise UserError("a file store holds exact bytes", f"asked to write {dtype} from {flat.dtype}", "codec=exact, or the host tier")
        self.written += flat.nbytes
        return self.engine.write(self.file, flat.view(torch.uint8), self.places[storage])

    def read(self, storage: int, into: torch.Tensor) -> Future[None]:
        """See Store."""
        self.read_back += into.nbytes
        return self.engine.read(self.file, into.view(torch.uint8), self.places[storage])

    def free(self, storage: int) -> None:
        """Its place stays its own."""

    def close(self) -> None:
        """Finish what is under way and close the file."""
        self.engine.close()
        self.file.close()


def pages(trace: Trace, scratch: str, device: torch.device) -> dict[str, Store]:
    """Where a plan's pages go: a file of the trace's own in the folder `scratch`, made in its full size, or the host's memory."""
    if not scratch:
        return {"host": HostStore(device=device)}
    return {"disk": FileStore(Path(scratch) / f"pages-{trace.digest()}", {s.index: s.bytes for s in trace.saved()}, device=device)}
