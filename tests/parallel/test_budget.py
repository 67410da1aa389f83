"""A budget of the device: predicted, refused before anything is loaded, and counted in every step, to the byte, whatever the sections."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from rigs import make_rig, random_batch

from lilliput.base.errors import DoesNotFit
from lilliput.base.job import Job
from lilliput.base.show import Show, size
from lilliput.loops.train import train
from lilliput.memory.plan import MemoryPlan
from lilliput.models.sizes import PRESETS
from lilliput.parallel.budget import _update
from lilliput.train.chunked import Chunked
from lilliput.train.fp8 import Fp8
from lilliput.train.infinity import Infinity
from lilliput.train.lora import Lora
from lilliput.train.offload import Offload
from lilliput.train.paged import Paged
from lilliput.train.poet import Poet
from lilliput.train.qlora import Qlora
from lilliput.train.remat import Remat

VOCAB = PRESETS["tiny"].vocab
MUCH = {"device": 1 << 40}
CASES = {
    "plain": {}, "lora": {"lora": Lora(rank=4)}, "qlora": {"qlora": Qlora(rank=4)}, "offload": {"offload": Offload()},
    "delayed": {"offload": Offload(delay=2)}, "remat": {"remat": Remat()}, "fp8": {"fp8": Fp8()},
    "sqrt offload": {"remat": Remat(plan="sqrt"), "offload": Offload()},
    "qlora remat fp8": {"qlora": Qlora(rank=4), "remat": Remat(), "fp8": Fp8()}, "infinity": {"infinity": Infinity()},
    "infinity lora": {"infinity": Infinity(), "lora": Lora(rank=4)}, "tiles": {"infinity": Infinity(tiles=4)},
    "chunked": {"chunked": Chunked(tokens=24)}, "chunked lora": {"chunked": Chunked(tokens=24), "lora": Lora(rank=4)},
    "chunked offload": {"chunked": Chunked(tokens=24), "offload": Offload()}, "infinity chunked": {"infinity": Infinity(), "chunked": Chunked(tokens=24)},
    "chunked qlora sqrt": {"chunked": Chunked(tokens=24), "qlora": Qlora(rank=4), "remat": Remat(plan="sqrt")},
}  # fmt: skip


def peak(rig, micros: int, steps: int = 3) -> int:
    for step in range(steps):
        rig.step(random_batch(VOCAB, micros=micros, seed=step), 1e-3, step)
    rig.evaluate(random_batch(VOCAB, micros=1))
    return rig.meter.peak


@pytest.mark.parametrize("micros", [1, 2])
@pytest.mark.parametrize("case", CASES)
def test_predicted_is_measured(case: str, micros: int) -> None:
    """0 bytes off. Where whole matrices visit, 12,288 bytes of their room of this model are never filled."""
    rig = make_rig(CASES[case], micro_batches=micros, budget=MUCH)
    assert peak(rig, micros) == rig.plan.predicted["bytes"] - 12288 * case.startswith("infinity")
    rig.close(rig)


@pytest.mark.parametrize("case", ["plain", "qlora", "offload", "remat", "infinity"])
def test_the_smallest_budget_runs_and_a_byte_less_is_refused_before_loading(case: str) -> None:
    least = int(make_rig(CASES[case], budget=MUCH).plan.predicted["bytes"])
    assert peak(make_rig(CASES[case], budget={"device": least}), 1) <= least
    with pytest.raises(DoesNotFit, match="a step does not fit in") as refused:
        make_rig(CASES[case], budget={"device": least - 1})
    assert refused.value.needs == least and f"memory.device={least}B" in refused.value.fix


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_updates_own_peak(dtype: str) -> None:
    """All gradients and the numbers that clipping takes: what a budget must hold where the passes take less."""
    rig, peaks = make_rig({}, dtype=dtype, budget=MUCH), []

    def marked(own, rate: float) -> float:
        own.meter.mark()
        norm = rig.update(own, rate)
        peaks.append(own.meter.peak)
        return norm

    replace(rig, update=marked).step(random_batch(VOCAB, micros=1), 1e-3, 0)
    assert peaks == [_update(rig)]


def test_what_was_not_planned_for_is_refused_by_the_meter() -> None:
    rig = make_rig({}, budget={"device": int(make_rig({}, budget=MUCH).plan.predicted["bytes"])})
    peak(rig, 1)
    with pytest.raises(DoesNotFit, match="an allocation of"):
        rig.step(random_batch(VOCAB, micros=1, sequences=4), 1e-3, 3)
    with pytest.raises(DoesNotFit, match="host tier"):
        make_rig({"offload": Offload()}, budget={**MUCH, "host": 1 << 20})


def test_pages_on_the_host_are_no_bytes_of_the_device() -> None:
    """POET's pages beside a paged optimizer: one meter tells the tiers apart, and what moments must leave is what is missing."""
    spec, shape = replace(PRESETS["llama-3m"], layers=4), {"sequences": 4, "tokens": 128}
    plain = make_rig({}, spec, budget=MUCH, **shape)
    tight = round(plain.standing() + 0.85 * (plain.plan.predicted["bytes"] - plain.standing()))
    rooms = {"poet": Poet(budget=f"{tight}B", stages=6)}
    rig = make_rig(rooms, spec, budget=MUCH, **shape)
    assert rig.plan.predicted["host peak"] > 0
    limit = int(rig.plan.predicted["bytes"]) - 50_000
    rig = make_rig({**rooms, "paged": Paged(budget=f"{limit}B")}, spec, budget={"device": limit}, **shape)
    told = [rig.step(random_batch(65, micros=1, sequences=4, tokens=128, seed=s), 1e-3, s).told["evicted_bytes"] for s in range(2)]
    assert rig.meter.peak <= limit and rig.meter.tiers["host"][1] >= rig.plan.predicted["host peak"]
    largest = 8 * max(p.numel() for p in rig.model.parameters())
    assert all(50_000 <= evicted < 50_000 + largest for evicted in told), told


def test_a_run_writes_what_it_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 200)
    data = {"path": str(tmp_path / "text.txt"), "tokenizer": "bytes", "sequence": 64}
    settings = {"init": "scratch", "tokens_per_step": 128, "micro_batch": 2, "eval_tokens": 64}
    for steps in (1, 2):  # the second goes on
        job = Job.load(model="tiny", data=data, train={**settings, "steps": steps}, memory={"device": "100MB", "host": "1GB"})
        train(job, tmp_path / "run", Show(json=True))
        plan = MemoryPlan.from_json((tmp_path / "run" / "memory.json").read_text())
        assert plan.budget == {"device": 100_000_000, "host": 1_000_000_000} and plan.rates["host read"] > 1e8
        assert plan.measured["device"] == plan.predicted["bytes"] and plan.planner == "keep everything" and plan.predicted["seconds"] > 0
        process, before = plan.measured["process"], plan.measured["process before"]
        assert 50e6 < before <= process < before + 1e9, "resident bytes of the whole process beside the tensors"
        said = capsys.readouterr().err
        assert f"most bytes: device {size(int(plan.measured['device']))}, process {size(int(plan.measured['process']))}" in said
