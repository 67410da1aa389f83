"""Model folders: what we save, transformers loads with equal logits and we load bit-equal; what is wrong is named before torch."""

from __future__ import annotations

import errno
import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from lilliput.base import records
from lilliput.base.errors import UserError
from lilliput.data.tokenizer import Tokenizer
from lilliput.models import checkpoints, safetensor
from lilliput.models.checkpoints import materialise, open_checkpoint, save_model
from lilliput.models.decoder import Decoder
from lilliput.models.load import load_model, pick_device, resolve_spec
from lilliput.models.spec import DecoderSpec, Rope

LLAMA = DecoderSpec("llama", 260, 32, 2, 4, 2, 8, 48, 64, eos_ids=(256, 258), extra={"pad_token_id": 256})
GPT2 = DecoderSpec("gpt2", 260, 32, 2, 4, 4, 8, 64, 64, norm="layer", positions="learned", activation="gelu_tanh", qkv_bias=True, o_bias=True, mlp_bias=True,
                   tied=True, eos_ids=(256,))  # fmt: skip
OPT = replace(GPT2, family="opt", activation="relu")
SPECS = {
    "llama": LLAMA,
    "llama tied": replace(LLAMA, tied=True, rope=Rope(500000.0, "llama3", 8.0, 16)),
    "mistral": replace(LLAMA, family="mistral", window=8),
    "qwen2": replace(LLAMA, family="qwen2", qkv_bias=True, tied=True),
    "qwen3": replace(LLAMA, family="qwen3", qk_norm=True, head_dim=16),
    "gpt2": GPT2,
    "opt": OPT,
    "opt-350m": replace(OPT, norm_place="post", embed_dim=16),
}


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


def model_of(spec: DecoderSpec, seed: int = 0) -> Decoder:
    """Random weights in which every parameter shows."""
    model = Decoder(spec).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2 + (1.0 if "norm" in name and name.endswith("weight") else 0.0))
    return model


def saved(folder: Path, spec: DecoderSpec = LLAMA, **options: Any) -> tuple[Path, Decoder]:
    model = model_of(spec)
    save_model(folder, model.get_parameter, spec, Tokenizer.bytes_(), **options)
    return folder, model


def on_meta(spec: DecoderSpec) -> Decoder:
    with torch.device("meta"):
        return Decoder(spec)


TOKENS = torch.randint(0, 256, (2, 24), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("case", SPECS)
def test_transformers_loads_what_we_save(tmp_path: Path, case: str) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, model = saved(tmp_path / "m", SPECS[case])
    theirs, told = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", output_loading_info=True)
    assert not any(told[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        torch.testing.assert_close(model(TOKENS), theirs.eval()(TOKENS).logits, atol=1e-4, rtol=0)
    text = "Grüße, Gulliver! 42"
    assert AutoTokenizer.from_pretrained(folder)(text).input_ids == Tokenizer.bytes_().encode(text)
    eos = theirs.generation_config.eos_token_id
    assert (tuple(eos) if isinstance(eos, list) else (eos,)) == SPECS[case].eos_ids


@pytest.mark.parametrize("case", SPECS)
def test_we_load_what_transformers_saves(tmp_path: Path, case: str) -> None:
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(saved(tmp_path / "ours", SPECS[case])[0], attn_implementation="eager").eval()
    theirs.save_pretrained(tmp_path / "theirs")
    checkpoint = open_checkpoint(tmp_path / "theirs")
    assert checkpoint.spec == replace(SPECS[case], extra=checkpoint.spec.extra)
    model = materialise(on_meta(checkpoint.spec), checkpoint)
    with torch.no_grad():
        torch.testing.assert_close(model(TOKENS), theirs(TOKENS).logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize("case", SPECS)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_our_round_trip_is_bitwise(tmp_path: Path, case: str, dtype: str) -> None:
    folder, model = saved(tmp_path / "m", SPECS[case], dtype=dtype)
    stored = torch.float32 if dtype == "fp32" else torch.bfloat16
    loaded, tokenizer, checkpoint = load_model(folder, "cpu", dtype)
    assert checkpoint.spec == SPECS[case]
    assert tokenizer.digest() == Tokenizer.bytes_().digest()
    assert not loaded.training
    assert json.loads((folder / "config.json").read_text())["torch_dtype"] == str(stored).removeprefix("torch.")
    for name, parameter in loaded.named_parameters():
        assert parameter.dtype == stored
        assert torch.equal(parameter, model.get_parameter(name).to(stored)), name
        assert parameter.data_ptr() % 64 == 0, "aligned as torch's own memory"
    assert checkpoint.dtypes == {"F32" if dtype == "fp32" else "BF16": checkpoint.bytes}
    unread = 2 * 32 * stored.itemsize if checkpoint.spec.family == "opt" else 0  # the first two rows of OPT's position table
    assert checkpoint.bytes == sum(p.numel() * p.element_size() for p in loaded.parameters()) + unread


@settings(deadline=None, max_examples=25)
@given(layers=st.integers(1, 3), groups=st.integers(1, 3), kv=st.integers(1, 3), half=st.integers(1, 5), tied=st.booleans(), bias=st.booleans(),
       shard=st.sampled_from([400, 3000, 1 << 40]), seed=st.integers(0, 9))  # fmt: skip
def test_any_shape_in_any_number_of_shards_comes_back(tmp_path_factory: pytest.TempPathFactory, layers: int, groups: int, kv: int, half: int,
                                                      tied: bool, bias: bool, shard: int, seed: int) -> None:  # fmt: skip
    spec = DecoderSpec("llama", 260, 8, layers, kv * groups, kv, 2 * half, 12, 16, tied=tied, mlp_bias=bias, eos_ids=(256,))
    model = model_of(spec, seed)
    folder = tmp_path_factory.mktemp("shards") / "m"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoints, "SHARD", shard)
        save_model(folder, model.get_parameter, spec, Tokenizer.bytes_())
    checkpoint = open_checkpoint(folder)
    assert (len(checkpoint.files) == 1) == (shard > 1 << 30)
    assert set(load_file(checkpoint.files[0])) <= set(safetensor.shards(folder))
    assert checkpoint.spec == spec
    assert all(torch.equal(checkpoint.read(name), parameter) for name, parameter in model.named_parameters())
    assert {path.stat().st_mode for path in folder.iterdir()} == {(folder / "config.json").stat().st_mode}
    records.verify(folder)


def test_lineage_is_kept_and_names_the_parent(tmp_path: Path) -> None:
    parent, _ = saved(tmp_path / "parent")
    opened = open_checkpoint(parent)
    lineage = {"parents": [{"model": "parent", "sha256": opened.digest()}], "sections": {"lora": {"rank": 8}}, "evaluation": {"0": 3.5}}
    child = open_checkpoint(saved(tmp_path / "child", lineage=lineage)[0])
    assert child.lineage is not None
    assert {key: child.lineage[key] for key in lineage} == lineage
    assert child.lineage["hashes"]["model.safetensors"] == records.sha256(tmp_path / "child" / "model.safetensors")
    assert child.digest() == opened.digest()
    (tmp_path / "parent" / "lilliput.json").unlink()
    assert open_checkpoint(parent).lineage is None


# ---- what is refused

Damage = Callable[[Path], None]


def edit_config(**changes: Any) -> Damage:
    def damage(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text()) | changes
        (folder / "config.json").write_text(json.dumps(config))

    return damage


def edit_tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Damage:
    def damage(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")

    return damage


def truncate(folder: Path) -> None:
    os.truncate(folder / "model.safetensors", (folder / "model.safetensors").stat().st_size - 100)


NORM = "model.layers.1.input_layernorm.weight"
DAMAGES: dict[str, tuple[Damage, str]] = {
    "truncated": (truncate, "it is truncated"),
    "no config": (lambda folder: (folder / "config.json").unlink(), "has no config.json"),
    "config is a list": (lambda folder: (folder / "config.json").write_text("[]"), "not a JSON object"),
    "config is not JSON": (lambda folder: (folder / "config.json").write_text("{"), "not JSON"),
    "missing": (edit_tensors(lambda t: t.pop(NORM)), f"1 missing: {NORM}"),
    "unexpected": (edit_tensors(lambda t: t.update(extra=torch.ones(3))), "1 unexpected: extra"),
    "mis-shaped": (edit_tensors(lambda t: t.update({NORM: torch.ones(31)})), f"`{NORM}` has shape [31]"),
    "another model": (edit_config(num_hidden_layers=3), "9 missing: model.layers.2.input_layernorm.weight"),
    "a billion layers": (edit_config(num_hidden_layers=10**9), "1,000,000,000 layers"),
    "quantised": (edit_tensors(lambda t: t.update({NORM: torch.ones(32, dtype=torch.int8)})), f"{NORM} (I8)"),
    "unsupported": (edit_config(model_type="mamba"), "`mamba`"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "holds no model"),
    "a run": (lambda folder: [folder.rename(folder.with_name("x")), folder.mkdir(), folder.with_name("x").rename(folder / "model")], "folder of a run"),
    "tied to another head": (edit_config(tie_word_embeddings=True), "the head is not the embedding"),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_damage_is_named(tmp_path: Path, case: str) -> None:
    folder, _ = saved(tmp_path / "m")
    damage, message = DAMAGES[case]
    damage(folder)
    with pytest.raises(UserError) as caught:
        open_checkpoint(folder)
    assert message in str(caught.value)
    assert caught.value.fix


def test_damage_is_seen_before_torch_is_loaded(tmp_path: Path) -> None:
    folder, _ = saved(tmp_path / "m")
    open_it = f"open_checkpoint({str(folder)!r})"
    code = f"import sys; from lilliput.models.checkpoints import open_checkpoint; {open_it}; assert 'torch' not in sys.modules, 'healthy'\n"
    truncate(folder)
    again = f"try: {open_it}\nexcept Exception as error: assert type(error).__name__ == 'UserError' and 'torch' not in sys.modules\nelse: sys.exit(9)"
    whole = saved(tmp_path / "whole")[0]
    subprocess.run([sys.executable, "-c", code.replace(str(folder), str(whole)) + again], check=True)


def test_pickles_are_refused_with_a_way_out(tmp_path: Path) -> None:
    for name in ("pytorch_model.bin", "model.pt", "model.pth"):
        torch.save({"a": torch.ones(2)}, tmp_path / name)
        with pytest.raises(UserError) as caught:
            open_checkpoint(tmp_path / name)
        assert "any code" in caught.value.why
        assert "save_pretrained" in caught.value.fix
    (tmp_path / "model.pt").unlink(), (tmp_path / "model.pth").unlink()
    with pytest.raises(UserError, match="is a pickle"):
        open_checkpoint(tmp_path)
    (tmp_path / "old.pt").write_bytes(b"\x80\x02}q\0.")  # before torch 1.6: no zip
    with pytest.raises(UserError, match="is a pickle"):
        open_checkpoint(tmp_path / "old.pt")


def test_a_kind_is_told_by_content_and_not_by_name(tmp_path: Path) -> None:
    folder, _ = saved(tmp_path / "m")
    (folder / "model.safetensors").rename(folder / "weights.of.mine")
    assert open_checkpoint(folder / "weights.of.mine").format == "safetensors"
    (tmp_path / "x.gguf").write_bytes(b"<html>not found</html>")
    with pytest.raises(UserError, match="not a GGUF file"):
        open_checkpoint(tmp_path / "x.gguf")
    with pytest.raises(UserError, match="there is no model at"):
        open_checkpoint(tmp_path / "nowhere")


def test_a_repeated_head_of_a_tied_model_is_the_embedding(tmp_path: Path) -> None:
    folder, model = saved(tmp_path / "m", SPECS["llama tied"])
    edit_tensors(lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))(folder)
    checkpoint = open_checkpoint(folder)
    assert torch.equal(checkpoint.read("embed.weight"), model.embed.weight)
    assert "head.weight" not in checkpoint.spec.shapes()


def test_buffers_of_older_files_are_left_alone(tmp_path: Path) -> None:
    folder, _ = saved(tmp_path / "m")
    edit_tensors(lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}))(folder)
    assert open_checkpoint(folder).spec == LLAMA


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(saved(tmp_path / "m")[0])
    with pytest.raises(UserError) as caught:
        materialise(on_meta(replace(LLAMA, ffn=50)), checkpoint)
    assert "checkpoint of another model" in caught.value.what
    assert "`layers.0.mlp.gate_proj.weight`: the model has (50, 32), the checkpoint (48, 32)" in caught.value.why


def test_a_missing_or_foreign_tokenizer_is_a_user_error(tmp_path: Path) -> None:
    folder, _ = saved(tmp_path / "m")
    Tokenizer.train_bpe(["the quick brown fox, the quick brown dog, the quicker brown cat " * 9], 270).save(folder)
    with pytest.raises(UserError) as caught:
        load_model(folder)
    assert "270 tokens, the embedding 260 rows" in caught.value.why
    for file in folder.glob("*token*"):
        file.unlink()
    assert open_checkpoint(folder).spec == LLAMA
    with pytest.raises(UserError, match="has no tokenizer"):
        load_model(folder)


@pytest.mark.parametrize("when", ["before", "while"])
def test_a_full_disk_leaves_the_older_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str) -> None:
    folder, _ = saved(tmp_path / "m")
    before = records.sha256(folder / "model.safetensors")
    if when == "before":
        usage = type("Usage", (), {"free": 1000})
        monkeypatch.setattr(checkpoints.shutil, "disk_usage", lambda path: usage)

    def read(name: str) -> torch.Tensor:
        if when == "while" and name.startswith("layers.1"):
            raise OSError(errno.ENOSPC, "No space left on device")
        return torch.zeros(LLAMA.shapes()[name])

    with pytest.raises(UserError, match="disk full"):
        save_model(folder, read, LLAMA, Tokenizer.bytes_())
    assert records.sha256(folder / "model.safetensors") == before
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


# ---- names


def test_presets_have_no_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LILLIPUT_CACHE", str(tmp_path))
    spec, source = resolve_spec("gpt-nano")
    assert (spec.dim, source) == (128, None)
    with pytest.raises(UserError, match="a size without weights"):
        load_model("gpt-nano")
    folder, _ = saved(tmp_path / "m")
    assert resolve_spec(str(folder)) == (LLAMA, folder)


def test_devices_are_checked(device: str) -> None:
    assert pick_device(device) == device
    with pytest.raises(UserError, match="unknown device `gpu`"):
        pick_device("gpu")
    with pytest.raises(UserError, match="no device `cuda:99`"):
        pick_device("cuda:99")


def test_the_default_model_round_trips_through_a_folder(smollm2: Path, tmp_path: Path) -> None:
    """GGUF -> model -> folder -> model: the same weights and the same tokenizer."""
    source = open_checkpoint(smollm2)
    small = replace(source.spec, layers=1)
    save_model(tmp_path / "m", source.read, small, source.tokenizer())
    back = open_checkpoint(tmp_path / "m")
    assert back.spec == small
    assert all(torch.equal(back.read(name), source.read(name)) for name in small.shapes())
    assert back.tokenizer().digest() == source.tokenizer().digest()
