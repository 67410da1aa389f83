"""Micro-batches that fit, and fixes for jobs that do not."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
from boxes import machine
from hypothesis import given, settings
from hypothesis import strategies as st

from lilliput.base import registry
from lilliput.base.job import Job
from lilliput.models.facts import facts
from lilliput.models.sizes import PRESETS
from lilliput.plan.estimate import estimate_training
from lilliput.plan.ledgers import budget
from lilliput.plan.search import Trial, fixes, largest_micro_batch

GPT2, TINY = facts(PRESETS["gpt2"]), facts(PRESETS["tiny"])


def trial(gib: float, tokens_per_step: int = 8192, tokens: int = 512, sequences: int = 1) -> Trial:
    return Trial(GPT2, machine(gib), tokens_per_step, sequences, tokens, "fp32", {})


@settings(deadline=None, max_examples=60)
@given(gib=st.floats(1.0, 40.0), whole=st.integers(1, 40), tokens=st.sampled_from([64, 128, 512]))
def test_auto_is_the_largest_power_of_two_that_divides_and_fits(gib: float, whole: int, tokens: int) -> None:
    chosen, reason = largest_micro_batch(trial(gib, whole * tokens, tokens))
    n, room = chosen.sequences, budget(machine(gib).device)
    assert n & (n - 1) == 0 and whole % n == 0
    fits = lambda k: replace(chosen, sequences=k).fix().peak <= room
    assert fits(n) or (n == 1 and reason.startswith("no micro-batch fits"))
    larger = [k for k in (1, 2, 4, 8, 16, 32) if k > n and whole % k == 0]
    assert not any(fits(k) for k in larger)


def test_auto_of_a_step_that_is_no_whole_number_of_sequences_is_one() -> None:
    assert largest_micro_batch(trial(64, 1000, 512))[0].sequences == 1


def test_the_nearest_fix_leaves_the_numbers_alone() -> None:
    found = fixes(trial(10, sequences=16))
    assert found[0].words.startswith("train.micro_batch=") and found[0].fits
    chosen = int(found[0].words.removeprefix("train.micro_batch="))
    assert replace(trial(10), sequences=chosen).fix().fits and not replace(trial(10), sequences=2 * chosen).fix().fits, "the largest that fits"
    assert all(a.fits >= b.fits for a, b in itertools.pairwise(found)), "fitting ones first"


def test_every_fix_can_be_pasted_and_does_what_it_says() -> None:
    words = ["model=gpt2", "train.tokens_per_step=8192", "train.micro_batch=8"]
    hardware = machine(4.5)
    estimate = estimate_training(Job.load(None, words), GPT2, hardware)
    assert not estimate.fits and len(estimate.fixes) >= 3
    for fix in estimate.fixes:
        again = estimate_training(Job.load(None, [*words, *fix.words.split()]), GPT2, hardware)
        assert again.peak == fix.peak and again.fits == fix.fits


def test_fixes_combine_where_one_is_not_enough() -> None:
    start = trial(2.0, sequences=4)
    found = fixes(start)
    assert found[0].fits and len(found[0].words.split()) >= 2
    assert not any(fix.fits for fix in found[1:])
    assert {word.split("=")[0] for word in found[0].words.split()} <= {"train.micro_batch", "data.sequence", "dtype", *registry.names("train")}


def test_nothing_helps_a_model_that_is_too_large() -> None:
    found = fixes(Trial(facts(PRESETS["gpt3-175b"]), machine(16), 2048, 1, 2048, "fp32", {}))
    assert found and not any(fix.fits for fix in found)
    assert found[0].peak == min(fix.peak for fix in found)


def test_rooms_that_are_on_or_refuse_are_not_offered() -> None:
    name = registry.names("train")[-1]
    on = replace(trial(3, sequences=1), rooms={name: registry.find("train", name)()})
    assert not any(f"{name}=on" in fix.words for fix in fixes(on))
    partial = replace(trial(3, sequences=1), facts=replace(GPT2, linears=()))
    offered = {word for fix in fixes(partial) for word in fix.words.split()}
    refused = [n for n in registry.names("train") if registry.find("train", n)().refuses({}, partial.facts)]
    assert refused and not any(f"{n}=on" in offered for n in refused)


@pytest.mark.parametrize("preset", ["tiny", "llama-1b"])
def test_a_job_that_fits_needs_no_fix(preset: str) -> None:
    estimate = estimate_training(Job.load(None, ["train.tokens_per_step=512"]), facts(PRESETS[preset]), machine(640))
    assert estimate.fits and estimate.fixes == ()
