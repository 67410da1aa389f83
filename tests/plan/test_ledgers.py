"""The base ledgers against published numbers, and against bytes that were measured."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from boxes import HAND, machine
from rigs import make_rig, random_batch

from lilliput.base import registry
from lilliput.base.errors import UserError
from lilliput.base.ledger import Term
from lilliput.base.protocols import Phase, Site
from lilliput.memory.meter import Meter, storage_bytes
from lilliput.models.facts import facts
from lilliput.models.sizes import PRESETS
from lilliput.plan.ledgers import budget, serving_ledger, training_ledger


def site(sequences: int = 1, tokens: int = 128, element: int = 4, kind: str = "cpu") -> Site:
    return Site(machine(64, kind), {}, sequences, tokens, element)


def test_sixteen_bytes_a_parameter() -> None:
    gpt2 = facts(PRESETS["gpt2"])
    ledger = training_ledger(gpt2, site(), {}, "fp32")
    assert gpt2.parameters == 124_439_808
    states = [ledger.bytes(name) for name in ("parameters", "gradients", "optimizer")]
    assert states == [4 * 124_439_808, 4 * 124_439_808, 8 * 124_439_808] and sum(states) == 16 * gpt2.parameters


def test_bf16_without_a_master_copy_is_twelve_bytes() -> None:
    llama = facts(PRESETS["llama-7b"])
    ledger = training_ledger(llama, site(element=2), {}, "bf16")
    assert sum(ledger.bytes(name) for name in ("parameters", "gradients", "optimizer")) == 12 * llama.parameters == 12 * 6_738_415_616


def test_optimizer_bytes_are_a_parameter() -> None:
    assert training_ledger(HAND, site(), {}, "fp32", optimizer=4).bytes("optimizer") == 4 * 26


@pytest.mark.parametrize(("name", "bytes_per_token"), [("llama-7b", 524_288), ("opt-13b", 800 * 1024), ("llama-70b", 327_680)])
def test_published_cache_of_one_token(name: str, bytes_per_token: int) -> None:
    ledger = serving_ledger(facts(PRESETS[name]), site(1, 1, 2, "cuda"), 512)
    assert ledger.bytes("kv") == bytes_per_token
    assert serving_ledger(facts(PRESETS[name]), site(3, 100, 2, "cuda"), 512).bytes("kv") == 300 * bytes_per_token


def test_cpus_keep_the_cache_in_fp32() -> None:
    llama = facts(PRESETS["llama-7b"])
    assert serving_ledger(llama, site(1, 1, 2), 512).bytes("kv") == 2 * 524_288
    assert serving_ledger(llama, site(1, 1, 2), 512).bytes("parameters") == 2 * llama.parameters


def test_terms_by_hand() -> None:
    ledger = training_ledger(HAND, site(2, 3), {}, "fp32")
    assert ledger.terms["activations.x"] == Term(5 * 6 * 4, moments=("forward", "backward"), blocks=1)
    assert ledger.terms["activations.y"] == Term(7 * 6 * 4, moments=("forward", "backward"))
    assert ledger.terms["transient.loss"].moments == ("forward",) and ledger.terms["transient.block"].moments == ("backward",)
    # one micro-batch: the embedding's gradient comes last, and the block's while its 120 bytes of activations go
    assert ledger.bytes("gradients not yet") == -(20 * 4 + 6 * 4)
    assert ledger.bytes("transient.one tensor updated") == 2 * 20 * 4  # the shares of the tied gradient
    saved = 5 * 6 * 4 + 7 * 6 * 4
    assert ledger.alive("forward") == 26 * 4 + 26 * 8 + saved + 3 * 6 * 4 + 11  # z is free when the backward pass reaches the blocks
    assert ledger.alive("backward") == 26 * 16 + saved + 13 - 104
    assert ledger.alive("update") == 26 * 16 + 160


def test_several_micro_batches_hold_all_gradients() -> None:
    one, four = (training_ledger(HAND, site(2, 3), {}, "fp32", n) for n in (1, 4))
    assert four.alive("forward") == one.alive("forward") + 26 * 4 + 3 * 6 * 16  # gradients, and int64 tokens and targets that wait
    assert four.bytes("gradients not yet") == 0
    assert four.flops() == 4 * one.flops() and one.flops() == 3 * 600


def test_rooms_fold_in_phase_order_and_frozen_weights_need_no_gradient_work() -> None:
    seen: list[str] = []

    class Room:
        def __init__(self, name: str, phase: Phase, share: float, needs: tuple[str, ...] = ()) -> None:
            self.name, self.phase, self.share, self.needs = name, phase, share, needs

        def acts(self) -> dict[Phase, Any]:
            return {self.phase: None}

        def cost(self, ledger: Any, facts: Any, site: Any) -> Any:
            seen.append(self.name)
            return ledger.scale("gradients", self.share).scale("optimizer", self.share)

    rooms = {"a": Room("a", Phase.STEP, 1.0), "b": Room("b", Phase.SWAP, 0.5), "c": Room("c", Phase.SWAP, 1.0, needs=("d",)), "d": Room("d", Phase.SWAP, 1.0)}
    ledger = training_ledger(HAND, site(2, 3), rooms, "fp32")
    assert seen == ["b", "d", "c", "a"]
    assert ledger.bytes("gradients") == 26 * 4 // 2
    assert ledger.terms["forward"].flops == 600 and ledger.terms["backward"].flops == 600 * 1.5
    with pytest.raises(UserError, match="wait for each other"):
        training_ledger(HAND, site(), {"x": Room("x", Phase.SWAP, 1, ("y",)), "y": Room("y", Phase.SWAP, 1, ("x",))}, "fp32")


def test_a_model_that_states_too_little_is_refused() -> None:
    with pytest.raises(UserError, match="hand") as fault:
        training_ledger(replace(HAND, activations=None), site(), {}, "fp32")
    assert "facts.activations" in fault.value.why
    with pytest.raises(UserError) as fault:
        serving_ledger(replace(HAND, kv=None), site(), 512)
    assert "facts.kv" in fault.value.why


def test_budget_keeps_a_reserve() -> None:
    device = machine(16).device
    assert budget(device) == round(16 * 2**30 * 0.95) - (512 << 20)
    assert budget(replace(device, free=1000)) == 0


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("micros", [1, 3])
@pytest.mark.parametrize("preset", ["tiny", "llama-3m", "gpt-nano"])
def test_measured_bytes(preset: str, micros: int, dtype: str) -> None:
    spec = replace(PRESETS[preset], context=256)
    rig = make_rig({}, spec, dtype=dtype, sequences=2, tokens=128)
    ledger = training_ledger(rig.facts, rig.site, {}, dtype, micros)
    batch = random_batch(spec.vocab, micros=micros, sequences=2, tokens=128)
    weights = list(rig.model.parameters())
    assert ledger.bytes("parameters") == storage_bytes(weights)
    assert ledger.bytes("optimizer") == storage_bytes(rig.optimizer.state().values())
    with Meter(known=[*weights, *[t for m in batch for t in (m.tokens_BT, m.targets_BT)]]) as meter:
        rig.step(batch, 1e-3, 0)
    static = ledger.bytes("parameters") + ledger.bytes("optimizer") + ledger.bytes("waiting micro-batches")
    assert ledger.peak()[0] - static == pytest.approx(meter.peak, rel=0.10)


@pytest.mark.parametrize("preset", ["tiny", "llama-3m", "gpt-nano"])
def test_serving_activations_are_an_upper_bound(preset: str) -> None:
    spec = replace(PRESETS[preset], context=512)
    model = make_rig({}, spec).model
    with torch.inference_mode(), Meter(known=model.parameters()) as meter:
        model.head(model.hidden(torch.zeros(1, 512, dtype=torch.long))[:, -1])
    ledger = serving_ledger(model.facts, site(1, 512), 512)
    assert meter.peak <= ledger.bytes("activations.one block") + ledger.bytes("activations.logits") <= 2 * meter.peak


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_measured_bytes_of_the_update(dtype: str) -> None:
    spec = replace(PRESETS["llama-3m"], context=256)
    rig = make_rig({}, spec, dtype=dtype)
    ledger = training_ledger(rig.facts, rig.site, {}, dtype)
    (micro,) = random_batch(spec.vocab, micros=1)
    rig.objective(rig.model, micro)[0].backward()
    gradients = [p.grad for p in rig.trainable().values()]
    with Meter(known=[*rig.model.parameters(), *gradients, *rig.optimizer.state().values()]) as meter:
        rig.update(rig, 1e-3)
    assert ledger.bytes("transient.one tensor updated") == pytest.approx(meter.peak, rel=0.02, abs=2000)


def test_every_registered_room_keeps_the_ledger_whole() -> None:
    tiny = facts(PRESETS["tiny"])
    for name in registry.names("train"):
        ledger = training_ledger(tiny, site(2, 64), {name: registry.find("train", name)()}, "fp32", 2)
        assert {"parameters", "gradients", "optimizer", "forward", "backward", "update"} <= ledger.terms.keys()
        assert ledger.peak()[0] > 0
