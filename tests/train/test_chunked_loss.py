"""The loss in chunks in a whole step: numbers beside the plain loss, bytes under every plan, what the closed form says, and when it is chosen."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from rigs import make_rig, random_batch

from lilliput.base.errors import UserError
from lilliput.memory.meter import Meter
from lilliput.models.facts import facts
from lilliput.models.sizes import PRESETS
from lilliput.plan.ledgers import training_ledger
from lilliput.train.chunked import Chunked
from lilliput.train.lora import Lora
from lilliput.train.remat import Remat

WIDE = replace(PRESETS["llama-3m"], vocab=4096, layers=3, dim=64, heads=2, kv_heads=2, head_dim=32, ffn=160)  # a head that is the peak


def gradients(rooms: dict, spec=WIDE, dropout: float = 0.0, dtype: str = "fp32") -> tuple[list[float], torch.Tensor]:
    rig = make_rig(rooms, spec, dropout=dropout, sequences=2, tokens=40, dtype=dtype)
    rig.model.train()
    losses = []
    for index, micro in enumerate(random_batch(spec.vocab, sequences=2, tokens=40)):
        micro.targets_BT[0, :11] = -100
        rig.counter.micro = index
        loss, weight = rig.objective(rig.model, micro)
        (loss / weight).backward()
        losses.append(loss.item())
    return losses, torch.cat([p.grad.flatten().float() for p in rig.model.parameters() if p.grad is not None])


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("dtype", "apart"), [("fp32", 1e-6), ("bf16", 3e-3)])
def test_gradients_beside_the_plain_loss(tied: bool, dtype: str, apart: float) -> None:
    spec = replace(WIDE, tied=tied)
    (losses, whole), (again, chunked) = (gradients(rooms, spec, 0.1, dtype) for rooms in ({}, {"chunked": Chunked(tokens=24)}))
    assert again == pytest.approx(losses, rel=1e-6)
    assert 0 < (whole - chunked).norm() <= apart * whole.norm()


@pytest.mark.parametrize("knobs", [{"plan": "sqrt"}, {"every": 1}, {"plan": "selective"}, {"budget": "13.5MB"}], ids=str)
def test_plans_change_no_bit_of_it(knobs: dict) -> None:
    losses, plain = gradients({"chunked": Chunked(tokens=24)}, dropout=0.1)
    again, planned = gradients({"chunked": Chunked(tokens=24), "remat": Remat(**knobs)}, dropout=0.1)
    assert losses == again and torch.equal(plain, planned)


def test_nothing_changes_without_a_chunk() -> None:
    assert torch.equal(gradients({})[1], gradients({"chunked": Chunked(tokens=0)})[1])


@pytest.mark.parametrize("micros", [1, 2])
@pytest.mark.parametrize("rooms", [{}, {"remat": Remat(every=1)}, {"lora": Lora(rank=4)}], ids=lambda r: "+".join(r) or "alone")
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("tokens", [32, 256])  # with 256 a chunk's own numbers are the most, with 32 the sums of gradients
def test_the_closed_form_is_what_is_measured(tokens: int, tied: bool, rooms: dict, micros: int) -> None:
    spec, peaks = replace(WIDE, tied=tied), []
    for more in ({}, {"chunked": Chunked(tokens=tokens)}):
        rig = make_rig(rooms | more, spec, sequences=4, tokens=128, micro_batches=micros)
        batch = random_batch(spec.vocab, micros=micros, sequences=4, tokens=128)
        ledger = training_ledger(rig.facts, rig.site, rooms | more, "fp32", micros)
        with Meter(known=[*rig.model.parameters(), *(t for m in batch for t in (m.tokens_BT, m.targets_BT))]) as meter:
            rig.schedule(rig, batch, sum(m.weight for m in batch))
        assert ledger.peak()[0] - ledger.bytes("parameters") - ledger.bytes("optimizer") == pytest.approx(meter.peak, rel=0.1)
        peaks.append(meter.peak)
    assert peaks[1] < 0.6 * peaks[0]


def test_auto_follows_the_heads_width() -> None:
    tokens = {dim: Chunked().each(facts(replace(WIDE, dim=dim))) for dim in (64, 576, 4096)}
    assert tokens == {64: 32, 576: 64, 4096: 512}
    assert Chunked(tokens=7).each(facts(WIDE)) == 7


def test_refusals() -> None:
    with pytest.raises(UserError, match="no number of tokens") as refused:
        make_rig({"chunked": Chunked(tokens=-1)})
    assert "chunked" in refused.value.what
    assert "head" in Chunked().refuses({}, replace(facts(WIDE), chain=("embed", "layers.*")))


def test_a_smaller_batch_is_planned_anew_and_gives_its_numbers() -> None:
    rig, plain = (make_rig(rooms, WIDE, sequences=2, tokens=40) for rooms in ({"chunked": Chunked(tokens=16), "remat": Remat(every=1)}, {}))
    for tokens in (40, 9):
        micro = random_batch(WIDE.vocab, micros=1, sequences=2, tokens=tokens)[0]
        one, two = (r.objective(r.model, micro)[0].item() for r in (rig, plain))
        assert one == pytest.approx(two, rel=1e-6)
    assert len(rig.objective.ready) == 2
