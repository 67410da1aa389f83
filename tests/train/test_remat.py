"""Checkpointing's published shape, counted: one extra forward, saved bytes that grow with the square root of the depth."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rigs import make_rig, random_batch

from lilliput.base.errors import DoesNotFit, UserError
from lilliput.memory.meter import Meter, storage_bytes
from lilliput.models.sizes import PRESETS
from lilliput.parallel.rig import Rig
from lilliput.plan.ledgers import training_ledger
from lilliput.train.remat import Remat

SPEC = replace(PRESETS["tiny"], vocab=64, dim=16, heads=2, kv_heads=2, head_dim=8, ffn=32)


def metered(layers: int, every: object) -> tuple[int, Meter]:
    rooms = {"remat": Remat(every=every)} if every else {}
    rig = make_rig(rooms, replace(SPEC, layers=layers), sequences=4, tokens=64)
    batch = random_batch(64, micros=1, sequences=4, tokens=64)[0]
    with Meter(known=[*rig.model.parameters(), batch.tokens_BT, batch.targets_BT]) as meter:
        loss, _ = rig.objective(rig.model, batch)
        kept = meter.live
        loss.backward()
    return kept, meter


def test_one_extra_forward_of_the_blocks_and_nothing_else() -> None:
    products = {}
    for every in (None, 1, 3, "sqrt"):
        _, meter = metered(9, every)
        products[every] = meter.calls["mm"]
    forward = 9 * 7  # seven Linear products a block
    for every in (1, 3, "sqrt"):
        assert products[every] - products[None] <= forward
        assert products[every] - products[None] >= forward - 9, "early stop may leave out the last product of a segment"


def test_peak_grows_with_the_square_root_of_the_depth() -> None:
    depths = (4, 16, 36, 64)
    peaks = {n: metered(n, "sqrt")[1].peak for n in depths}
    none = {n: metered(n, None)[1].peak for n in depths}
    slope = lambda p: math.log(p[64] / p[16]) / math.log(4)
    assert slope(none) > 0.9, f"without it memory is linear in depth: {none}"
    assert slope(peaks) < 0.62, f"with it memory grows like sqrt(depth): {peaks}"
    assert peaks[64] < none[64] / 3.5
    assert metered(64, 1)[1].peak < peaks[64], "a decoder block keeps far more than its input, so segments of one are smallest"


@pytest.mark.parametrize("knobs", [{"every": 1}, {"every": 2}, {"every": "sqrt"}, {"plan": "sqrt"}, {"plan": "selective"}, {"budget": "9MB"}], ids=str)
def test_gradients_are_bitwise_those_of_the_plain_run_with_dropout(knobs: dict) -> None:
    gradients = []
    for rooms in ({}, {"remat": Remat(**knobs)}):
        rig = make_rig(rooms, PRESETS["tiny"], dropout=0.2)
        rig.model.train()
        for index, micro in enumerate(random_batch(1024)):
            rig.counter.micro = index
            rig.objective(rig.model, micro)[0].backward()
        gradients.append({n: p.grad.clone() for n, p in rig.model.named_parameters()})
    assert all(torch.equal(gradients[0][n], gradients[1][n]) for n in gradients[0])


@pytest.mark.parametrize("micros", [1, 2])
@pytest.mark.parametrize("every", [1, 2, 3, 12])
def test_the_predicted_peak_of_a_deep_model(every: int, micros: int) -> None:
    """Gradients come while inputs go: with one micro-batch the two never add up, with two they do."""
    rooms = {"remat": Remat(every=every)}
    rig = make_rig(rooms, replace(PRESETS["llama-3m"], layers=12, dim=128, head_dim=32, ffn=320), sequences=4, tokens=128)
    batch = random_batch(65, micros=micros, sequences=4, tokens=128)
    ledger = training_ledger(rig.facts, rig.site, rooms, "fp32", micros)
    known = [*rig.model.parameters(), *(t for m in batch for t in (m.tokens_BT, m.targets_BT))]
    with Meter(known=known) as meter:
        rig.schedule(rig, batch, sum(m.weight for m in batch))
    predicted = ledger.peak()[0] - ledger.bytes("parameters") - ledger.bytes("optimizer")
    assert predicted == pytest.approx(meter.peak, rel=0.05)


KINDS = [{"every": 1}, {"plan": "sqrt"}, {"plan": "selective"}, {"budget": "110MB"}]


@pytest.mark.parametrize("micros", [1, 2])
@pytest.mark.parametrize("knobs", KINDS, ids=str)
def test_the_planned_peak_is_the_measured_one_to_the_byte(knobs: dict, micros: int) -> None:
    rig = make_rig({"remat": Remat(**knobs)}, replace(PRESETS["llama-3m"], layers=6), sequences=4, tokens=128, micro_batches=micros)
    first, *more = random_batch(65, micros=micros, sequences=4, tokens=128)
    tensors = [t for m in (first, *more) for t in (m.tokens_BT, m.targets_BT)]
    peaks = []
    for micro in (first, *more):
        grads = [p.grad for p in rig.model.parameters() if p.grad is not None]
        with Meter(known=[*rig.model.parameters(), *grads, *tensors]) as meter:
            loss, _ = rig.objective(rig.model, micro)
            (loss / micro.weight).backward()
        peaks.append(meter.peak)
        del loss
    assert peaks == [ready.simulation.peak["device"] for ready in rig.objective.ready.values()]
    assert sorted(peaks) == sorted(plan.predicted["device peak"] for plan in rig.plans.values())


def test_selective_by_closed_forms() -> None:
    rooms = {"remat": Remat(plan="selective")}
    for spec in (replace(PRESETS["llama-3m"], layers=12, dim=128, head_dim=32, ffn=320), PRESETS["gpt-nano"]):
        spec = replace(spec, layers=6, vocab=65)
        rig = make_rig(rooms, spec, sequences=8, tokens=64)
        batch = random_batch(65, micros=1, sequences=8, tokens=64)
        ledger = training_ledger(rig.facts, rig.site, rooms, "fp32", 1)
        with Meter(known=[*rig.model.parameters(), batch[0].tokens_BT, batch[0].targets_BT]) as meter:
            rig.schedule(rig, batch, batch[0].weight)
        predicted = ledger.peak()[0] - ledger.bytes("parameters") - ledger.bytes("optimizer")
        assert predicted == pytest.approx(meter.peak, rel=0.10)


def test_a_budget_holds_is_used_and_is_refused_before_training() -> None:
    spec = replace(PRESETS["llama-3m"], layers=6)
    shape = {"sequences": 4, "tokens": 128}
    plain = make_rig({}, spec, **shape)
    state = storage_bytes([*plain.model.parameters(), *plain.optimizer.state().values()])
    batch = random_batch(65, micros=1, **shape)

    def peak(rig: Rig) -> int:
        with Meter(known=[*rig.model.parameters(), batch[0].tokens_BT, batch[0].targets_BT]) as meter:
            rig.schedule(rig, batch, batch[0].weight)
        for p in rig.model.parameters():
            p.grad = None
        return meter.peak

    whole = state + peak(plain)
    with pytest.raises(DoesNotFit, match="no memory plan fits in 1MB") as refused:
        make_rig({"remat": Remat(budget="1MB")}, spec, **shape)
    least = int(refused.value.fix.split("=")[1].split("B")[0])
    assert least == refused.value.needs and "weights, optimizer take" in refused.value.why
    for budget in (least, (least + whole) // 2, whole + 64):  # 64: the schedule's own scalars
        used = state + peak(make_rig({"remat": Remat(budget=str(budget))}, spec, **shape))
        assert used <= budget + 64
        assert used > 0.9 * budget
    with pytest.raises(DoesNotFit):
        make_rig({"remat": Remat(budget=str(least - 1))}, spec, **shape)


def test_a_smaller_batch_runs_under_the_plan_and_a_larger_one_gets_its_own() -> None:
    rig, plain = (make_rig(rooms, sequences=2, tokens=32) for rooms in ({"remat": Remat(every=1)}, {}))
    for sequences, tokens, plans in ((2, 32, 1), (1, 20, 1), (3, 40, 2)):
        micro = random_batch(1024, micros=1, sequences=sequences, tokens=tokens)[0]
        for r in (rig, plain):
            r.objective(r.model, micro)[0].backward()
        assert len(rig.objective.ready) == plans
        assert all(torch.equal(a.grad, b.grad) for a, b in zip(rig.model.parameters(), plain.model.parameters(), strict=True))
        for r in (rig, plain):
            r.model.zero_grad()


def test_refusals_say_why() -> None:
    assert "remat.budget" in Remat(plan="budget").refuses({}, make_rig({}).facts)
    with pytest.raises(UserError, match="no number of bytes"):
        make_rig({"remat": Remat(budget="much")})
    facts = make_rig({}).facts
    assert "9" in Remat(every=9).refuses({}, facts) and "4 blocks" in Remat(every=9).refuses({}, facts)
    assert Remat(every=4).refuses({}, facts) is None
    assert "chain" in Remat(every=1).refuses({}, replace(facts, layers=0))


CODED = [("bf16", 0.01), ("fp8", 0.1), ("nf4", 0.5)]


@pytest.mark.parametrize(("codec", "apart"), CODED)
def test_kept_in_fewer_bits(codec: str, apart: float) -> None:
    """The closed form's bytes, no product more than in the plain run, and gradients apart by what the format rounds."""
    spec = replace(PRESETS["llama-3m"], layers=6, dim=128, head_dim=32, ffn=320)
    batch, found = random_batch(65, micros=1, sequences=4, tokens=128), {}
    for name, rooms in {"plain": {}, "coded": {"remat": Remat(plan="coded", codec=codec)}}.items():
        rig = make_rig(rooms, spec, sequences=4, tokens=128)
        with Meter(known=[*rig.model.parameters(), batch[0].tokens_BT, batch[0].targets_BT]) as meter:
            rig.schedule(rig, batch, batch[0].weight)
        ledger = training_ledger(rig.facts, rig.site, rooms, "fp32", 1)
        predicted = ledger.peak()[0] - ledger.bytes("parameters") - ledger.bytes("optimizer")
        assert predicted == pytest.approx(meter.peak, rel=0.05)
        found[name] = meter, torch.cat([p.grad.flatten() for p in rig.model.parameters()])
    (plain, exact), (meter, rounded) = found.values()
    assert meter.calls["mm"] == plain.calls["mm"] and meter.peak < plain.peak * {"bf16": 0.6, "fp8": 0.38, "nf4": 0.3}[codec]
    assert 0 < (rounded - exact).norm() / exact.norm() < apart


def test_a_budget_may_round_where_it_is_allowed_to() -> None:
    """Between what exact plans take and what they cost in time lies a plan that keeps some blocks in fewer bits."""
    exact, allowed = (make_rig({"remat": Remat(budget="8MB", codec=codec)}, sequences=4, tokens=64) for codec in ("exact", "bf16"))
    assert all(row.decision.codec == "exact" for row in exact.plan.rows.values())
    assert allowed.plan.predicted["device peak"] <= 8e6 - allowed.standing()


@pytest.mark.parametrize("knobs", [{"plan": "coded"}, {"plan": "every", "codec": "fp8"}, {"plan": "selective", "codec": "bf16"}], ids=str)
def test_codecs_that_make_no_sense_are_refused(knobs: dict) -> None:
    with pytest.raises(UserError, match=r"remat\.codec|remat\.plan"):
        make_rig({"remat": Remat(**knobs)})


@pytest.mark.parametrize("where", ["host", "disk"])
def test_what_enters_a_block_may_be_paged(where: str, tmp_path: Path) -> None:
    """With pages a smaller budget is met than without, as predicted and bitwise, and its bytes really went there."""
    spec, shape = replace(PRESETS["llama-3m"], layers=8), {"sequences": 4, "tokens": 128}
    knobs = {"pages": where, "scratch": str(tmp_path) if where == "disk" else ""}
    least = []
    for more in ({}, knobs):
        with pytest.raises(DoesNotFit) as refused:
            make_rig({"remat": Remat(budget="1MB", **more)}, spec, **shape)
        least.append(refused.value.needs)
    assert least[1] < least[0] - 4 * 128 * 256 * 4, "less by what enters a block, at least"
    rig, plain = (make_rig(rooms, spec, budget={"device": 1 << 40}, **shape) for rooms in ({"remat": Remat(budget=f"{least[1]}B", **knobs)}, {}))
    batch = random_batch(65, micros=1, **shape)
    for r in (rig, plain):
        r.step(batch, 1e-3, 0)
    assert all(torch.equal(a, b) for a, b in zip(rig.model.parameters(), plain.model.parameters(), strict=True))
    assert rig.meter.peak == rig.plan.predicted["bytes"] <= least[1]
    store = next(iter(rig.objective.ready.values())).executor.stores[where]
    assert store.written > 0 and (where == "host" or any(tmp_path.iterdir()))


@pytest.mark.parametrize("knobs", [{"pages": "host"}, {"pages": "disk", "budget": "1GB"}, {"scratch": "here", "budget": "1GB"}], ids=str)
def test_pages_need_a_budget_and_a_disk_a_folder(knobs: dict) -> None:
    with pytest.raises(UserError, match=r"remat\.pages"):
        make_rig({"remat": Remat(**knobs)})
