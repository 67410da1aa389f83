"""What the kernel and torch's CUDA allocator count beside the meter's tensors. No GPU is needed: a stand-in has the allocator's counters."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lilliput.base import hardware
from lilliput.base.errors import DoesNotFit
from lilliput.memory.meter import Meter
from lilliput.memory.outside import SLACK, Cuda, Resident, outside

MB = 1 << 20


def no_reset(tmp_path: Path) -> Path:
    """A /proc/self whose peak cannot be set back."""
    (tmp_path / "clear_refs").mkdir()
    return tmp_path


@pytest.mark.parametrize("kernels", [True, False], ids=["kernel's peak", "looked at"])
def test_the_peak_of_a_process_is_of_its_own_time(kernels: bool, tmp_path: Path) -> None:
    """256 MB that came and went before do not count, 96 that come and go do; what is there stays in both figures."""
    with Meter():
        torch.ones(1)  # what a first use loads: 150 MB
    torch.ones(256 * MB // 4)
    with Resident() if kernels else Resident(no_reset(tmp_path)) as process, Meter() as meter:
        assert (process.looking is None) == kernels
        x = torch.ones(96 * MB // 4)
        time.sleep(0.05)
        del x
        small = process.peak
    assert meter.peak == 96 * MB
    assert 94 * MB <= process.peak - process.before < 120 * MB
    torch.ones(128 * MB // 4)
    assert process.figures() == {"process": float(small), "process before": float(process.before)}, "it ended with the block"


def test_resident_bytes_are_the_kernels() -> None:
    lines = Path("/proc/self/status").read_text().splitlines()
    status = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS"))
    assert hardware.resident_bytes() == pytest.approx(status, abs=4 * MB)


class Allocator:
    """The counters of torch.cuda that are used, with its rule: 512 bytes a block, 2 MiB a segment, nothing beyond the fraction."""

    OutOfMemoryError = torch.OutOfMemoryError

    def __init__(self, total: int) -> None:
        self.total, self.limit, self.live, self.held, self.most, self.most_held = total, total, 0, 0, 0, 0
        self.emptied = 0

    def get_device_properties(self, device: torch.device) -> SimpleNamespace:
        return SimpleNamespace(total_memory=self.total)

    def set_per_process_memory_fraction(self, fraction: float, device: torch.device) -> None:
        assert 0 <= fraction <= 1
        self.limit = int(fraction * self.total)

    def reset_peak_memory_stats(self, device: torch.device) -> None:
        self.most, self.most_held = self.live, self.held

    def empty_cache(self) -> None:
        self.emptied += 1

    def max_memory_allocated(self, device: torch.device) -> int:
        return self.most

    def max_memory_reserved(self, device: torch.device) -> int:
        return self.most_held

    def take(self, count: int) -> Callable[[], None]:
        count = -(-count // 512) * 512
        segment = -(-count // (2 * MB)) * 2 * MB
        if self.held + segment > self.limit:
            raise self.OutOfMemoryError("CUDA out of memory")
        self.live, self.held = self.live + count, self.held + segment
        self.most, self.most_held = max(self.most, self.live), max(self.most_held, self.held)

        def free() -> None:
            self.live -= count

        return free


def test_cuda_counts_from_its_beginning() -> None:
    allocator = Allocator(100 * MB)
    allocator.take(30 * MB)()
    with Cuda(torch.device("cuda"), cuda=allocator) as counted:
        assert counted.peak == 0, "what came and went before"
        free = allocator.take(5 * MB + 1)
        allocator.take(MB)
        free()
        assert counted.figures() == {"cuda allocated": 6 * MB + 512, "cuda reserved": 38 * MB}
    assert allocator.limit == 100 * MB and not allocator.emptied, "without a budget nothing is limited"


def test_cudas_allocator_keeps_a_budget_and_is_let_free_again() -> None:
    allocator = Allocator(100 * MB)
    with pytest.raises(DoesNotFit, match="refused an allocation") as refused, Cuda(torch.device("cuda"), 40 * MB, allocator):
        assert allocator.limit == int(40 * MB * (1 + SLACK)) and allocator.emptied
        allocator.take(44 * MB)
        allocator.take(4 * MB)
    assert "44 MiB" in refused.value.why and "40 MiB and 15%" in refused.value.why
    assert allocator.limit == 100 * MB
    with Cuda(torch.device("cuda"), 1000 * MB, allocator):
        assert allocator.limit == 100 * MB, "a budget above the device is the device"
    with pytest.raises(ValueError, match="another"), Cuda(torch.device("cuda"), 40 * MB, allocator):
        raise ValueError("another fault stays what it is")


@pytest.mark.parametrize(("budget", "limit", "lowered"), [({"device": 5, "host": 6}, 1 << 30, [11]), ({"device": 5}, None, []), ({}, 1 << 30, [])])
def test_freed_blocks_go_back_under_a_budget_and_a_limit(budget: dict, limit: int | None, lowered: list, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, said = [], []
    monkeypatch.setattr("lilliput.memory.outside.data_limit", lambda: limit)
    monkeypatch.setattr("lilliput.memory.outside.few_holes", lambda count: seen.append(count))
    assert isinstance(outside(torch.device("cpu"), budget, said.append), Resident)
    assert seen == lowered and [("RLIMIT_DATA" in line) for line in said] == [True] * len(lowered)
