"""GPTQ and AWQ folders, written here one number at a time by the formats' definitions: read without rounding, run as they are stored, refused by name."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from served import held
from typer.testing import CliRunner

from lilliput import api
from lilliput.base.errors import UserError
from lilliput.base.job import Job
from lilliput.cli.main import application
from lilliput.data.tokenizer import Tokenizer
from lilliput.models.checkpoints import open_checkpoint, save_model
from lilliput.models.decoder import Decoder
from lilliput.models.load import load_model, load_to_serve
from lilliput.models.native import NativeDecoder
from lilliput.models.spec import DecoderSpec
from lilliput.models.stored import matrices, native_bytes
from lilliput.ops import codecs, float_codecs, native, packed

LLAMA = DecoderSpec("llama", 262, 64, 2, 4, 2, 16, 128, 64, eos_ids=(256,))
GPT2 = DecoderSpec("gpt2", 262, 64, 2, 4, 4, 16, 128, 64, norm="layer", positions="learned", activation="gelu_tanh", qkv_bias=True, o_bias=True,
                   mlp_bias=True, tied=True, eos_ids=(256,))  # fmt: skip
needs_native = pytest.mark.skipif(native.module() is None, reason=str(native.missing()))
TOKENS = torch.randint(0, 256, (2, 24), generator=torch.Generator().manual_seed(1))


@dataclass(frozen=True)
class Case:
    spec: DecoderSpec = LLAMA
    method: str = "gptq"
    bits: int = 4
    group: int = 32
    form: str = "gptq"
    symmetric: bool = False
    act_order: bool = False
    scales: torch.dtype = torch.float16


CASES = {
    "gptq": Case(),
    "gptq v2, groups of 64": Case(group=64, form="gptq_v2"),
    "gptq, one group": Case(group=-1),
    "gptq, 8 bits": Case(bits=8, symmetric=True),
    "gptq, 8 bits, one group": Case(bits=8, group=-1, symmetric=True),
    "gptq of gpt2": Case(GPT2),
    "gptq in bf16": Case(scales=torch.bfloat16),
    "awq": Case(method="awq", form="gemm"),
    "awq of qwen2": Case(replace(LLAMA, family="qwen2", qkv_bias=True, tied=True), method="awq", group=64, form="gemm"),
}


def word(values: list[int], bits: int) -> int:
    """Numbers of a word, lowest bits first, as a signed 32-bit integer."""
    whole = sum(int(value) << (bits * place) for place, value in enumerate(values))
    return whole - (1 << 32) if whole >= 1 << 31 else whole


def quantised(w_KN: np.ndarray, case: Case, draw: np.random.Generator) -> tuple[dict[str, torch.Tensor], np.ndarray]:
    """(tensors of one Linear, the matrix [K, N] that they stand for)."""
    inputs, outputs = w_KN.shape
    group, top, per = case.group if case.group > 0 else inputs, (1 << case.bits) - 1, 32 // case.bits
    g_idx = np.arange(inputs) // group
    if case.act_order:
        g_idx = draw.permutation(g_idx)
    groups = inputs // group
    scales, zeros = np.zeros((groups, outputs), np.float32), np.zeros((groups, outputs), np.int64)
    for g in range(groups):
        low, high = w_KN[g_idx == g].min(0), w_KN[g_idx == g].max(0)
        if case.symmetric:
            high = np.maximum(-low, high)
            low = -high
        scales[g] = (high - low) / top
        zeros[g] = (1 << case.bits - 1) if case.symmetric else np.clip(np.round(-low / scales[g]), 1, top)
    stored = torch.from_numpy(scales).to(case.scales)
    scales = stored.float().numpy()
    n = np.clip(np.round(w_KN / scales[g_idx]) + zeros[g_idx], 0, top).astype(np.int64)
    n[0, 0] = 0  # at 8 bits: -128
    z = zeros - (case.form == "gptq")
    if case.method == "gptq":
        q = [[word([n[row + i, o] for i in range(per)], case.bits) for o in range(outputs)] for row in range(0, inputs, per)]
        qz = [[word([z[g, o + i] for i in range(per)], case.bits) for o in range(0, outputs, per)] for g in range(groups)]
    else:
        order = (0, 2, 4, 6, 1, 3, 5, 7)
        q = [[word([n[row, o + i] for i in order], 4) for o in range(0, outputs, 8)] for row in range(inputs)]
        qz = [[word([z[g, o + i] for i in order], 4) for o in range(0, outputs, 8)] for g in range(groups)]
    tensors = {"qweight": torch.tensor(q, dtype=torch.int32), "qzeros": torch.tensor(qz, dtype=torch.int32), "scales": stored}
    if case.method == "gptq":
        tensors["g_idx"] = torch.from_numpy(g_idx.astype(np.int32))
    return tensors, scales[g_idx] * (n - zeros[g_idx]).astype(np.float32)


def written(folder: Path, case: Case, **config: Any) -> Decoder:
    """A folder of a random model as the hub has it, and that model with the weights that its numbers stand for."""
    draw, model = np.random.default_rng(0), Decoder(case.spec).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.from_numpy(draw.standard_normal(parameter.shape).astype(np.float32)) * 0.2 + (name.endswith("norm.weight")))
    save_model(folder, model.get_parameter, case.spec, Tokenizer.bytes_())
    plain, tensors = load_file(folder / "model.safetensors"), dict[str, torch.Tensor]()
    for name, value in plain.items():
        if value.ndim < 2 or any(part in name for part in ("embed", "lm_head", "wte", "wpe")):
            tensors[name] = value.half() if value.ndim == 2 else value
            plain[name] = tensors[name].float()
            continue
        turned = case.spec.family == "gpt2"
        parts, stands_for = quantised((value if turned else value.t()).numpy(), case, draw)
        tensors |= {f"{name.removesuffix('.weight')}.{part}": tensor.contiguous() for part, tensor in parts.items()}
        plain[name] = torch.from_numpy(np.ascontiguousarray(stands_for if turned else stands_for.T))
    save_file(plain, folder / "model.safetensors")
    decoded = open_checkpoint(folder)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(decoded.read(name))
    save_file(tensors, folder / "model.safetensors")
    about = {"quant_method": case.method, "bits": case.bits, "group_size": case.group, "desc_act": case.act_order}
    about |= {"checkpoint_format": case.form} if case.method == "gptq" else {"version": case.form, "zero_point": True}
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": about | config}))
    return model


def changed(folder: Path, **tensors: torch.Tensor | None) -> None:
    held = load_file(folder / "model.safetensors") | {name.replace("__", "."): value for name, value in tensors.items()}
    save_file({name: value for name, value in held.items() if value is not None}, folder / "model.safetensors")


def serving(folder: Path, **keys: Any) -> NativeDecoder:
    model, _, backend = load_to_serve(folder, Job.load(serve=keys).serve, "cpu")
    assert isinstance(model, NativeDecoder), backend
    return model


@pytest.mark.parametrize("name", [*CASES, "gptq, by activation"])
def test_read_is_the_matrix_that_the_numbers_stand_for(name: str, tmp_path: Path) -> None:
    model = written(tmp_path / "m", CASES.get(name, Case(act_order=True)))
    loaded, _, _ = load_model(tmp_path / "m", "cpu")
    for path, parameter in loaded.named_parameters():
        assert torch.equal(parameter, model.get_parameter(path)), path
    with torch.inference_mode():
        assert torch.equal(loaded(TOKENS), model(TOKENS))


@needs_native
@pytest.mark.parametrize("name", CASES)
def test_the_native_runner_runs_the_numbers_as_they_are(name: str, tmp_path: Path) -> None:
    """Every product decodes to exactly the file's matrix; with fp32 rows it is that product, with int8 rows logits stay near; bytes are the plan's."""
    case = CASES[name]
    model, small = written(tmp_path / "m", case), serving(tmp_path / "m")
    for matrix in matrices(case.spec):
        if matrix.slot == "embed":
            continue
        weight, int8 = small.plan.products[matrix.layer, matrix.slot]
        whole = torch.cat([model.get_parameter(part) for part in matrix.parts]).detach()
        quantised = matrix.layer is not None
        assert (weight.format, int8) == (("w8" if case.bits == 8 else "q4", True) if quantised else ("f16", False))
        assert torch.equal((codecs if quantised else float_codecs).decode(weight), whole)
        x = torch.randn(5, weight.inputs, generator=torch.Generator().manual_seed(2))
        torch.testing.assert_close(packed.linear(x, weight, activations="fp32"), x @ whole.t(), atol=1e-4, rtol=1e-4)
    with torch.inference_mode():
        want, got = model(TOKENS), small(TOKENS)
    assert float((got - want).norm() / want.norm()) < 0.05, "int8 rows"
    checkpoint = open_checkpoint(tmp_path / "m")
    plan = native_bytes(case.spec, "file", checkpoint.layout)
    assert (plan.bytes, plan.narrow) == (held(small), small.narrow) and sum(plan.formats.values()) == small.bytes


@needs_native
@pytest.mark.parametrize("weights", ["fp32", "fp16", "w8", "q4", "nf4", "fp8", "fp8_rows"])
@pytest.mark.parametrize("policy", ["full", "sinks:4+28"])
def test_planned_bytes_of_every_storage(weights: str, policy: str, tmp_path: Path) -> None:
    written(tmp_path / "m", CASES["gptq of gpt2" if policy == "full" else "gptq"])
    small, checkpoint = serving(tmp_path / "m", weights=weights, policy=policy), open_checkpoint(tmp_path / "m")
    plan = native_bytes(checkpoint.spec, weights, checkpoint.layout, on_read=policy != "full")
    assert (plan.bytes, plan.narrow) == (held(small), small.narrow)


@needs_native
def test_every_verb_takes_such_a_folder(tmp_path: Path) -> None:
    model = written(tmp_path / "m", Case(method="awq", form="gemm"))
    folder, run = str(tmp_path / "m"), CliRunner()

    def call(*words: str) -> Any:
        result = run.invoke(application(), [*words, "--json"])
        assert result.exit_code == 0, result.output
        return json.loads(result.output[result.output.index("{") : result.output.rindex("}") + 1])

    said = call("serve", folder, "--dry-run", "serve.kv_tokens=64")
    assert said["weights"] == held(serving(tmp_path / "m")) and said["stored"].startswith(("q4", "f16")) and "as in the file" in said["stored"]
    assert call("plan", f"model={folder}", "data.sequence=32")["fits"]
    assert call("plan", f"model={folder}", "--serve", "1", "--context", "32")["terms"]["parameters"]["bytes"] == said["weights"]
    text = tmp_path / "text.txt"
    text.write_text("Gulliver woke and could not stir. " * 40)
    settings: dict[str, Any] = {"path": str(text), "window": 32, "limit": 4}
    as_stored = call("eval", folder, *(f"eval.{key}={value}" for key, value in settings.items()), "serve.runner=native")
    plain = api.LanguageModel(model, Tokenizer.bytes_())
    want = api.evaluate(plain, **settings)["perplexity"].perplexity  # type: ignore[union-attr]
    assert as_stored["results"][0]["perplexity"] == pytest.approx(want, rel=0.02)
    assert api.evaluate(folder, **settings)["perplexity"].perplexity == pytest.approx(want, rel=1e-6)  # type: ignore[union-attr]
    assert "Gulliver" not in api.load(folder, runner="native").generate("Gulliver", max_tokens=3, ignore_eos=True)


@needs_native
@pytest.mark.parametrize(
    ("case", "what", "fix"),
    [
        (Case(act_order=True), "grouped by activation", "serve.weights=fp16"),
        (Case(group=16), "groups of 16 inputs", "serve.weights=fp16"),
        (Case(bits=8), "offsets at 8 bits", "serve.weights=fp16"),
    ],
)
def test_what_no_kernel_reads_is_said_and_can_be_decoded(case: Case, what: str, fix: str, tmp_path: Path) -> None:
    model = written(tmp_path / "m", case)
    with pytest.raises(UserError, match=what) as caught:
        serving(tmp_path / "m")
    assert caught.value.fix == fix
    if what != "offsets at 8 bits":  # those are numbers of the file, which a plan does not read
        with pytest.raises(UserError, match=what):
            native_bytes(case.spec, "file", open_checkpoint(tmp_path / "m").layout)
    with torch.inference_mode():
        torch.testing.assert_close(serving(tmp_path / "m", weights="fp32")(TOKENS), model(TOKENS), atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize(
    ("config", "what", "why"),
    [
        ({"quant_method": "bitsandbytes"}, "quant_method='bitsandbytes'", "gptq and awq"),
        ({"bits": 3}, "bits=3", "4 and 8"),
        ({"checkpoint_format": "marlin"}, "layout 'marlin'", "gptq, gptq_v2"),
        ({"quant_method": "awq", "version": "gemv"}, "layout 'gemv'", "gemm"),
        ({"quant_method": "awq", "bits": 8}, "awq with bits=8", "4 bits"),
    ],
)
def test_what_is_not_read_is_named(config: dict[str, Any], what: str, why: str, tmp_path: Path) -> None:
    written(tmp_path / "m", Case(), **config)
    with pytest.raises(UserError, match=what) as caught:
        open_checkpoint(tmp_path / "m")
    assert why in str(caught.value.why)


def test_damaged_parts_are_named(tmp_path: Path) -> None:
    written(tmp_path / "m", Case())
    first = "model__layers__0__self_attn__q_proj__"
    whole = load_file(tmp_path / "m" / "model.safetensors")
    for part, value, what in (
        ("qzeros", None, "lacks qzeros"),
        ("qweight", torch.zeros(4, 64, dtype=torch.int32), r"has 2 bits"),
        ("scales", torch.zeros(2, 32, dtype=torch.float16), r"scales` is F16 \[2, 32\]"),
        ("qzeros", torch.zeros(2, 8), r"qzeros` is F32"),
        ("g_idx", torch.zeros(8, dtype=torch.int32), r"g_idx` is I32 \[8\]"),
        ("bias", torch.ones(64), "is not zero"),
        ("weight", torch.zeros(64, 64), "unexpected"),
    ):
        changed(tmp_path / "m", **{first + part: value})
        with pytest.raises(UserError, match=what):
            open_checkpoint(tmp_path / "m")
        save_file(whole, tmp_path / "m" / "model.safetensors")
    changed(tmp_path / "m", **{first + "bias": torch.zeros(64)})
    assert open_checkpoint(tmp_path / "m").layout("layers.0.attn.q_proj.weight") is not None, "AutoGPTQ's zeros where a Llama has no bias"
