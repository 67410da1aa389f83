"""What others count of a run, beside memory.meter's tensors: the kernel (resident bytes of the process) and torch's CUDA allocator.

    Resident   "process", "process before" (where counting began). Beside tensors it has the interpreter and its libraries, the allocator's holes
               (freed tensors that it keeps), workspaces inside operations, data, and the pages of mapped model files that were read
    Cuda       "cuda allocated": bytes that the allocator gave out, each tensor rounded up to 512; "cuda reserved": what it holds of the device

The kernel keeps the peak itself (VmHWM; /proc/self/clear_refs sets it back, and getrusage's ru_maxrss with it). Where that is not allowed a
thread looks every 5 ms, and misses what comes and goes in between. Linux refuses no resident byte: on a CPU the meter alone enforces a budget
(and RLIMIT_DATA, where one is set: base.hardware.few_holes). On CUDA the allocator does: it may hold the budget and SLACK. Never run on a GPU.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from lilliput.base.errors import DoesNotFit
from lilliput.base.hardware import data_limit, few_holes, resident_bytes
from lilliput.base.show import size

if TYPE_CHECKING:
    from types import TracebackType

    import torch

SLACK = 0.15  # of a budget: what an allocator may hold beyond the tensors
EVERY = 0.005  # seconds between two looks


class Outside(Protocol):
    """A counter around a run."""

    @property
    def peak(self) -> int:
        """The most bytes since it began."""
        ...

    def figures(self) -> dict[str, float]:
        """Name -> bytes."""
        ...

    def __enter__(self) -> Outside: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None: ...


class Resident:
    """`with Resident() as process: ...` then process.peak and process.before, bytes. `proc`: this process's folder in /proc."""

    def __init__(self, proc: Path = Path("/proc/self")) -> None:
        self.proc, self.before, self.most = proc, 0, 0
        self.done = threading.Event()
        self.looking: threading.Thread | None = None

    def __enter__(self) -> Resident:
        self.before = self.most = resident_bytes()
        try:
            (self.proc / "clear_refs").write_text("5")
            self.kernels()
        except (OSError, StopIteration):  # a sandbox, or another system
            self.looking = threading.Thread(target=self.look, name="resident", daemon=True)
            self.looking.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.most = self.peak
        self.done.set()
        if self.looking is not None:
            self.looking.join()

    @property
    def peak(self) -> int:
        """See Outside."""
        if not self.done.is_set():
            self.most = max(self.most, resident_bytes() if self.looking is not None else self.kernels())
        return self.most

    def kernels(self) -> int:
        """The kernel's own peak."""
        return next(int(line.split()[1]) * 1024 for line in (self.proc / "status").read_text().splitlines() if line.startswith("VmHWM"))

    def look(self) -> None:
        """Until it is done."""
        while not self.done.wait(EVERY):
            self.most = max(self.most, resident_bytes())

    def figures(self) -> dict[str, float]:
        """See Outside."""
        return {"process": float(self.peak), "process before": float(self.before)}


class Cuda:
    """The same of one device. budget: bytes of it that a job may take, None = all. cuda: torch.cuda, or what counts in its place."""

    def __init__(self, device: torch.device, budget: int | None = None, cuda: Any = None) -> None:
        if cuda is None:
            import torch

            cuda = torch.cuda
        self.device, self.budget, self.cuda = device, budget, cuda

    def __enter__(self) -> Cuda:
        if self.budget is not None:
            total = self.cuda.get_device_properties(self.device).total_memory
            self.cuda.empty_cache()  # what is held and unused counts against the limit
            self.cuda.set_per_process_memory_fraction(min(1.0, self.budget * (1 + SLACK) / total), self.device)
        self.cuda.reset_peak_memory_stats(self.device)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.budget is None:
            return
        with contextlib.suppress(RuntimeError):  # after a fault of the device nothing can be set
            self.cuda.set_per_process_memory_fraction(1.0, self.device)
        if isinstance(error, self.cuda.OutOfMemoryError):
            why = f"its allocator holds {size(self.cuda.max_memory_reserved(self.device))}, {size(self.budget)} and {SLACK:.0%} are the budget; {error}"
            raise DoesNotFit("the CUDA device refused an allocation", why, "a larger memory.device, or a smaller train.micro_batch") from error

    @property
    def peak(self) -> int:
        """See Outside."""
        most: int = self.cuda.max_memory_allocated(self.device)
        return most

    def figures(self) -> dict[str, float]:
        """See Outside."""
        return {"cuda allocated": float(self.peak), "cuda reserved": float(self.cuda.max_memory_reserved(self.device))}


def outside(device: torch.device, budget: Mapping[str, int], say: Callable[[str], None]) -> Outside:
    """The counter of the memory that a device's tensors lie in. budget: tier -> bytes; on a CPU under RLIMIT_DATA freed blocks go back at once, for good."""
    if device.type == "cuda":
        return Cuda(device, budget.get("device"))
    if budget and data_limit() is not None:
        refused = few_holes(sum(budget.values()))
        say("a limit on data is set (RLIMIT_DATA): " + (refused or "freed blocks go back to the system at once, which costs time"))
    return Resident()
