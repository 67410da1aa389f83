"""Every family against transformers: the same random weights give the same logits, configs and names go both ways."""

from __future__ import annotations

import logging
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch

from lilliput.base.errors import UserError
from lilliput.models.decoder import Decoder
from lilliput.models.families import checkpoint_names, from_canonical, hf_from_spec, spec_from_hf, stored_shape, to_canonical
from lilliput.models.sizes import PRESETS
from lilliput.models.spec import DecoderSpec, Rope

LLAMA = {"model_type": "llama", "vocab_size": 97, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 4,
         "num_key_value_heads": 2, "max_position_embeddings": 64, "rms_norm_eps": 1e-5}
GPT2 = {"model_type": "gpt2", "vocab_size": 97, "n_embd": 48, "n_layer": 3, "n_head": 4, "n_positions": 64, "resid_pdrop": 0.0, "embd_pdrop": 0.0,
        "attn_pdrop": 0.0, "bos_token_id": 1, "eos_token_id": 2}
OPT = {"model_type": "opt", "vocab_size": 97, "hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "ffn_dim": 96, "dropout": 0.0,
       "max_position_embeddings": 64, "word_embed_proj_dim": 48}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
QWEN2, QWEN3 = LLAMA | {"model_type": "qwen2"}, LLAMA | {"model_type": "qwen3", "head_dim": 16}
WINDOW = {"use_sliding_window": True, "sliding_window": 8}
CASES: dict[str, dict[str, Any]] = {
    "llama": LLAMA,
    "llama tied biased mha": LLAMA | {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True, "num_key_value_heads": None},
    "llama mqa head_dim": LLAMA | {"num_key_value_heads": 1, "head_dim": 8},
    "smollm": LLAMA | {"tie_word_embeddings": True, "rope_theta": 100000.0, "num_attention_heads": 3, "num_key_value_heads": 1, "eos_token_id": [2, 3]},
    "llama linear": LLAMA | {"rope_scaling": {"type": "linear", "factor": 4.0}},
    "llama llama3": LLAMA | {"rope_scaling": LLAMA3, "rope_theta": 500000.0},
    "llama llama3 new style": LLAMA | {"rope_parameters": LLAMA3 | {"rope_theta": 500000.0}},
    "llama yarn": LLAMA | {"rope_scaling": YARN},
    "llama yarn mscale": LLAMA | {"rope_scaling": YARN | {"mscale": 0.7, "mscale_all_dim": 1.3, "beta_fast": 16.0, "beta_slow": 2.0, "truncate": False}},
    "llama yarn attention": LLAMA | {"rope_scaling": YARN | {"attention_factor": 1.25}},
    "mistral": LLAMA | {"model_type": "mistral", "sliding_window": 8},
    "mistral no window": LLAMA | {"model_type": "mistral", "sliding_window": None},
    "qwen2": QWEN2,
    "qwen2 windows": QWEN2 | WINDOW | {"max_window_layers": 1},
    "qwen2 all windows yarn": QWEN2 | WINDOW | {"max_window_layers": 0, "rope_scaling": YARN},
    "qwen3": QWEN3,
    "qwen3 biased layer types": QWEN3 | WINDOW | {"attention_bias": True, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    "gpt2": GPT2,
    "gpt2 relu untied": GPT2 | {"activation_function": "relu", "tie_word_embeddings": False, "n_inner": 64},
    "gpt2 gelu": GPT2 | {"activation_function": "gelu"},
    "opt": OPT,
    "opt 350m": OPT | {"do_layer_norm_before": False, "word_embed_proj_dim": 24},
    "opt no bias": OPT | {"enable_bias": False},
    "opt gelu projected": OPT | {"activation_function": "gelu", "word_embed_proj_dim": 24},
}


@pytest.fixture(autouse=True)
def quiet() -> Any:
    """transformers warns about small configurations."""
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


def oracle(config: dict[str, Any], seed: int = 0) -> Any:
    """transformers' model of a config.json, with weights large enough that every part shows in the logits."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    config = dict(config)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(config.pop("model_type"), **config), attn_implementation="eager").eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name or ".ln_" in name else 0.0, 0.15)
    return model


def ours(spec: DecoderSpec, state: dict[str, torch.Tensor]) -> Decoder:
    """Our model of a spec with the weights of a transformers state dict."""
    model = Decoder(spec).eval()
    with torch.no_grad():
        for name, (stored, transform) in checkpoint_names(spec).items():
            tensor = state[stored[0]]
            target = model.get_parameter(name)
            assert tensor.shape == stored_shape(transform, tuple(target.shape)), name
            target.copy_(to_canonical(transform, tensor))
    return model


@pytest.mark.parametrize("case", CASES)
def test_logits_are_transformers_logits(case: str) -> None:
    theirs = oracle(CASES[case])
    model = ours(spec_from_hf(CASES[case]), theirs.state_dict())
    tokens = torch.randint(4, 97, (2, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected, got = theirs(tokens).logits, model(tokens)
    assert expected.std() > 0.3
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("case", CASES)
def test_what_we_write_is_what_transformers_reads(case: str) -> None:
    theirs = oracle(CASES[case])
    state = theirs.state_dict()
    spec = spec_from_hf(CASES[case])
    assert spec_from_hf(theirs.config.to_dict()) == replace(spec, extra=spec_from_hf(theirs.config.to_dict()).extra), "transformers 5's own config.json"
    config = hf_from_spec(spec)
    assert spec_from_hf(config) == spec
    written = dict(from_canonical(spec, ours(spec, state).get_parameter))
    for name, tensor in written.items():
        assert tensor.is_contiguous()
        skipped = 2 if "embed_positions" in name else 0
        assert torch.equal(tensor[skipped:], state[name][skipped:]), name
    again = oracle(config, seed=1)
    missing, unexpected = again.load_state_dict(written, strict=False)
    assert not unexpected and all(name == "lm_head.weight" and spec.tied for name in missing)
    tokens = torch.arange(4, 40).unsqueeze(0)
    with torch.no_grad():
        torch.testing.assert_close(again(tokens).logits, theirs(tokens).logits, atol=1e-5, rtol=0)


def test_windows_change_the_logits() -> None:
    """The window cases above would pass with windows ignored on both sides only if windows did nothing."""
    config = CASES["mistral"]
    model = ours(spec_from_hf(config), oracle(config).state_dict())
    tokens = torch.arange(4, 44).unsqueeze(0)
    with torch.no_grad():
        narrow = model(tokens)
        wide = ours(replace(model.spec, window=None), oracle(config).state_dict())(tokens)
    assert torch.equal(narrow[:, :8], wide[:, :8]) or (narrow[:, :8] - wide[:, :8]).abs().max() < 1e-5
    assert (narrow[:, 12:] - wide[:, 12:]).abs().max() > 0.01


@pytest.mark.parametrize(("option", "config"), [
    ("dynamic", LLAMA | {"rope_scaling": {"type": "dynamic", "factor": 2.0}}),
    ("longrope", LLAMA | {"rope_scaling": {"rope_type": "longrope", "factor": 2.0, "long_factor": [1.0], "short_factor": [1.0]}}),
    ("mrope", LLAMA | {"rope_scaling": {"rope_type": "mrope", "mrope_section": [1, 2, 3]}}),
    ("rope_parameters", LLAMA | {"rope_parameters": {"full_attention": {"rope_type": "default"}, "sliding_attention": {"rope_type": "default"}}}),
    ("partial_rotary_factor", LLAMA | {"partial_rotary_factor": 0.5}),
    ("partial_rotary_factor", LLAMA | {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}),
    ("attn_logit_softcapping", LLAMA | {"attn_logit_softcapping": 50.0}),
    ("clip_qkv", LLAMA | {"clip_qkv": 8.0}),
    ("quantization_config", LLAMA | {"quantization_config": {"quant_method": "gptq"}}),
    ("hidden_act", LLAMA | {"hidden_act": "gelu"}),
    ("layer_types", LLAMA | {"layer_types": ["sliding_attention"] * 3}),
    ("layer_types", QWEN2 | {"layer_types": ["chunked_attention"] * 3}),
    ("layer_types", QWEN2 | {"layer_types": ["sliding_attention"] * 3}),
    ("attention_bias", LLAMA | {"model_type": "mistral", "attention_bias": True}),
    ("mlp_bias", QWEN2 | {"mlp_bias": True}),
    ("scale_attn_by_inverse_layer_idx", GPT2 | {"scale_attn_by_inverse_layer_idx": True}),
    ("reorder_and_upcast_attn", GPT2 | {"reorder_and_upcast_attn": True}),
    ("scale_attn_weights", GPT2 | {"scale_attn_weights": False}),
    ("activation_function", GPT2 | {"activation_function": "silu"}),
    ("_remove_final_layer_norm", OPT | {"_remove_final_layer_norm": True}),
    ("layer_norm_elementwise_affine", OPT | {"layer_norm_elementwise_affine": False}),
    ("gemma2", {"model_type": "gemma2"}),
    ("MambaForCausalLM", {"architectures": ["MambaForCausalLM"]}),
    ("num_hidden_layers", LLAMA | {"num_hidden_layers": "many"}),
    ("layers", LLAMA | {"num_hidden_layers": 0}),
    ("head_dim", LLAMA | {"head_dim": 7}),
    ("kv_heads", LLAMA | {"num_key_value_heads": 3}),
    ("factor", LLAMA | {"rope_scaling": {"type": "linear"}}),
])
def test_refusals_name_the_option(option: str, config: dict[str, Any]) -> None:
    with pytest.raises(UserError) as raised:
        spec_from_hf(config)
    assert option in str(raised.value)
    assert raised.value.fix


def test_absent_keys_take_transformers_defaults() -> None:
    from transformers import AutoConfig

    for family in ("llama", "mistral", "qwen2", "qwen3", "gpt2", "opt"):
        full = AutoConfig.for_model(family).to_dict()
        assert spec_from_hf({"model_type": family}) == replace(spec_from_hf(full), extra={}), family


def test_a_family_refuses_what_its_config_cannot_say() -> None:
    spec = spec_from_hf(LLAMA)
    for change, word in [({"qkv_bias": True}, "o_bias"), ({"qk_norm": True}, "qk_norm"), ({"window": 8}, "window"), ({"norm": "layer"}, "norm"),
                         ({"activation": "relu"}, "activation"), ({"positions": "learned"}, "positions")]:
        with pytest.raises(UserError, match="cannot express") as raised:
            hf_from_spec(replace(spec, **change))
        assert word in raised.value.why
    with pytest.raises(UserError, match="cannot express"):
        hf_from_spec(replace(spec_from_hf(GPT2), activation="swiglu"))


@pytest.mark.parametrize("name", PRESETS)
def test_presets_have_a_config(name: str) -> None:
    spec = PRESETS[name]
    assert spec_from_hf(hf_from_spec(spec)) == spec
    names = checkpoint_names(spec)
    assert list(names) == list(spec.shapes())
    shapes = spec.shapes()
    stored: dict[str, set[tuple[int, ...]]] = {}
    for canonical, (where, transform) in names.items():
        stored.setdefault(where[0], set()).add(stored_shape(transform, shapes[canonical]))
    assert all(len(shapes) == 1 for shapes in stored.values())


def test_older_names_are_accepted() -> None:
    assert checkpoint_names(PRESETS["gpt2"])["layers.3.attn.v_proj.bias"] == (("transformer.h.3.attn.c_attn.bias", "h.3.attn.c_attn.bias"), ("slice", 2, 3))
    assert checkpoint_names(PRESETS["opt-13b"])["layers.3.attn.o_proj.weight"][0][1] == "decoder.layers.3.self_attn.out_proj.weight"
    assert checkpoint_names(PRESETS["llama-7b"])["head.weight"] == (("lm_head.weight",), "same")


def test_yarn_factor_from_the_contexts() -> None:
    rope = spec_from_hf(LLAMA | {"rope_scaling": {"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 16}}).rope
    assert rope == Rope(10000.0, "yarn", 4.0, 16, attention_factor=pytest.approx(1.1386294))


def test_no_torch() -> None:
    code = "import sys; from lilliput.models import families, facts, sizes, spec; sizes.preset('gpt2'); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
