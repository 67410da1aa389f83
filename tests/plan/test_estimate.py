"""Estimates of training and serving: what they decide and how fast they say the work can go."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
from boxes import HAND, machine

from lilliput.base import hardware
from lilliput.base.errors import DoesNotFit, UserError
from lilliput.base.hardware import Links
from lilliput.base.job import Job
from lilliput.base.ledger import Ledger, Term
from lilliput.models.facts import facts
from lilliput.models.sizes import PRESETS
from lilliput.plan import report
from lilliput.plan.estimate import estimate_serving, estimate_training, lanes


def test_the_answer_to_auto_has_a_reason() -> None:
    estimate = estimate_training(Job.load(None, ["data.sequence=256", "train.tokens_per_step=2048"]), facts(PRESETS["tiny"]), machine(8))
    assert estimate.site.sequences == 8 and estimate.micro_batches == 1 and estimate.fits
    value, reason = estimate.settled["train.micro_batch"]
    assert value == 8 and "2,048 tokens" in reason and "GiB" in reason
    given = estimate_training(Job.load(None, ["data.sequence=256", "train.tokens_per_step=2048", "train.micro_batch=2"]), facts(PRESETS["tiny"]), machine(8))
    assert given.site.sequences == 2 and given.micro_batches == 4 and given.settled == {}


def test_work_of_a_step_does_not_depend_on_how_it_is_cut() -> None:
    jobs = [Job.load(None, ["data.sequence=256", "train.tokens_per_step=2048", f"train.micro_batch={n}"]) for n in (1, 2, 8)]
    flops = [estimate_training(job, facts(PRESETS["tiny"]), machine(8)).step_flops for job in jobs]
    assert flops[0] == flops[1] == flops[2] == pytest.approx(3 * 8 * facts(PRESETS["tiny"]).flops(256, 256))


def test_recomputation_is_work_of_the_device_and_not_of_the_model() -> None:
    words = ["data.sequence=256", "train.tokens_per_step=256"]
    plain = estimate_training(Job.load(None, words), facts(PRESETS["tiny"]), machine(8))
    again = estimate_training(Job.load(None, [*words, "remat=on"]), facts(PRESETS["tiny"]), machine(8))
    assert again.step_flops == plain.step_flops
    assert again.seconds["compute"] > plain.seconds["compute"] * 1.2


def test_seconds_by_hand() -> None:
    estimate = estimate_training(Job.load(None, ["data.sequence=4", "train.tokens_per_step=8", "train.micro_batch=2"]), HAND, machine(8))
    flops, traffic = 3 * 100.0 * 8, 2 * 26 * 8 + 26 * 4 + 2 * 26 * 4
    assert estimate.seconds == {"compute": pytest.approx(flops / 1e12 + traffic / 1e11)}


def test_verdict_has_numbers_and_a_fix_to_paste() -> None:
    estimate = estimate_training(
        Job.load(None, ["data.sequence=1024", "train.tokens_per_step=8192", "train.micro_batch=8"]), facts(PRESETS["gpt2"]), machine(10)
    )
    assert not estimate.fits
    what, why, fix = estimate.verdict()
    assert "does not fit" in what and "GiB" in why and "box" in why and "biggest: " in why and fix.startswith("train.micro_batch=")
    assert DoesNotFit(*estimate.verdict()).exit_code == 3


def test_verdict_when_nothing_helps() -> None:
    estimate = estimate_training(Job.load(None, ["data.sequence=2048", "train.tokens_per_step=2048"]), facts(PRESETS["gpt3-175b"]), machine(16))
    assert estimate.site.sequences == 1 and "no micro-batch fits" in estimate.reason
    fix = estimate.verdict()[2]
    assert "a smaller model" in fix and "comes nearest" in fix


def test_the_device_is_the_jobs() -> None:
    a100 = hardware.declared("a100-dgx")
    job = lambda device: Job.load(None, ["data.sequence=256", "train.tokens_per_step=2048", f"device={device}", "dtype=bf16"])
    assert estimate_training(job("auto"), facts(PRESETS["tiny"]), a100).device.kind == "cuda"
    assert estimate_training(job("cpu"), facts(PRESETS["tiny"]), a100).device == a100.host
    with pytest.raises(UserError):
        estimate_training(job("cuda"), facts(PRESETS["tiny"]), machine(8))


def test_activations_on_gpus_are_in_the_stored_dtype() -> None:
    job = Job.load(None, ["data.sequence=256", "train.tokens_per_step=2048", "dtype=bf16"])
    here, there = (estimate_training(job, facts(PRESETS["llama-3m"]), machine(8, kind)).ledger for kind in ("cpu", "cuda"))
    assert there.bytes("activations.mlp") * 2 == here.bytes("activations.mlp")


def test_serving_room_is_what_fits() -> None:
    llama, gpu = facts(PRESETS["llama-7b"]), machine(24, "cuda")
    estimate = estimate_serving(llama, gpu, 4, 1024, 2)
    assert estimate.fits and estimate.moment == "forward"
    for n, good in ((estimate.max_sequences, True), (estimate.max_sequences + 1, False)):
        assert estimate_serving(llama, gpu, n, 1024, 2).fits is good
    many = estimate_serving(llama, gpu, 8, 1024, 2)
    assert 1024 < many.max_context < llama.context
    assert estimate_serving(llama, gpu, 8, many.max_context, 2).fits and not estimate_serving(llama, gpu, 8, many.max_context + 1, 2).fits
    assert estimate_serving(llama, gpu, 1, 1024, 2).max_context == llama.context, "never more than the model knows"
    none = estimate_serving(llama, machine(8, "cuda"), 1, 16, 2)
    assert not none.fits and none.max_context == none.max_sequences == 0


def test_serving_speed_is_bounded_by_reading_the_weights() -> None:
    llama, gpu = facts(PRESETS["llama-7b"]), machine(24, "cuda")
    one = estimate_serving(llama, gpu, 1, 16, 2).tokens_per_second
    assert one is not None and one == pytest.approx(1e11 / (2 * llama.parameters), rel=0.1)
    assert one * 6 < estimate_serving(llama, gpu, 8, 16, 2).tokens_per_second < one * 8


def test_plans_without_torch() -> None:
    code = """
import sys
from lilliput.base.job import Job
from lilliput.base.hardware import declared
from lilliput.models.facts import facts
from lilliput.models.sizes import PRESETS
from lilliput.plan import estimate, report
found = estimate.estimate_training(Job.load(None, ["data.sequence=2048", "lora=on"]), facts(PRESETS["llama-7b"]), declared("laptop"))
report.to_dict(found), report.rows(found), report.sentences(found)
assert "torch" not in sys.modules, "plan loaded torch"
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_what_lies_on_the_host_is_held_against_the_hosts_memory() -> None:
    """A GPU of 16 GiB and a host of 32: 2 of 16 bytes a parameter on the one, 14 on the other; a CPU has one memory for both."""
    from dataclasses import replace

    job = Job.load(None, ["model=smollm2-135m", "data.sequence=256", "train.tokens_per_step=256", "offload=on"])
    known = facts(replace(PRESETS["llama-3m"], layers=400))
    gpu, small = machine(16, "cuda"), machine(1)
    apart = estimate_training(job, known, replace(gpu, host=machine(32).device))
    count = known.parameters
    assert apart.ledger.peak("host")[0] == 14 * count + apart.ledger.bytes("staged copies") + apart.ledger.bytes("norms")
    assert apart.ledger.bytes("parameters") == 2 * count and apart.fits
    assert set(apart.seconds) == {"compute", "host"}, "the update is the host's work"
    crowded = estimate_training(job, known, replace(gpu, host=small.device))
    assert crowded.peak == apart.peak <= crowded.budget and not crowded.fits
    assert "the host needs" in crowded.verdict()[1]
    together = estimate_training(job, known, machine(16))
    assert together.peak >= 16 * count and "host" not in together.seconds


def test_a_fix_may_send_the_optimizer_to_the_host() -> None:
    from dataclasses import replace

    known = facts(replace(PRESETS["llama-3m"], layers=2000))
    job = Job.load(None, ["model=smollm2-135m", "data.sequence=64", "train.tokens_per_step=64"])
    gpu = estimate_training(job, known, replace(machine(8, "cuda"), host=machine(64).device))
    assert not gpu.fits and any(fix.words.startswith("offload=on") and fix.fits for fix in gpu.fixes)
    cpu = estimate_training(job, known, machine(8))
    assert not any(fix.words == "offload=on" for fix in cpu.fixes), "it frees nothing where there is one memory"


def test_seconds_of_links_and_disks() -> None:
    """A term's own speed goes before a faster lane, writes have their own rate, and a lane whose speed nobody knows is left out."""
    terms = {"a": Term(traffic=8e9, lane="link"), "b": Term(traffic=1e9, lane="link", speed=5e8), "c": Term(traffic=6e9, written=2e9, lane="disk")}
    box = replace(machine(16), links=Links(pcie=4e9, nvme_read=2e9, nvme_write=1e9))
    assert lanes(Ledger(terms), box, "fp32") == pytest.approx({"link": 2 + 2, "disk": 2 + 2})
    assert lanes(Ledger(terms), machine(16), "fp32") == {}, "what crosses at an unknown speed takes an unknown time"
    assert lanes(Ledger({"b": terms["b"]}), machine(16), "fp32") == {"link": 2.0}


def test_a_slow_link_is_in_the_predicted_step() -> None:
    known = facts(PRESETS["llama-3m"])
    words = ["model=llama-3m", "train.micro_batch=1", "data.sequence=64", "train.tokens_per_step=64", "offload=on"]
    slow, free = (estimate_training(Job.load(None, [*words, *more]), known, machine(16)) for more in (["offload.link=1MB"], []))
    assert slow.seconds["link"] == pytest.approx(4 * known.parameters / 1e6) and "link" not in free.seconds
    assert "link to the host at 977 KiB/s" in report.moves(slow)[0] and "of unknown speed" in report.moves(free)[0]
