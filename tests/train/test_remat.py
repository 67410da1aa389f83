"""Checkpointing's published shape, counted: one extra forward, saved bytes that grow with the square root of the depth."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from rigs import make_rig, random_batch

from lilliput.memory.meter import Meter
from lilliput.models.sizes import PRESETS
from lilliput.plan.ledgers import training_ledger
from lilliput.train.remat import Remat

SPEC = replace(PRESETS["tiny"], vocab=64, dim=16, heads=2, kv_heads=2, head_dim=8, ffn=32)


def metered(layers: int, every: object) -> tuple[int, Meter]:
    rooms = {"remat": Remat(every=every)} if every else {}
    rig = make_rig(rooms, replace(SPEC, layers=layers))
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


@pytest.mark.parametrize("every", [1, 2, 4, "sqrt"])
def test_gradients_are_bitwise_those_of_the_plain_run_with_dropout(every: object) -> None:
    gradients = []
    for rooms in ({}, {"remat": Remat(every=every)}):
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


def test_refusals_say_why() -> None:
    facts = make_rig({}).facts
    assert "9" in Remat(every=9).refuses({}, facts) and "4 blocks" in Remat(every=9).refuses({}, facts)
    assert Remat(every=4).refuses({}, facts) is None
    assert "chain" in Remat(every=1).refuses({}, replace(facts, layers=0))
