"""A link copies in order, converts, counts, lets go, and hands exceptions on; a throttle divides its speed among threads."""

from __future__ import annotations

import gc
import threading
import weakref

import pytest
import torch

from lilliput.dist import link as links
from lilliput.dist.link import Link, Throttle, resting


class Clock:
    """Time that only sleeping moves on."""

    def __init__(self) -> None:
        self.now, self.lock = 100.0, threading.Lock()

    def perf_counter(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        with self.lock:
            self.now += seconds


def test_copies_in_order_and_counts() -> None:
    link, seen = Link(), []
    first, second = torch.arange(6.0), torch.zeros(6, dtype=torch.bfloat16)
    waits = threading.Event()
    futures = [link.begin(lambda: (waits.wait(), seen.append("held")), 0), link.copy(second, first), link.begin(lambda: seen.append("last"), 5)]
    assert second.sum() == 0 and seen == []
    waits.set()
    futures[-1].result()
    assert seen == ["held", "last"] and torch.equal(second, first.bfloat16())
    assert link.moved == 12 + 5, "bf16 is what crosses"
    link.close()


def test_lets_go_of_tensors_before_it_is_done() -> None:
    link, tensor = Link(), torch.ones(4)
    gone = weakref.ref(tensor)
    future = link.copy(torch.empty(4), tensor)
    del tensor
    future.result()
    gc.collect()
    assert gone() is None


def test_exceptions_come_with_the_future_and_the_next_copy_goes_on() -> None:
    link = Link()
    with pytest.raises(RuntimeError):
        link.copy(torch.empty(3), torch.empty(4)).result()
    target = torch.zeros(2)
    link.copy(target, torch.ones(2)).result()
    assert target.sum() == 2


def test_throttle_spends_the_time_of_its_bytes_once(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(links, "time", clock)
    throttle = Throttle(100.0)
    throttle.run(lambda: clock.sleep(0.25), 50)  # work takes half of its bytes' time
    assert clock.now == pytest.approx(100.5)
    throttle.run(lambda: clock.sleep(3.0), 50)  # work is slower than the link: nothing is added
    assert clock.now == pytest.approx(103.5)
    throttle.run(lambda: throttle.run(lambda: None, 100), 100)  # the second is asked for while the first is under way: it comes after it
    assert clock.now == pytest.approx(105.5)


def test_no_speed_is_no_throttle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(links, "time", None)
    done = []
    Throttle().run(lambda: done.append(1), 1 << 60)
    assert done == [1]


def test_resting_is_the_hosts() -> None:
    tensor = resting((2, 3), torch.bfloat16, "cpu")
    assert tensor.shape == (2, 3) and tensor.device.type == "cpu" and not tensor.is_pinned()
