"""Stores: where paged tensors lie while the device does without them, the host's memory or a file. One worker copies, in order.

A host store really copies, also on a machine whose device is the CPU: there the device tier is a budget. A file store is
one file that is made once in its full size (the free space is checked first), so a step cannot run out of disk halfway.
`speed` (bytes/s) slows a store down to a link that this machine does not have; nothing else about it changes.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Protocol

import torch

from lilliput.base.errors import UserError
from lilliput.base.show import size
from lilliput.dist.link import Link, resting


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

    def __init__(self, path: Path, sizes: Mapping[int, int], speed: float = 0.0) -> None:
        self.link = Link(speed)
        self.written = self.read_back = 0
        self.places: dict[int, int] = {}
        end = 0
        for storage, count in sizes.items():
            self.places[storage] = end
            end += -(-count // 4096) * 4096
        path.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(path.parent).free
        if free < end:
            raise UserError(f"no room for {path}", f"the plan pages {size(end)}, the disk has {size(free)} free", "a smaller batch, or another folder")
        self.bytes = end
        self.file = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        if end:
            os.posix_fallocate(self.file, 0, end)

    def write(self, storage: int, flat: torch.Tensor, dtype: torch.dtype) -> Future[None]:
        """See Store; exact bytes only."""
        if dtype != flat.dtype:
            raise UserError("a file store holds exact bytes", f"asked to write {dtype} from {flat.dtype}", "codec=exact, or the host tier")
        self.written += flat.nbytes
        at = self.places[storage]
        return self.link.begin(lambda tensor: self._move(os.pwrite, tensor, at), flat.nbytes, flat)

    def read(self, storage: int, into: torch.Tensor) -> Future[None]:
        """See Store."""
        self.read_back += into.nbytes
        at = self.places[storage]
        return self.link.begin(lambda tensor: self._move(lambda file, view, at: os.preadv(file, [view], at), tensor, at), into.nbytes, into)

    def free(self, storage: int) -> None:
        """Its place stays its own."""

    def close(self) -> None:
        """Finish what is under way and close the file."""
        self.link.close()
        os.close(self.file)

    def _move(self, call: Any, tensor: torch.Tensor, at: int) -> None:
        view, done = memoryview(tensor.numpy().data).cast("B"), 0
        while done < len(view):
            done += call(self.file, view[done:], at + done)
