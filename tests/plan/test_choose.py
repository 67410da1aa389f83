"""What is chosen under memory.device and memory.host: the fewest sections that fit, with a reason for every other set."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from boxes import machine

from lilliput.base import hardware
from lilliput.base.hardware import Hardware
from lilliput.base.job import Job
from lilliput.models.facts import facts
from lilliput.models.sizes import PRESETS
from lilliput.plan import report
from lilliput.plan.estimate import Estimate, estimate_training

KNOWN = facts(replace(PRESETS["llama-3m"], layers=24))
GPU = replace(machine(16, "cuda"), host=machine(64).device)


def estimate(*words: str, box: Hardware = GPU) -> Estimate:
    fixed = ["model=llama-3m", "data.sequence=256", "train.micro_batch=4", "train.tokens_per_step=1024"]
    return estimate_training(Job.load(None, [*fixed, *words]), KNOWN, box)


def needs(*words: str) -> int:
    return estimate(*words).ledger.peak()[0]


def test_nothing_is_chosen_where_no_bytes_are_given() -> None:
    found = estimate()
    assert found.choice is None and found.rooms == {} and report.chosen(found) == [] and "chosen" not in report.to_dict(found)


def test_each_budget_gets_the_least_that_fits() -> None:
    plain, offload, remat = needs(), needs("offload=on"), needs("remat.every=1")
    both = needs("offload=on", "remat.every=1")
    assert both < min(offload, remat) and max(offload, remat) < plain
    for bytes_given, sections in ((plain, 0), (max(offload, remat), 1), (both, 2)):
        found = estimate(f"memory.device={bytes_given}B")
        assert found.fits and len(found.choice.added) == sections and set(found.choice.added) == set(found.rooms), found.choice.lines()
        assert found.peak <= bytes_given == found.budget
    small = estimate(f"memory.device={both // 4}B")
    assert not small.fits and "nothing fits" in small.choice.reason and f"{both // 4 / 2**20:.3g} MiB" in small.verdict()[1]


def test_a_disk_takes_what_the_host_has_no_room_for(tmp_path: Path) -> None:
    device, folder = needs("offload=on", "remat.every=1"), tmp_path / "scratch"
    states = 16 * KNOWN.parameters
    words = lambda host, *more: estimate(f"memory.device={device}B", f"memory.host={host}B", *more)
    assert "disk" not in str(words(2 * states, f"memory.disk={folder}").rooms["infinity"].model_fields_set), "the host is quicker"
    for host in (states * 7 // 8, states // 2, states // 8):
        assert not words(host).fits, "without a disk"
        found = words(host, f"memory.disk={folder}")
        assert found.fits and found.rooms["infinity"].folder == str(folder) and not folder.exists(), found.choice.lines()
        assert found.ledger.peak("host")[0] <= host
    assert found.rooms["infinity"].parameters == found.rooms["infinity"].optimizer == "disk"
    assert any("on the host, which has" in why for _, why in found.choice.rejected) and "on the disk" in found.choice.reason


def test_a_disk_that_is_full_is_no_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = hardware.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(hardware.shutil, "disk_usage", lambda path: usage._replace(free=1 << 20))
    found = estimate(f"memory.device={needs('offload=on', 'remat.every=1')}B", "memory.host=1MB", f"memory.disk={tmp_path}")
    assert not found.fits and any("on the disk, which has 1 MiB" in why for _, why in found.choice.rejected)
    monkeypatch.setattr(hardware.shutil, "disk_usage", lambda path: usage._replace(free=0))
    (tmp_path / "parameters.bin").write_bytes(b"0" * (1 << 16))
    assert hardware.free_bytes(tmp_path) >= 1 << 16, "files of an earlier run are written over"


@pytest.mark.parametrize("words", [("memory.host=1GB",), ("memory.host=1GB", "memory.disk=scratch"), ("memory.host=1GB", "train.micro_batch=auto")])
def test_the_smallest_budget_is_said_and_is_the_smallest(words: tuple[str, ...]) -> None:
    found = estimate("memory.device=1MB", *words)
    assert not found.fits and "memory.device=" in found.verdict()[2] and "memory.host" not in found.choice.least
    least = int(found.choice.least.removeprefix("memory.device=").removesuffix("B"))
    assert estimate(f"memory.device={least}B", *words).fits
    assert not estimate(f"memory.device={least - 1}B", *words).fits


def test_a_host_that_is_too_small_is_said_too() -> None:
    found = estimate("offload=on", "memory.device=1MB", "memory.host=1MB")
    assert not found.fits and "memory.device=" in found.choice.least and "memory.host=" in found.choice.least
    assert estimate("offload=on", *found.choice.least.split()).fits


def test_every_other_set_has_its_reason() -> None:
    found = estimate(f"memory.device={needs('offload=on', 'remat.every=1')}B")
    names = [name for name, _ in found.choice.rejected]
    assert len(names) == len(set(names)) > 3 and any(n == "nothing more" for n in names), names
    reasons = ("on the device, which has", "fits, ", "it has the gradients and the moments already")
    assert all(any(reason in why for reason in reasons) for _, why in found.choice.rejected), found.choice.rejected
    assert report.chosen(found)[0].startswith("chosen: ") and len(report.to_dict(found)["chosen"]) == len(names) + 1
    wide = estimate("memory.device=16GB")
    assert all("fits, " in why or "already" in why for _, why in wide.choice.rejected)


def test_the_hosts_bytes_count_and_a_cpu_is_two_tiers_when_they_are_given() -> None:
    enough = needs("offload=on", "remat.every=1")
    found = estimate(f"memory.device={enough}B", "memory.host=20MB")
    assert not found.fits and any("on the host, which has" in why for _, why in found.choice.rejected)
    cpu = estimate(f"memory.device={enough}B", "memory.host=1GB", box=machine(16))
    assert cpu.fits and len(cpu.rooms) == 2 and cpu.peak <= enough


def test_the_jobs_own_sections_stay() -> None:
    found = estimate("remat.every=2", "memory.device=16GB")
    assert found.rooms["remat"].every == 2 and found.choice.added == {}
    adapter = estimate("lora.rank=4", f"memory.device={needs('lora.rank=4') // 2}B")
    assert "lora" in adapter.rooms and any("only an adapter learns" in why for _, why in adapter.choice.rejected)


def test_an_auto_micro_batch_is_chosen_with_it() -> None:
    found = estimate("train.micro_batch=auto", f"memory.device={needs('offload=on', 'remat.every=1')}B")
    assert found.fits and found.site.sequences in (1, 2, 4) and found.reason


@pytest.mark.parametrize("words", [("memory.host=1GB",), ()])
def test_a_host_alone_chooses_nothing(words: tuple[str, ...]) -> None:
    assert estimate(*words).choice is None
