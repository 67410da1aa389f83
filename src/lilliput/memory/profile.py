"""Profile: seconds for the operations of a trace, estimated from the machine's rates or measured on it, and links to its tiers.

Estimated: the larger of flops over the peak rate and bytes over the bandwidth, plus the cost of a call. Measured: the real step
is watched once and an operation's seconds are those until the next one begins, so Python and autograd are in; operations of the same
kind and bytes share their median, so recomputed ones and twins of a block are known after one look.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from time import perf_counter
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lilliput.base.hardware import Hardware
from lilliput.memory.simulate import Link, Rates
from lilliput.memory.trace import Trace

MOVES = "detach"  # of a saved output: autograd calls it when it saves, or with hooks when it gives back
CALL = 6e-6  # seconds of an operation that does nothing, with autograd's part


def estimate(trace: Trace, hardware: Hardware, dtype: str = "fp32") -> Trace:
    """The trace with seconds from the first device's peak rates."""
    flops, bandwidth = hardware.device.peak(dtype) or 1e12, hardware.device.bandwidth or 1e10
    for op in trace.ops:
        op.seconds = max(op.flops / flops, op.traffic / bandwidth) + (0.0 if op.view else CALL)
    return trace


def links(hardware: Hardware) -> Rates:
    """Links to the host and the disk as the hardware states them; the host of a CPU is a copy in its own memory."""
    copy = hardware.links.pcie or hardware.host.bandwidth / 2 or float("inf")
    found = {"host": Link(copy, copy)}
    if hardware.links.nvme_write and hardware.links.nvme_read:
        found["disk"] = Link(hardware.links.nvme_write, hardware.links.nvme_read)
    return Rates(found)


class _Clock(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.ends: list[tuple[str, float]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ != MOVES:
            self.ends.append((func.overloadpacket.__name__, perf_counter()))
        return result


def measure(trace: Trace, run: Callable[[], torch.Tensor], before: Callable[[], object] = lambda: None, repeats: int = 3) -> Trace:
    """The trace with measured seconds. before(): puts gradients as they were traced; run(): the loss of a plain forward pass.

    Needs the memory of the plain run: measure a smaller batch where that is too much, or estimate.
    """
    kind = lambda op: (op.name, tuple(trace.storages[s].bytes for s in (*op.reads, *op.news)))
    kinds: dict[Any, list[float]] = {}
    ops = [op for op in trace.ops if op.name != MOVES]
    for _ in range(repeats):
        before()
        begin, clock = perf_counter(), _Clock()
        with clock:
            run().backward()
        assert [name for name, _ in clock.ends] == [op.name for op in ops], "the run is not the one that was traced"
        for op, (_, end) in zip(ops, clock.ends, strict=True):
            kinds.setdefault(kind(op), []).append(end - begin)
            begin = end
    medians = {key: statistics.median(times) for key, times in kinds.items()}
    for op in ops:
        op.seconds = medians[kind(op)]
    return trace
