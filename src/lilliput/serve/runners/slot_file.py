"""A file of equal slots: the last tier of swap space, in an arena of dist (past the page cache where the file system lets, checksummed).

Its name is taken away at once, so nothing is left behind however the process ends. The whole size is reserved when it is made, so a full disk is
found at the start and not in the middle of an answer. A slot is rounded up to pages of 4,096 bytes.
"""

from __future__ import annotations

import os
import secrets
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from lilliput.base.errors import UserError
from lilliput.base.show import size
from lilliput.dist.arena import Arena
from lilliput.dist.engine import BLOCK, Engine

THREADS = 2


class SlotFile:
    """`slots` slots of `bytes` bytes each in an unnamed file."""

    def __init__(self, folder: str, slots: int, bytes: int) -> None:
        """`folder`: where it lies; empty = the system's folder of temporary files. UserError where it cannot be made or does not fit."""
        self.bytes = bytes
        path = Path(folder or tempfile.gettempdir()) / f"lilliput-swap-{os.getpid()}-{secrets.token_hex(4)}"
        try:
            self._arena = Arena(Engine(THREADS, BLOCK), path, {str(slot): bytes for slot in range(slots)}, generations=1)
            path.unlink()
        except (OSError, UserError) as error:
            why = f"{slots:,} blocks need {size(slots * bytes)}: {error.why if isinstance(error, UserError) else error.strerror}"
            fix = "serve.swap_folder=FOLDER on a disk with room, or a smaller serve.swap_file_tokens"
            raise UserError(f"no swap file in {path.parent}", why, fix) from error

    def write(self, slots: Sequence[int], rows_NB: Tensor) -> None:
        """uint8 rows of `bytes` bytes, on the host, to slots."""
        for future in [self._arena.write(str(slot), row) for slot, row in zip(slots, rows_NB, strict=True)]:
            future.result()

    def read(self, slots: Sequence[int]) -> Tensor:
        """uint8 [slots, bytes]. UserError where the disk gives back something else than was written."""
        with torch.inference_mode(False):  # the arena's threads, which are in no such mode, fill it
            rows_NB = torch.empty(len(slots), self.bytes, dtype=torch.uint8)
            for future in [self._arena.read(str(slot), row) for slot, row in zip(slots, rows_NB, strict=True)]:
                future.result()
        return rows_NB
