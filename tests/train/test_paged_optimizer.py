"""The paged optimizer: a spike that the plain one is refused, evicted bytes in that step only, and the same bits."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rigs import make_rig, random_batch

from lilliput.base.errors import DoesNotFit
from lilliput.base.hardware import declared
from lilliput.base.job import Job
from lilliput.base.show import Show
from lilliput.data.tokenizer import Tokenizer
from lilliput.loops.train import train
from lilliput.memory.meter import Meter, storage_bytes
from lilliput.models.facts import facts
from lilliput.models.sizes import PRESETS
from lilliput.parallel.rig import Rig
from lilliput.plan.estimate import estimate_training
from lilliput.train.fp8 import Fp8
from lilliput.train.paged import Paged
from lilliput.train.qlora import Qlora
from lilliput.train.remat import Remat

SPEC = PRESETS["tiny"]
SPIKE = 2  # the step whose batch is eight times as long


def batch(step: int, spike: int = SPIKE):
    return random_batch(SPEC.vocab, micros=1, tokens=256 if step == spike else 32, seed=step)


def held(rig: Rig) -> int:
    return storage_bytes([*rig.model.parameters(), *rig.optimizer.state().values()])


def peak(rig: Rig, step: int) -> int:
    """Metered device bytes of one step, everything counted."""
    with Meter() as meter:
        meter.adopt([*rig.model.parameters(), *rig.optimizer.state().values()])
        rig.step(batch(step), 1e-2, step)
    return meter.peak


def run(rig: Rig, steps: int = 5) -> list[float]:
    """Evicted bytes of each step."""
    return [rig.step(batch(step), 1e-2, step).told["evicted_bytes"] for step in range(steps)]


def same(a: Rig, b: Rig) -> bool:
    pairs = [*zip(a.model.parameters(), b.model.parameters(), strict=True), *zip(a.optimizer.state().values(), b.optimizer.state().values(), strict=True)]
    return all(torch.equal(x, y) for x, y in pairs)


@pytest.mark.parametrize("where", ["host", "disk"])
def test_a_spike_that_the_plain_optimizer_is_refused(where: str, tmp_path: Path) -> None:
    usual, spike = peak(make_rig({}), 0), peak(make_rig({}), SPIKE)
    moments = storage_bytes(make_rig({}).optimizer.state().values())
    budget = spike - moments // 3
    assert usual < budget < spike
    plain = make_rig({})
    with Meter(budget={"device": budget}) as meter, pytest.raises(DoesNotFit, match="is refused"):
        meter.adopt([*plain.model.parameters(), *plain.optimizer.state().values()])
        for step in range(5):
            plain.step(batch(step), 1e-2, step)
    assert plain.optimizer.steps == SPIKE, "refused at the spike and not before"
    rig, other = make_rig({"paged": Paged(budget=f"{budget}B", scratch=str(tmp_path) if where == "disk" else "")}), make_rig({})
    evicted = run(rig)
    for step in range(5):
        other.step(batch(step), 1e-2, step)
    pages = rig.update.__self__
    assert [bool(count) for count in evicted] == [step == SPIKE for step in range(5)]
    assert spike - budget <= evicted[SPIKE] < moments, "what is missing, not everything"
    assert pages.store.written == pages.store.read_back == evicted[SPIKE] and not pages.away
    assert pages.meter.peak <= budget
    assert same(rig, other)
    if where == "disk":
        assert (tmp_path / "moments").stat().st_size == pages.store.bytes >= moments


def test_what_does_not_fit_without_moments_is_refused() -> None:
    with pytest.raises(DoesNotFit, match="is refused"):
        make_rig({"paged": Paged(budget=f"{held(make_rig({})) - 1}B")})
    rig = make_rig({"paged": Paged(budget=f"{held(make_rig({})) + 10_000}B")})  # the tokens, not what is made of them
    with pytest.raises(DoesNotFit, match="is refused"):
        rig.step(batch(SPIKE), 1e-2, 0)
    assert len(rig.update.__self__.away) == len(rig.trainable()), "it gave everything before it gave up"


ALL = {"qlora": Qlora(rank=64), "remat": Remat(plan="sqrt"), "fp8": Fp8()}


@pytest.mark.parametrize("rooms", [{"qlora": Qlora(rank=64)}, {"remat": Remat()}, {"qlora": Qlora(rank=64), "remat": Remat()}, ALL], ids="+".join)
def test_beside_other_rooms(rooms: dict) -> None:
    """Under remat each tensor lives as planned, and eviction comes on top; adapters have moments too."""
    plain, spike = make_rig(rooms), peak(make_rig(rooms), SPIKE)
    budget = spike - storage_bytes(plain.optimizer.state().values()) // 2
    rig = make_rig({**rooms, "paged": Paged(budget=f"{budget}B")})
    evicted = run(rig)
    for step in range(5):
        plain.step(batch(step), 1e-2, step)
    assert evicted[SPIKE] > 0 and rig.update.__self__.meter.peak <= budget and same(rig, plain)


def test_a_run_tells_what_it_evicted(tmp_path: Path) -> None:
    """Through the whole loop, with checkpoints: each step's bytes in metrics.jsonl, and a run that goes on is the uninterrupted one."""
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 200)
    data, settings = {"path": str(tmp_path / "text.txt"), "tokenizer": "bytes", "sequence": 64}, {"init": "scratch", "tokens_per_step": 128, "micro_batch": 2}
    job = Job.load(model="tiny", data=data, train=settings)
    known = facts(replace(SPEC, vocab=Tokenizer.bytes_().vocab_size))
    budget = f"{estimate_training(job, known, declared('laptop')).peak - 4 * sum(math.prod(shape) for shape in known.shapes.values())}B"  # half of the moments

    def go(name: str, steps: int, **rooms) -> list[dict]:
        job = Job.load(model="tiny", data=data, train={**settings, "steps": steps, "save_every": 2, "eval_tokens": 64}, **rooms)
        train(job, tmp_path / name, Show(json=True))
        return [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]

    go("halves", 2, paged={"budget": budget})
    rows = [r for r in go("halves", 4, paged={"budget": budget}) if "loss" in r]
    plain = [r for r in go("plain", 4) if "loss" in r]
    assert [r["loss"] for r in rows] == [r["loss"] for r in plain]
    assert all(r["evicted_bytes"] > 0 for r in rows) and "evicted_bytes" not in plain[0]


def test_the_plan_moves_what_is_too_much() -> None:
    known = facts(PRESETS["llama-3m"])
    job = lambda *words: estimate_training(Job.load(None, ["data.sequence=256", "train.micro_batch=8", *words]), known, declared("laptop")).ledger
    plain = job()
    assert job("paged.budget=1GB").terms == plain.terms, "nothing moves where all fits"
    tight = job(f"paged.budget={plain.peak()[0] - 2_000_000}B")
    assert tight.bytes("optimizer") + tight.bytes("optimizer.pages back") == plain.bytes("optimizer")
    assert plain.peak()[0] - tight.peak()[0] == tight.peak("host")[0] == tight.bytes("optimizer.pages") > 1_900_000


def test_refusals() -> None:
    known = make_rig({}).facts
    assert "paged.budget" in Paged().refuses({}, known)
    assert "offload" in Paged(budget="1GB").refuses({"offload": None}, known)


def test_held_out_data_sends_moments_away_too() -> None:
    """Without gradients a long batch may still need their room; they are back after it, as a checkpoint wants them."""
    rooms = {"qlora": Qlora(rank=64)}
    plain, long = make_rig(rooms), batch(SPIKE)
    with Meter() as meter:
        meter.adopt([*plain.model.parameters(), *plain.optimizer.state().values()])
        plain.evaluate(long)
    budget = meter.peak - storage_bytes(plain.optimizer.state().values()) // 3
    rig = make_rig({**rooms, "paged": Paged(budget=f"{budget}B")})
    pages = rig.update.__self__
    for step in range(2):
        assert rig.step(batch(step), 1e-2, step) == replace(plain.step(batch(step), 1e-2, step), told={"evicted_bytes": 0.0})
        assert rig.evaluate(long).loss == plain.evaluate(long).loss
        assert pages.store.written > 0 and not pages.away and pages.pinned and pages.meter.peak <= budget
    assert same(rig, plain)
