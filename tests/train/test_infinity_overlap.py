"""ZeRO-Infinity beside a disk that is as slow as the device: reads, computing and writes go on at once. The device's work is played by sleeping,
proportional to the numbers that it is done on, and the disk's speed by the engine's throttle, so that what is measured depends little on the machine."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
from rigs import make_rig, random_batch

from lilliput.models.spec import DecoderSpec
from lilliput.parallel import streamed
from lilliput.train.infinity import Infinity

SPEC = DecoderSpec("llama", vocab=64, dim=64, layers=8, heads=2, kv_heads=2, head_dim=32, ffn=128, context=64, tied=True)
SPEED = 12e6  # bytes/s of the disk that is played
FORWARD, BACKWARD, UPDATE = 1, 2, 7  # as the bytes of each: 4 are read; 4 read and 4 written; 16 read and 12 written


class Device:
    """Sleeps `each` seconds a number of a module in its forward pass, and so many times that in its backward pass and in the update."""

    def __init__(self, model: torch.nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
        self.each, self.numbers = 0.0, 0
        for module in model.modules():
            count = sum(p.numel() for p in module.parameters(recurse=False))
            if count:
                module.register_forward_pre_hook(lambda _, given, count=count: self.work(FORWARD * count))
                module.register_forward_hook(lambda _, given, result, count=count: result.register_hook(lambda g: self.work(BACKWARD * count)) and None)
        update = streamed.update
        monkeypatch.setattr(streamed, "update", lambda weight, *more: (self.work(UPDATE * weight.numel()), update(weight, *more)))

    def work(self, count: int) -> None:
        self.numbers += count
        time.sleep(self.each * count)


def test_a_step_takes_as_long_as_the_slower_of_disk_and_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rig = make_rig({"infinity": Infinity(parameters="disk", optimizer="disk", folder=str(tmp_path))}, SPEC)
    engine, device, number = rig.optimizer.tiers["first"].arena.engine, Device(rig.model, monkeypatch), 0

    def seconds(speed: float, each: float) -> float:
        nonlocal number
        engine.throttle.speed, device.each, device.numbers = speed, each, 0
        batch, begin = random_batch(SPEC.vocab, seed=number, micros=1), time.perf_counter()
        rig.step(batch, 1e-2, number)
        number += 1
        return time.perf_counter() - begin

    own = [seconds(0.0, 0.0) for _ in range(2)][1]  # the order is known now
    disk = seconds(SPEED, 0.0)
    each = (disk - own) / device.numbers
    alone, both = seconds(0.0, each), min(seconds(SPEED, each) for _ in range(2))
    assert both <= 0.75 * (disk + alone)
    assert both <= 1.25 * max(disk, alone) + own
