"""Bytes to and from files beside the computation: threads that read and write blocks past the page cache (O_DIRECT).

A file's pages are not kept in memory: what is stored leaves it, and what is read came from the disk. O_DIRECT wants memory, offsets
and lengths in multiples of 4096 bytes. Blocks of tensors that begin on a page (`whole_pages`) go straight to and from them; every other
block goes through an aligned buffer of a pool of fixed size (pinned where a GPU copies from it), its checksum taken in the pass that
copies it. Blocks of 2 MiB in huge pages and two threads reach what such a disk gives (benchmarks/infinity.md); the other threads sum and copy meanwhile.
A file system that refuses O_DIRECT is used through the page cache, and `reason` says so.
"""

from __future__ import annotations

import ctypes
import errno
import os
import queue
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lilliput.base.errors import UserError
from lilliput.base.records import disk_errors, locked
from lilliput.dist.link import Throttle, own
from lilliput.ops.pages import PAGE, sums

if TYPE_CHECKING:
    from torch import Tensor

BLOCK = 1 << 20  # bytes that one checksum covers


def aligned(count: int) -> int:
    """The next multiple of a page."""
    return -(-count // PAGE) * PAGE


def whole_pages(count: int) -> Tensor:
    """A buffer of its own, uint8, of so many bytes rounded up to pages, which begins on one. In huge pages where the system has them: a disk takes
    a limited number of pieces of memory at a time, and a block of single pages is several requests."""
    return own(aligned(count), rounded=True)


def straight(part: Tensor) -> bool:
    """Whether the disk can read from and write to this flat uint8 tensor itself: whole pages of the CPU's memory."""
    return part.device.type == "cpu" and part.data_ptr() % PAGE == 0 and part.numel() % PAGE == 0


class Buffers:
    """`count` aligned buffers of `size` bytes, made once. Whoever wants one more waits for one that is given back."""

    def __init__(self, count: int, size: int, pinned: bool = False) -> None:
        self.count, self.size = count, aligned(size)
        whole = whole_pages(count * self.size)
        if pinned:
            torch.cuda.check_error(torch.cuda.cudart().cudaHostRegister(whole.data_ptr(), whole.nbytes, 0))
        self.free: queue.SimpleQueue[Tensor] = queue.SimpleQueue()
        for part in whole.split(self.size):
            self.free.put(part)

    @contextmanager
    def taken(self) -> Iterator[Tensor]:
        """A buffer, uint8, for as long as the block lasts."""
        buffer = self.free.get()
        try:
            yield buffer
        finally:
            self.free.put(buffer)


class File:
    """One preallocated file. `direct`: whether it is past the page cache; `reason`: why not. alone: no other process may have it open so."""

    def __init__(self, path: Path, size: int, alone: bool = False) -> None:
        self.path, self.size, self.reason = path, aligned(size), ""
        flags = os.O_RDWR | os.O_CREAT
        with disk_errors(path, self.size):
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                self.handle = os.open(path, flags | getattr(os, "O_DIRECT", 0), 0o600)
                self.reason = "" if hasattr(os, "O_DIRECT") else "this system has no O_DIRECT"
            except OSError as fault:
                if fault.errno != errno.EINVAL:
                    raise
                self.handle, self.reason = os.open(path, flags, 0o600), f"the file system of {path.parent} refuses O_DIRECT"
            try:
                if alone and not locked(self.handle):
                    raise UserError(f"{path} is in use", "another process has it open", "wait for it, or choose another folder")
                if os.fstat(self.handle).st_size < self.size:
                    os.posix_fallocate(self.handle, 0, self.size)
            except BaseException:
                os.close(self.handle)
                raise
        self._close = weakref.finalize(self, os.close, self.handle)

    @property
    def direct(self) -> bool:
        """Whether reads come from the disk and not from memory."""
        return not self.reason

    def read(self, buffer: Tensor, at: int) -> None:
        """Fill an aligned buffer from a page on."""
        self._move(lambda view, at: os.preadv(self.handle, [view], at), buffer, at)

    def write(self, buffer: Tensor, at: int) -> None:
        """Write an aligned buffer to a page on."""
        self._move(lambda view, at: os.pwritev(self.handle, [view], at), buffer, at)

    def settle(self) -> None:
        """Have the disk hold what was written."""
        with disk_errors(self.path):
            os.fdatasync(self.handle)

    def close(self) -> None:
        """Close the file."""
        self._close()

    def _move(self, call: Callable[[memoryview, int], int], buffer: Tensor, at: int) -> None:
        # NOTE not buffer.numpy(): a storage that numpy has seen can never be resized again, and parameters that visit are
        view, done = memoryview((ctypes.c_char * buffer.numel()).from_address(buffer.data_ptr())).cast("B"), 0
        with disk_errors(self.path, len(view)):
            while done < len(view):
                moved = call(view[done:], at + done)
                if moved == 0:
                    raise OSError(errno.EIO, f"the file ends at byte {at + done}")
                done += moved


class Engine:
    """Threads, their pool of buffers, and how many bytes they moved. speed: bytes/s of a slower disk that is played; 0 = this one's."""

    def __init__(self, threads: int = 6, block: int = 4 << 20, speed: float = 0.0, device: torch.device | str = "cpu") -> None:
        self.block, self.throttle = aligned(block), Throttle(speed)
        self.buffers = Buffers(threads, self.block, torch.device(device).type == "cuda")
        self.pool = ThreadPoolExecutor(threads, "disk")
        self.read_bytes = self.written_bytes = 0
        self.lock = threading.Lock()

    def read(self, file: File, into: Tensor, at: int, check: Callable[[int, list[int]], None] = lambda start, sums: None) -> Future[None]:
        """Begin to fill a flat uint8 tensor from byte `at` (a page) of a file on. check(start, sums) gets the checksums of
        what came, one for every BLOCK bytes from `start` on, before the future is done."""

        def one(start: int, part: Tensor) -> None:
            if straight(part):
                file.read(part, at + start)
                check(start, sums(part, BLOCK))
                return
            with self.buffers.taken() as buffer:
                file.read(buffer[: aligned(part.numel())], at + start)
                check(start, sums(buffer[: part.numel()], BLOCK, part))

        return self._each(one, into, reading=True)

    def write(self, file: File, source: Tensor, at: int, note: Callable[[int, list[int]], None] = lambda start, sums: None) -> Future[None]:
        """Begin to write a flat uint8 tensor from byte `at` (a page) on. note(start, sums) gets the checksums, one for
        every BLOCK bytes from `start` on, before the future is done; the rest of the last page is zeros."""

        def one(start: int, part: Tensor) -> None:
            if straight(part):
                file.write(part, at + start)
                note(start, sums(part, BLOCK))  # not before: a disk takes what a core has just read at 4/5 of its speed
                return
            with self.buffers.taken() as buffer:
                if part.device.type == "cpu":
                    note(start, sums(part, BLOCK, buffer[: part.numel()]))
                else:
                    buffer[: part.numel()].copy_(part)
                    note(start, sums(buffer[: part.numel()], BLOCK))
                buffer[part.numel() : aligned(part.numel())].zero_()
                file.write(buffer[: aligned(part.numel())], at + start)

        return self._each(one, source, reading=False)

    def close(self) -> None:
        """Finish what is under way and end the threads."""
        self.pool.shutdown()

    def _each(self, one: Callable[[int, Tensor], None], flat: Tensor, reading: bool) -> Future[None]:
        """one(start, part) for every block of a flat tensor, on the threads. They have let go of it when the future is done, which has
        the first exception."""
        done: Future[None] = Future()
        starts = range(0, flat.numel(), self.block)
        left, faults, held = [len(starts)], [], [flat]

        def run(start: int) -> None:
            try:
                size = min(self.block, held[0].numel() - start)
                self.throttle.run(lambda: one(start, held[0][start : start + size]), size)
            except BaseException as fault:  # goes to whoever waits
                faults.append(fault)
            with self.lock:
                left[0] -= 1
                last = left[0] == 0
            if last:
                held.clear()
                done.set_exception(faults[0]) if faults else done.set_result(None)

        with self.lock:
            moved = sum(aligned(min(self.block, flat.numel() - start)) for start in starts)
            self.read_bytes, self.written_bytes = self.read_bytes + moved * reading, self.written_bytes + moved * (not reading)
        for start in starts:
            self.pool.submit(run, start)
        if not starts:
            done.set_result(None)
        return done


def settled(value: Any = None) -> Future[Any]:
    """A future that is done."""
    future: Future[Any] = Future()
    future.set_result(value)
    return future
