"""What is chosen under memory.device and memory.host: the fewest sections that fit, with a reason for every other set."""

from __future__ import annotations

from dataclasses import replace

import pytest
from boxes import machine

from lilliput.base.hardware import Hardware
from lilliput.base.job import Job
from lilliput.models.facts import facts
from lilliput.models.sizes import PRESETS
from lilliput.plan import report
from lilliput.plan.estimate import Estimate, estimate_training

KNOWN = facts(replace(PRESETS["llama-3m"], layers=24))
GPU = replace(machine(16, "cuda"), host=machine(64).device)


def estimate(*words: str, hardware: Hardware = GPU) -> Estimate:
    fixed = ["model=llama-3m", "data.sequence=256", "train.micro_batch=4", "train.tokens_per_step=1024"]
    return estimate_training(Job.load(None, [*fixed, *words]), KNOWN, hardware)


def needs(*words: str) -> int:
    return estimate(*words).ledger.peak()[0]


def test_nothing_is_chosen_where_no_bytes_are_given() -> None:
    found = estimate()
    assert found.choice is None and found.rooms == {} and report.chosen(found) == [] and "chosen" not in report.to_dict(found)


def test_each_budget_gets_the_least_that_fits() -> None:
    plain, offload, remat = needs(), needs("offload=on"), needs("remat.every=1")
    both = needs("offload=on", "remat.every=1")
    assert both < min(offload, remat) and max(offload, remat) < plain
    for bytes_given, expected in ((plain, set()), (both, {"offload", "remat"})):
        found = estimate(f"memory.device={bytes_given}B")
        assert found.fits and set(found.choice.added) == expected == set(found.rooms), found.choice.lines()
        assert found.peak <= bytes_given == found.budget
    middle = estimate(f"memory.device={max(offload, remat)}B")
    assert middle.fits and len(middle.choice.added) == 1
    small = estimate(f"memory.device={both // 2}B")
    assert not small.fits and "nothing fits" in small.choice.reason and f"{both // 2 / 2**20:.3g} MiB" in small.verdict()[1]


def test_every_other_set_has_its_reason() -> None:
    found = estimate(f"memory.device={needs('offload=on', 'remat.every=1')}B")
    names = [name for name, _ in found.choice.rejected]
    assert len(names) == len(set(names)) == 3 and any(n == "nothing more" for n in names), names
    assert all("on the device, which has" in why for _, why in found.choice.rejected)
    assert report.chosen(found)[0].startswith("chosen: ") and len(report.to_dict(found)["chosen"]) == 4
    wide = estimate("memory.device=16GB")
    assert all("fits, " in why for _, why in wide.choice.rejected)


def test_the_hosts_bytes_count_and_a_cpu_is_two_tiers_when_they_are_given() -> None:
    enough = needs("offload=on", "remat.every=1")
    found = estimate(f"memory.device={enough}B", "memory.host=20MB")
    assert not found.fits and any("on the host, which has" in why for _, why in found.choice.rejected)
    cpu = estimate(f"memory.device={enough}B", "memory.host=1GB", hardware=machine(16))
    assert cpu.fits and set(cpu.rooms) == {"offload", "remat"} and cpu.peak <= enough


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
