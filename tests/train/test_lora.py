"""LoRA's files and merging; its numbers and its cost are proved in test_rooms.py."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rigs import make_rig, random_batch

from lilliput.base.errors import UserError
from lilliput.data.tokenizer import Tokenizer
from lilliput.memory.meter import Meter
from lilliput.models.checkpoints import save_model
from lilliput.models.sizes import PRESETS
from lilliput.plan.ledgers import training_ledger
from lilliput.train.lora import Lora, adapted, merge, unmerge

FAMILIES = {
    "llama": PRESETS["tiny"],
    "gpt2": replace(PRESETS["gpt-nano"], vocab=259),
    "opt": replace(PRESETS["gpt-nano"], family="opt", activation="relu", vocab=259),
}


def trained(spec, **config):
    room = Lora(rank=4, alpha=8.0, **config)
    rig = make_rig({"lora": room}, spec)
    for step in range(2):
        rig.step(random_batch(spec.vocab, seed=step), 1e-2, step)
    rig.model.eval()
    return room, rig


@pytest.mark.parametrize("family", FAMILIES)
def test_peft_reads_what_we_write(family: str, tmp_path: Path) -> None:
    import peft
    import transformers

    spec = FAMILIES[family]
    room, rig = trained(spec)
    base = make_rig({}, spec)
    save_model(tmp_path / "base", lambda n: base.weight(base, n), spec, Tokenizer.bytes_())
    (tmp_path / "adapter").mkdir()
    room.write(rig, tmp_path / "adapter")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    tokens = random_batch(spec.vocab, micros=1)[0].tokens_BT
    plain = theirs(tokens).logits
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter").eval()
    torch.testing.assert_close(rig.model(tokens), theirs(tokens).logits, atol=1e-5, rtol=1e-4)
    assert (plain - theirs(tokens).logits).abs().max() > 1e-3, "the adapter must change something"


def test_we_read_what_peft_writes(tmp_path: Path) -> None:
    import peft
    import transformers

    spec = FAMILIES["gpt2"]
    base = make_rig({}, spec)
    save_model(tmp_path / "base", lambda n: base.weight(base, n), spec, Tokenizer.bytes_())
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    config = peft.LoraConfig(r=4, lora_alpha=16, target_modules=["c_attn", "c_fc"], init_lora_weights=False, task_type="CAUSAL_LM", fan_in_fan_out=True)
    torch.manual_seed(0)
    theirs = peft.get_peft_model(theirs, config).eval()
    theirs.save_pretrained(tmp_path / "adapter")
    room = Lora(rank=4, alpha=8.0, targets=("q_proj", "k_proj", "v_proj", "up_proj"), adapter=str(tmp_path / "adapter"))
    ours = make_rig({"lora": room}, spec).model.eval()
    tokens = random_batch(spec.vocab, micros=1)[0].tokens_BT
    torch.testing.assert_close(ours(tokens), theirs(tokens).logits, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_adapter_goes_on_where_it_stopped(family: str, tmp_path: Path) -> None:
    spec = FAMILIES[family]
    room, rig = trained(spec, targets=("q_proj", "up_proj"))
    room.write(rig, tmp_path)
    again = make_rig({"lora": room.model_copy(update={"adapter": str(tmp_path)})}, spec).model.eval()
    tokens = random_batch(spec.vocab, micros=1)[0].tokens_BT
    if family == "gpt2":  # q alone: its c_attn update has rows of zeros for k and v, and the same A
        torch.testing.assert_close(again(tokens), rig.model(tokens), atol=1e-6, rtol=1e-5)
    else:
        assert torch.equal(again(tokens), rig.model(tokens))


def test_merge_and_unmerge() -> None:
    _, rig = trained(PRESETS["tiny"])
    tokens = random_batch(1024, micros=1)[0].tokens_BT
    with torch.no_grad():
        before, weights = rig.model(tokens), {n: p.clone() for n, p in rig.model.named_parameters() if ".deltas." not in n}
        assert merge(rig.model) == 28 and not adapted(rig.model)
        torch.testing.assert_close(rig.model(tokens), before, atol=2e-5, rtol=1e-4)
        assert all(torch.equal(p, rig.weight(rig, n)) for n, p in rig.model.named_parameters())
        assert unmerge(rig.model) == 28
        torch.testing.assert_close(rig.model(tokens), before, atol=2e-5, rtol=1e-4)
        for n, p in weights.items():
            torch.testing.assert_close(rig.model.get_parameter(n), p, atol=1e-6, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("targets", [("all",), ("q_proj", "v_proj"), ("down_proj",)], ids="+".join)
def test_predicted_bytes_with_some_targets(family: str, targets: tuple[str, ...]) -> None:
    """A frozen Linear without an update keeps no input. (What stands before the first update keeps nothing: too small to model in a deep model.)"""
    rooms = {"lora": Lora(rank=4, targets=targets)}
    rig = make_rig(rooms, replace(FAMILIES[family], context=256, layers=16), sequences=4, tokens=128)
    micro = random_batch(rig.facts.vocab, micros=1, sequences=4, tokens=128)[0]
    ledger = training_ledger(rig.facts, rig.site, rooms, "fp32")
    with Meter(known=[*rig.model.parameters(), micro.tokens_BT, micro.targets_BT]) as meter:
        loss, _ = rig.objective(rig.model, micro)
        kept = meter.live
        loss.backward()
    predicted = sum(t.bytes for n, t in ledger.terms.items() if n.startswith("activations.") and "forward" in t.moments)
    assert predicted == pytest.approx(kept, rel=0.07)
    assert ledger.peak()[0] - ledger.bytes("parameters") - ledger.bytes("optimizer") == pytest.approx(meter.peak, rel=0.10)


def test_only_the_adapter_learns_and_the_base_is_untouched() -> None:
    _, rig = trained(PRESETS["tiny"])
    base = make_rig({}, PRESETS["tiny"])
    assert set(rig.trainable()) == {n for n, _ in rig.model.named_parameters() if ".deltas.lora." in n}
    for name in rig.facts.shapes:
        assert torch.equal(rig.model.get_parameter(name), base.model.get_parameter(name))


def test_dropout_sits_on_the_update_alone() -> None:
    _, rig = trained(PRESETS["tiny"], dropout=0.5)
    tokens = random_batch(1024, micros=1)[0].tokens_BT
    evaluated = rig.model(tokens)
    rig.model.train()
    assert not torch.equal(rig.model(tokens), evaluated)
    rig.counter.step = 0
    first = rig.model(tokens)
    rig.counter.step = 1
    assert not torch.equal(rig.model(tokens), first)
    rig.counter.step = 0
    assert torch.equal(rig.model(tokens), first)


@pytest.mark.parametrize(
    ("config", "what"),
    [({"use_dora": True}, "plain LoRA"), ({"peft_type": "IA3"}, "plain LoRA"), ({"r": 8}, "does not fit"), (None, "no adapter")],
    ids=["dora", "ia3", "other rank", "missing"],
)
def test_adapters_that_cannot_be_used(config: dict | None, what: str, tmp_path: Path) -> None:
    if config is not None:
        room, rig = trained(PRESETS["tiny"])
        room.write(rig, tmp_path)
        written = json.loads((tmp_path / "adapter_config.json").read_text())
        (tmp_path / "adapter_config.json").write_text(json.dumps(written | config))
    with pytest.raises(UserError, match=what):
        make_rig({"lora": Lora(rank=8 if config == {"r": 8} else 4, adapter=str(tmp_path))})


@pytest.mark.parametrize(("sequences", "tokens"), [(2, 64), (4, 256)])
def test_what_dropout_keeps_is_predicted(sequences: int, tokens: int) -> None:
    rooms = {"lora": Lora(rank=4, dropout=0.1)}
    rig = make_rig(rooms, sequences=sequences, tokens=tokens)
    ledger = training_ledger(rig.facts, rig.site, rooms, "fp32")
    (micro,) = random_batch(rig.facts.vocab, micros=1, sequences=sequences, tokens=tokens)
    with Meter(known=[*rig.model.parameters(), micro.tokens_BT, micro.targets_BT]) as meter:
        loss, _ = rig.objective(rig.model.train(), micro)
        saved = meter.live
        loss.backward()
    assert sum(t.bytes for n, t in ledger.terms.items() if n.startswith("activations.") and "forward" in t.moments) == pytest.approx(saved, rel=0.1)
    assert ledger.peak()[0] - ledger.bytes("parameters") - ledger.bytes("optimizer") == pytest.approx(meter.peak, rel=0.1)
