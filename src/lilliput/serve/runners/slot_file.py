"""A file of equal slots: the last tier of swap space. It has no name, so nothing is left behind however the process ends.

The whole size is reserved when it is made, so a full disk is found at the start and not in the middle of an answer. Reads and writes go through the system's
page cache: what was just written comes back from memory as long as the system has some.
"""

from __future__ import annotations

import os
import tempfile

import torch
from torch import Tensor

from lilliput.base.errors import UserError
from lilliput.base.show import size


class SlotFile:
    """`slots` slots of `bytes` bytes each in an unnamed file."""

    def __init__(self, folder: str, slots: int, bytes: int) -> None:
        """`folder`: where it lies; empty = the system's folder of temporary files. UserError where it cannot be made or does not fit."""
        self.bytes = bytes
        try:
            self._file = tempfile.TemporaryFile(dir=folder or None, buffering=0)  # noqa: SIM115  # open as long as the cache is
            os.posix_fallocate(self._file.fileno(), 0, max(1, slots * bytes))
        except OSError as error:
            where = folder or tempfile.gettempdir()
            raise UserError(f"no swap file in {where}", f"{slots:,} blocks need {size(slots * bytes)}: {error.strerror}",
                            "serve.swap_folder=FOLDER on a disk with room, or a smaller serve.swap_file_tokens") from error  # fmt: skip

    def write(self, slot: int, data: Tensor) -> None:
        """`data`: uint8 [bytes], on the host."""
        view, at = memoryview(data.contiguous().numpy()), slot * self.bytes  # type: ignore[arg-type]
        while view:
            done = os.pwrite(self._file.fileno(), view, at)
            view, at = view[done:], at + done

    def read(self, slot: int) -> Tensor:
        """uint8 [bytes]."""
        data = torch.empty(self.bytes, dtype=torch.uint8)
        view, at = memoryview(data.numpy()), slot * self.bytes  # type: ignore[arg-type]
        while view:
            done = os.preadv(self._file.fileno(), [view], at)
            assert done, f"slot {slot} lies behind the end of the swap file"
            view, at = view[done:], at + done
        return data
