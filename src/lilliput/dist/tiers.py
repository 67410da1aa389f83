"""Tiers: where tensors rest that the device does without. The host's memory or a disk, behind the same few words.

    window    a piece of a tensor to work on: the host's own memory, or a buffer that a disk fills
    back      the piece has changed
    read      a piece into a tensor of the device's;  write: the other way
    turn      all pieces of a tensor have been written;  commit: everything outlives this process (a disk's)

A disk has an arena for each kind of tensor (parameters, gradients, first, second): see arena.py. A device on a machine that has none
is a budget (memory.meter) and its link a copy from memory to memory, as slow as `speed` says.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from lilliput.dist.arena import Arena
from lilliput.dist.engine import Engine, settled
from lilliput.dist.link import Link, lasting


class Tier(Protocol):
    """Named flat tensors of one kind. `start`: the first element of a piece."""

    name: str

    def read(self, name: str, into: Tensor, start: int = 0) -> Future[None]:
        """Begin to fill a flat tensor of the device's. What was never written is zeros."""
        ...

    def write(self, name: str, source: Tensor, start: int = 0) -> Future[None]:
        """Begin to take a flat tensor of the device's."""
        ...

    def window(self, name: str, start: int, count: int, buffer: Tensor) -> tuple[Tensor, Future[None]]:
        """A piece to work on when the future is done: the beginning of the buffer, filled, or the host's own memory."""
        ...

    def back(self, name: str, start: int, piece: Tensor) -> Future[None]:
        """Begin to keep what was done to a window."""
        ...

    def holds(self) -> bool:
        """Whether there are generations of an earlier process to go back to."""
        ...

    def turn(self, name: str) -> None:
        """All pieces of a tensor have been asked to be written: what comes next reads them."""
        ...

    def close(self) -> None:
        """Finish what is under way."""
        ...


class HostTier:
    """In the host's memory, pinned where the device is a GPU."""

    name = "host"

    def __init__(self, shapes: Mapping[str, tuple[int, torch.dtype]], device: torch.device, speed: float = 0.0) -> None:
        self.shapes, self.device = dict(shapes), device
        self.down, self.up = Link(speed, device), Link(speed, device)
        self.tensors = {name: lasting((count,), dtype, device) for name, (count, dtype) in self.shapes.items()}

    def read(self, name: str, into: Tensor, start: int = 0) -> Future[None]:
        """See Tier."""
        self.down.finish()
        return self.up.copy(into, self.tensors[name][start : start + into.numel()])

    def write(self, name: str, source: Tensor, start: int = 0) -> Future[None]:
        """See Tier."""
        return self.down.copy(self.tensors[name][start : start + source.numel()], source)

    def window(self, name: str, start: int, count: int, buffer: Tensor) -> tuple[Tensor, Future[None]]:
        """See Tier."""
        self.down.finish()
        return self.tensors[name][start : start + count], settled()

    def back(self, name: str, start: int, piece: Tensor) -> Future[None]:
        """See Tier."""
        return settled()

    def holds(self) -> bool:
        """See Tier."""
        return False

    def turn(self, name: str) -> None:
        """See Tier."""

    def close(self) -> None:
        """See Tier."""
        self.down.close()
        self.up.close()


class DiskTier:
    """In one arena of a folder."""

    name = "disk"

    def __init__(self, shapes: Mapping[str, tuple[int, torch.dtype]], engine: Engine, path: Path, generations: int = 2) -> None:
        self.shapes = dict(shapes)
        self.arena = Arena(engine, path, {name: count * dtype.itemsize for name, (count, dtype) in self.shapes.items()}, generations)

    def read(self, name: str, into: Tensor, start: int = 0) -> Future[None]:
        """See Tier."""
        return self.arena.read(name, into, start * into.element_size())

    def write(self, name: str, source: Tensor, start: int = 0) -> Future[None]:
        """See Tier."""
        return self.arena.write(name, source, start * source.element_size())

    def window(self, name: str, start: int, count: int, buffer: Tensor) -> tuple[Tensor, Future[None]]:
        """See Tier."""
        return buffer[:count], self.arena.read(name, buffer[:count], start * buffer.element_size())

    def back(self, name: str, start: int, piece: Tensor) -> Future[None]:
        """See Tier."""
        return self.arena.write(name, piece, start * piece.element_size())

    def holds(self) -> bool:
        """See Tier."""
        return self.arena.generation == 0 and bool(self.arena.tags())

    def turn(self, name: str) -> None:
        """See Tier."""
        self.arena.turn(name)

    def close(self) -> None:
        """See Tier."""
        self.arena.close()


def close(tiers: Iterable[Tier]) -> None:
    """End the threads of several tiers and let go of their files."""
    tiers = list(tiers)
    for engine in {tier.arena.engine for tier in tiers if isinstance(tier, DiskTier)}:
        engine.close()
    for tier in tiers:
        tier.close()
