"""QLoRA's storage, codes, gradients and files; its numbers and its cost are proved in test_rooms.py besides."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from rigs import make_rig, random_batch

from lilliput.base.errors import UserError
from lilliput.base.hardware import declared
from lilliput.base.job import Job
from lilliput.data.tokenizer import Tokenizer
from lilliput.memory.meter import storage_bytes
from lilliput.models.checkpoints import save_model
from lilliput.models.facts import facts
from lilliput.models.sizes import PRESETS
from lilliput.ops.float_codecs import NF4
from lilliput.ops.nf4 import Nf4
from lilliput.parallel.rig import Rig
from lilliput.plan.estimate import estimate_training
from lilliput.train.fp8 import Fp8
from lilliput.train.infinity import Infinity
from lilliput.train.lora import Lora, adapted, merge
from lilliput.train.qlora import Qlora
from lilliput.train.remat import Remat

TINY = PRESETS["tiny"]
WIDE = replace(PRESETS["smollm2-135m"], layers=2, vocab=259)
FAMILIES = {"llama": TINY, "gpt2": replace(PRESETS["gpt-nano"], vocab=259)}


def qlora(spec=TINY, steps: int = 2, rooms=None, **sizes):
    """A rig that has learned a little, so that B is not zero."""
    rig = make_rig({"qlora": Qlora(rank=4, alpha=8.0), **(rooms or {})}, spec, **sizes)
    for step in range(steps):
        rig.step(random_batch(spec.vocab, seed=step), 1e-2, step)
    rig.model.eval()
    return rig


def naive_numbers(weight: np.ndarray) -> np.ndarray:
    """The rule itself: the nearest level of each weight over its block's absmax, the lower one of two equally near."""
    blocks = weight.reshape(-1, 64)
    x = blocks * (np.float32(1) / np.abs(blocks).max(1))[:, None]
    return np.abs(x[..., None] - np.array(NF4, np.float32)).argmin(-1).reshape(-1)


def numbers(stored: torch.Tensor, codec: Nf4) -> torch.Tensor:
    packed = stored[codec.sections[0] :][: codec.sections[1]]
    return torch.stack((packed >> 4, packed & 15), 1).flatten()


def test_bits_of_a_weight_from_real_storage() -> None:
    rig = make_rig({"qlora": Qlora()}, WIDE)
    linears = [m for _, m in adapted(rig.model)]
    assert len(linears) == 14 and all(m.weight.dtype == torch.uint8 and m.weight.dim() == 1 for m in linears)
    held, weights = storage_bytes([m.weight for m in linears]), sum(m.outputs * m.inputs for m in linears)
    assert abs(8 * held / weights - 4.127) <= 0.002
    assert held == sum(Qlora().bytes(m.outputs * m.inputs) for m in linears)
    assert 7.7 < 4 * weights / held < 7.8
    assert rig.model.embed.weight.dtype == torch.float32, "only the Linears of the blocks are stored in 4 bits"


def test_numbers_are_those_of_the_rule() -> None:
    weight, codec = torch.randn(512, 1024, generator=torch.Generator().manual_seed(0)), Nf4(512, 1024)
    assert np.array_equal(numbers(codec.encode(weight), codec).numpy(), naive_numbers(weight.numpy()))


def test_levels_and_ties() -> None:
    """A level is stored as itself; halfway between two the lower one is taken."""
    levels = torch.tensor(NF4)
    codec, row = Nf4(1, 64), torch.cat([levels, (levels[1:] + levels[:-1]) / 2, torch.full((33,), -1.0)])
    assert numbers(codec.encode(row[None]), codec).tolist() == [*range(16), *range(15), *[0] * 33]
    torch.testing.assert_close(codec.decode(codec.encode(row[None]))[0, :16], levels, atol=1e-6, rtol=0)


@pytest.mark.parametrize("rows", [[0.0] * 8, [-3.0] * 8, [0.0, 5.0] + [0.0] * 6], ids=["zero", "one number", "one row"])
def test_degenerate_blocks(rows: list[float]) -> None:
    weight, codec = torch.tensor(rows)[:, None].expand(8, 64), Nf4(8, 64)
    decoded = codec.decode(codec.encode(weight))
    torch.testing.assert_close(decoded, weight, atol=0.02, rtol=0)
    assert (decoded[weight == 0] == 0).all(), "zero stays zero"


def test_error_on_normal_weights() -> None:
    """Relative error of NF4 on N(0, 1) is 0.0920; the second level adds at most 0.0003."""
    weight, codec = torch.randn(1024, 2048, generator=torch.Generator().manual_seed(1)), Nf4(1024, 2048)
    stored = codec.encode(weight)
    relative = lambda w: float((w - weight).square().mean().sqrt())
    exact = (torch.tensor(NF4)[numbers(stored, codec).long()].view(-1, 64) * weight.view(-1, 64).abs().amax(1, keepdim=True)).view_as(weight)
    assert abs(relative(exact) - 0.0920) <= 0.0005
    assert abs(relative(codec.decode(stored)) - relative(exact)) <= 0.0003


def test_gradients_are_those_over_the_decoded_base() -> None:
    """Bitwise those of plain lora on a model whose weights are what the bytes stand for."""
    rig = qlora()
    plain = make_rig({"lora": Lora(rank=4, alpha=8.0)})
    with torch.no_grad():
        for path, linear in adapted(rig.model):
            other = plain.model.get_submodule(path)
            other.weight.copy_(linear.whole("weight"))
            other.deltas.load_state_dict(linear.deltas.state_dict())
    micro = random_batch(TINY.vocab, micros=1, seed=7)[0]
    for one in (rig, plain):
        one.objective(one.model, micro)[0].backward()
    assert all(torch.equal(p.grad, plain.trainable()[n].grad) for n, p in rig.trainable().items())
    assert all(p.grad.abs().sum() > 0 for p in rig.trainable().values())


def test_the_base_never_changes() -> None:
    rig, fresh = qlora(steps=3), qlora(steps=0)
    assert set(rig.trainable()) == {n for n, _ in rig.model.named_parameters() if ".deltas.lora." in n}
    for name in rig.facts.shapes:
        assert torch.equal(rig.model.get_parameter(name), fresh.model.get_parameter(name)) and rig.model.get_parameter(name).grad is None
    assert any(not torch.equal(p, fresh.trainable()[n]) for n, p in rig.trainable().items())


@pytest.mark.parametrize("remat", [{"every": 2}, {"plan": "selective"}, {"budget": "1GB"}], ids=str)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_recomputation_changes_nothing(remat: dict, dtype: str) -> None:
    plain, planned = qlora(dtype=dtype), qlora(dtype=dtype, rooms={"remat": Remat(**remat)})
    assert all(torch.equal(p, planned.trainable()[n]) for n, p in plain.trainable().items())


@pytest.mark.parametrize("family", FAMILIES)
def test_peft_reads_what_we_write(family: str, tmp_path: Path) -> None:
    """Over the decoded base, in transformers: the adapter on top, and model/ with it merged, give our logits."""
    import peft
    import transformers

    spec = FAMILIES[family]
    rig, base = qlora(spec), qlora(spec, steps=0)
    save_model(tmp_path / "base", lambda n: base.weight(base, n), spec, Tokenizer.bytes_())
    save_model(tmp_path / "model", lambda n: rig.weight(rig, n), spec, Tokenizer.bytes_())
    (tmp_path / "adapter").mkdir()
    rig.exports["adapter"](rig, tmp_path / "adapter")
    tokens = random_batch(spec.vocab, micros=1)[0].tokens_BT
    ours = rig.model(tokens)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    plain = theirs(tokens).logits
    assert (plain - ours).abs().max() > 1e-3, "the adapter must change something"
    torch.testing.assert_close(ours, peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter").eval()(tokens).logits, atol=1e-5, rtol=1e-4)
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    torch.testing.assert_close(ours, merged(tokens).logits, atol=1e-4, rtol=1e-4)


def test_an_adapter_goes_on_where_it_stopped(tmp_path: Path) -> None:
    rig = qlora()
    rig.exports["adapter"](rig, tmp_path)
    again = make_rig({"qlora": Qlora(rank=4, alpha=8.0, adapter=str(tmp_path))}).model.eval()
    tokens = random_batch(TINY.vocab, micros=1)[0].tokens_BT
    assert torch.equal(again(tokens), rig.model(tokens))


def test_we_read_what_peft_writes(tmp_path: Path) -> None:
    import peft
    import transformers

    base = qlora(steps=0)
    save_model(tmp_path / "base", lambda n: base.weight(base, n), TINY, Tokenizer.bytes_())
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    torch.manual_seed(0)
    theirs = peft.get_peft_model(theirs, peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")).eval()
    theirs.save_pretrained(tmp_path / "adapter")
    ours = make_rig({"qlora": Qlora(rank=4, alpha=8.0, adapter=str(tmp_path / "adapter"))}).model.eval()
    tokens = random_batch(TINY.vocab, micros=1)[0].tokens_BT
    torch.testing.assert_close(ours(tokens), theirs(tokens).logits, atol=1e-5, rtol=1e-4)


def test_merged_into_the_original_weights(tmp_path: Path) -> None:
    """model/ is then the weights from before the rounding plus the update, and what is reported is what it computes."""
    rooms = {"qlora": Qlora(rank=4, alpha=8.0, merge="original")}
    rig, usual, fresh = (make_rig(r) for r in (rooms, {"qlora": Qlora(rank=4, alpha=8.0)}, {}))
    for step in range(2):
        for one in (rig, usual):
            one.step(random_batch(TINY.vocab, seed=step), 1e-2, step)
    said = rig.exports["adapter"](rig, tmp_path)
    told = json.loads((tmp_path / "merge.json").read_text())
    assert f"{told['rms']:.4f}" in said and (tmp_path / "adapter_model.safetensors").is_file()
    tokens = torch.randint(TINY.vocab, (1, min(128, TINY.context)), generator=torch.Generator().manual_seed(0))
    for name, linear in ((f"{path}.weight", m) for path, m in adapted(rig.model)):
        update = linear.deltas["lora"].weight().detach()
        torch.testing.assert_close(rig.weight(rig, name), fresh.model.get_parameter(name).detach() + update, atol=0, rtol=0)
        assert torch.equal(usual.weight(usual, name), linear.whole("weight") + update), "the usual way: what was trained over"
    with torch.no_grad():
        trained = usual.model.eval()(tokens)
        assert torch.equal(rig.model.eval()(tokens), trained), "the rig is as it was"
        decoded, original = (copied(fresh, one)(tokens) for one in (usual, rig))
    torch.testing.assert_close(decoded, trained, atol=1e-4, rtol=1e-4)
    assert told["rms"] == pytest.approx(float((original - trained).square().mean().sqrt()), rel=1e-3) and told["rms"] > 1e-3 * told["of"]


def copied(plain: Rig, rig: Rig) -> torch.nn.Module:
    """A plain model with the weights that the rig's files hold."""
    for name in rig.facts.shapes:
        plain.model.get_parameter(name).data.copy_(rig.weight(rig, name))
    return plain.model.eval()


@pytest.mark.parametrize("rooms", [{"infinity": Infinity(tiles=2)}, {"fp8": Fp8()}], ids="+".join)
def test_what_a_merge_reports_beside_others(rooms: dict, tmp_path: Path) -> None:
    rig = make_rig({"qlora": Qlora(rank=4, merge="original", double=False), **rooms})
    rig.exports["adapter"](rig, tmp_path)
    told = json.loads((tmp_path / "merge.json").read_text())
    assert 0 < told["rms"] < told["largest"] and told["rms"] < 0.5 * told["of"]


def test_an_adapters_state_is_rank_times_in_plus_out() -> None:
    rig = make_rig({"qlora": Qlora(rank=4)})
    sizes = {name.partition(".deltas.")[0]: 0 for name in rig.trainable()}
    for name, parameter in rig.trainable().items():
        sizes[name.partition(".deltas.")[0]] += parameter.numel()
    shapes = {path: 4 * sum(rig.facts.shapes[f"{path}.weight"]) for path in sizes}
    assert sizes == shapes and storage_bytes(rig.optimizer.state().values()) == 8 * sum(shapes.values())


def q4_blocks(outputs: int, inputs: int, kind: str = "Q4_1", seed: int = 0) -> np.ndarray:
    """Rows of blocks as gguf's own quantiser writes them."""
    import gguf

    weight = np.random.default_rng(seed).normal(0, 0.05, (outputs, inputs)).astype(np.float32)
    return gguf.quants.quantize(weight, getattr(gguf.GGMLQuantizationType, kind))


def file_blocks(spec, kind: str = "Q4_1"):
    return lambda name: (kind, q4_blocks(*spec.shapes()[name], kind, seed=sum(name.encode())))


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1"])
def test_a_files_own_numbers_are_the_base(kind: str) -> None:
    """Without the second level the base is the file's decoded matrix to the bit; with it numbers are the same and 4.508 bits hold a weight."""
    import gguf

    blocks = file_blocks(WIDE, kind)
    exact = make_rig({"qlora": Qlora(storage="file", double=False)}, WIDE, blocks=blocks)
    small = make_rig({"qlora": Qlora(storage="file")}, WIDE, blocks=blocks)
    for path, linear in adapted(exact.model):
        rows = blocks(path + ".weight")[1]
        other = small.model.get_submodule(path)
        wanted = torch.from_numpy(gguf.quants.dequantize(rows, getattr(gguf.GGMLQuantizationType, kind)))
        assert torch.equal(linear.whole("weight"), wanted)
        assert torch.equal(linear.weight.split(linear.codec.sections)[2], other.weight.split(other.codec.sections)[2])
        assert (other.whole("weight") - wanted).square().mean().sqrt() < 0.012 * wanted.square().mean().sqrt()
    for rig, bits in ((exact, 5.0), (small, 4.508)):
        linears = [m for _, m in adapted(rig.model)]
        held, weights = storage_bytes([m.weight for m in linears]), sum(m.outputs * m.inputs for m in linears)
        assert abs(8 * held / weights - bits) < 0.002 and held == sum(rig_bytes(m, bits) for m in linears)
    assert held <= 4 * weights / 7, "1/7 of fp32"


def rig_bytes(linear, bits: float) -> int:
    return Qlora(storage="file", double=bits < 5).bytes(linear.outputs * linear.inputs)


def test_a_files_base_learns_and_stays() -> None:
    rigs = [make_rig({"qlora": Qlora(rank=4, storage="file"), **more}, blocks=file_blocks(TINY)) for more in ({}, {}, {"remat": Remat(every=2)})]
    for rig in rigs[1:]:
        for step in range(2):
            rig.step(random_batch(TINY.vocab, seed=step), 1e-2, step)
    assert all(torch.equal(p, rigs[2].trainable()[n]) for n, p in rigs[1].trainable().items())
    for name, parameter in rigs[0].model.named_parameters():
        changed = not torch.equal(parameter, rigs[1].model.get_parameter(name))
        assert changed == (".deltas.lora." in name)


def test_storage_file_needs_a_files_blocks() -> None:
    with pytest.raises(UserError, match=r"no file has `layers\.0") as refused:
        make_rig({"qlora": Qlora(storage="file")})
    assert refused.value.fix == "qlora.storage=nf4"
    with pytest.raises(UserError, match="blocks of Q8_0 cannot be kept"):
        make_rig({"qlora": Qlora(storage="file")}, blocks=file_blocks(TINY, "Q8_0"))


def test_refusals() -> None:
    with pytest.raises(UserError, match="qlora") as refused:
        make_rig({"qlora": Qlora(), "lora": Lora()})
    assert "qlora.rank" in refused.value.why
    with pytest.raises(UserError) as refused:
        make_rig({"qlora": Qlora()}, replace(TINY, ffn=TINY.ffn + 1))
    assert "no multiple of 64" in refused.value.why
    with pytest.raises(UserError, match="no update in place"):
        merge(qlora().model)


def test_the_plan_counts_its_bytes() -> None:
    known = facts(PRESETS["llama-7b"])
    job = lambda room: estimate_training(Job.load(None, ["data.sequence=512", "train.micro_batch=1", "dtype=bf16", room]), known, declared("laptop"))
    plain, small = job("lora.rank=64"), job("qlora.rank=64")
    linears = sum(rows * columns for rows, columns in Qlora().stored(known).values())
    assert plain.ledger.bytes("parameters") - small.ledger.bytes("parameters") == 2 * linears - sum(
        Qlora().bytes(rows * columns) for rows, columns in Qlora().stored(known).values()
    )
    assert small.ledger.bytes("optimizer") == plain.ledger.bytes("optimizer")
    assert small.ledger.bytes("transient.one matrix decoded") == 4 * 4096 * 11008
