"""A link: one lane between two tiers. Copies go in the order they were asked for, beside the computation, at most `speed` bytes/s.

On CUDA a link is a stream of its own and the host's side is pinned memory. On a machine whose only device is a CPU the same code
copies from memory to memory: the device is a budget there (memory.meter), and `speed` makes the link as slow as a real one (PCIe 3:
12e9), so that overlap can be measured. PCIe carries both directions at once: take one link for each.
"""

from __future__ import annotations

import math
import mmap
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress

import torch

HUGE = 2 << 20  # bytes of a huge page


class Throttle:
    """Bytes/s that any number of threads share, a token bucket without a burst. speed 0 = as fast as it goes."""

    def __init__(self, speed: float = 0.0) -> None:
        self.speed, self.free, self.lock = speed, 0.0, threading.Lock()

    def run(self, work: Callable[[], None], count: int) -> None:
        """Do work that moves `count` bytes, and return no earlier than the bytes would have come through."""
        if not self.speed:
            work()
            return
        with self.lock:
            self.free = done = max(self.free, time.perf_counter()) + count / self.speed
        work()
        rest = done - time.perf_counter()
        if rest > 0:
            time.sleep(rest)


class Link:
    """One lane. `moved`: bytes asked for so far. device: a CUDA device gives the link a stream of its own."""

    def __init__(self, speed: float = 0.0, device: torch.device | str = "cpu") -> None:
        self.throttle, self.moved = Throttle(speed), 0
        self.stream = torch.cuda.Stream(device) if torch.device(device).type == "cuda" else None
        self.pool = ThreadPoolExecutor(1, "link")

    def copy(self, into: torch.Tensor, source: torch.Tensor) -> Future[None]:
        """Begin into <- source, converted to its dtype; what crosses are the fewer of the two sides' bytes.

        Both must stay as they are until the future is done. CUDA: the copy starts after what the current stream has been given,
        and when the future is done, it is done. An exception of the copy comes with the future.
        """
        return self.begin(lambda into, source: into.copy_(source, non_blocking=True), min(into.nbytes, source.nbytes), into, source)

    def begin(self, work: Callable[..., object], count: int, *tensors: torch.Tensor) -> Future[None]:
        """Run work(*tensors), which moves `count` bytes, in turn. The link lets go of the tensors before the future is done, so bytes are
        freed at planned moments."""
        self.moved += count
        held, ready = list(tensors), None if self.stream is None else torch.cuda.current_stream(self.stream.device).record_event()

        def act() -> None:
            if self.stream is None:
                work(*held)
                return
            assert ready is not None, "the event that the stream waits for"
            with torch.cuda.stream(self.stream):
                self.stream.wait_event(ready)
                work(*held)
                self.stream.synchronize()

        def run() -> None:
            try:
                with torch.no_grad():
                    self.throttle.run(act, count)
            finally:
                held.clear()

        return self.pool.submit(run)

    def finish(self) -> None:
        """Wait until nothing is under way."""
        self.pool.submit(int).result()

    def close(self) -> None:
        """Finish, and end the link's thread."""
        self.pool.shutdown()


def own(count: int, rounded: bool = False) -> torch.Tensor:
    """A uint8 tensor in memory of its own, zeros, in huge pages where the system has them and a whole one is filled. rounded: the last one too, whose
    rest is then bytes that nobody uses."""
    memory = mmap.mmap(-1, count if count < HUGE else -(-count // HUGE) * HUGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if count >= HUGE and hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a system without them
            memory.madvise(mmap.MADV_HUGEPAGE, 0, len(memory) if rounded else count // HUGE * HUGE)
    return torch.frombuffer(memory, dtype=torch.uint8, count=count)


def resting(shape: tuple[int, ...] | torch.Size, dtype: torch.dtype, device: torch.device | str) -> torch.Tensor:
    """An uninitialised tensor in the host's memory that `device` can copy from and to: pinned where it is a GPU."""
    return torch.empty(shape, dtype=dtype, device="cpu", pin_memory=torch.device(device).type == "cuda")


def lasting(shape: tuple[int, ...] | torch.Size, dtype: torch.dtype, device: torch.device | str = "cpu") -> torch.Tensor:
    """Zeros in the host's memory for what stays as long as a run: as `resting`, in huge pages, which an update goes through a tenth faster."""
    count = math.prod(shape) * dtype.itemsize
    if count < HUGE or torch.device(device).type == "cuda":
        return resting(shape, dtype, device).zero_()
    return own(count).view(dtype).view(shape)
