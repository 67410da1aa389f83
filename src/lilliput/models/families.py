"""Families: config.json <-> DecoderSpec, and checkpoint names <-> canonical names. No torch until a tensor is transformed.

What a family's config leaves out takes transformers' default. What would change the numbers and is not built here is a
UserError that names the option; nothing is ignored in silence. Written configs use `rope_theta` + `rope_scaling`, which
transformers 4 and 5 both read; read are these and transformers 5's `rope_parameters`.

A checkpoint tensor becomes a canonical one by a transform:
    "same"             as it is
    "transpose"        GPT-2 stores [in, out] (Conv1D)
    ("slice", i, n)    part i of n along the outputs: GPT-2's fused c_attn. ("slice", i, n, "transpose"): its matrix
    ("skip_rows", 2)   OPT's position table begins with 2 rows that no position reads (written back as zeros)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from lilliput.base.errors import UserError
from lilliput.models.spec import DecoderSpec, Rope

if TYPE_CHECKING:
    from torch import Tensor

Transform = str | tuple[Any, ...]
ARCHITECTURES = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM",
                 "gpt2": "GPT2LMHeadModel", "opt": "OPTForCausalLM"}
ACTIVATIONS = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "relu": "relu"}
# Option -> values that change nothing. Anything else is refused.
HARMLESS: dict[str, tuple[Any, ...]] = {
    "quantization_config": (None,), "attn_logit_softcapping": (None,), "final_logit_softcapping": (None,), "clip_qkv": (None,), "qk_layernorm": (None, False),
    "partial_rotary_factor": (None, 1.0), "rotary_pct": (None, 1.0), "scale_attn_by_inverse_layer_idx": (None, False), "reorder_and_upcast_attn": (None, False),
    "scale_attn_weights": (None, True), "add_cross_attention": (None, False), "is_encoder_decoder": (None, False), "_remove_final_layer_norm": (None, False),
    "layer_norm_elementwise_affine": (None, True), "num_local_experts": (None, 0), "pruned_heads": (None, {}), "logit_scale": (None, 1.0),
    "use_mrope": (None, False),
}
LLAMA_DEFAULTS = {"vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
                  "max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "hidden_act": "silu", "tie_word_embeddings": False,
                  "bos_token_id": 1, "eos_token_id": 2}
QWEN_DEFAULTS = LLAMA_DEFAULTS | {"vocab_size": 151936, "intermediate_size": 22016, "max_position_embeddings": 32768, "num_key_value_heads": 32,
                                  "sliding_window": 4096, "max_window_layers": 28, "bos_token_id": None, "eos_token_id": None}
DEFAULTS: dict[str, dict[str, Any]] = {  # transformers' own, of each configuration class
    "llama": LLAMA_DEFAULTS,
    "mistral": LLAMA_DEFAULTS | {"intermediate_size": 14336, "num_key_value_heads": 8, "max_position_embeddings": 4096 * 32, "sliding_window": 4096},
    "qwen2": QWEN_DEFAULTS,
    "qwen3": QWEN_DEFAULTS | {"head_dim": 128},
    "gpt2": {"vocab_size": 50257, "n_positions": 1024, "n_embd": 768, "n_layer": 12, "n_head": 12, "activation_function": "gelu_new",
             "layer_norm_epsilon": 1e-5, "tie_word_embeddings": True, "bos_token_id": 50256, "eos_token_id": 50256},
    "opt": {"vocab_size": 50272, "hidden_size": 768, "num_hidden_layers": 12, "ffn_dim": 3072, "max_position_embeddings": 2048, "num_attention_heads": 12,
            "activation_function": "relu", "do_layer_norm_before": True, "enable_bias": True, "tie_word_embeddings": True,
            "bos_token_id": 2, "eos_token_id": 2},
}
CARRIED = ("pad_token_id", "initializer_range", "init_std")


def spec_from_hf(config: Mapping[str, Any]) -> DecoderSpec:
    """The spec of a parsed config.json. UserError for an architecture or option that is not built here, by its name."""
    family = config.get("model_type", "")
    if family not in ARCHITECTURES:
        raise UserError(f"unsupported architecture `{family or (config.get('architectures') or ['?'])[0]}`", "config.json names it as model_type",
                        "lilliput.models.encoder.load_encoder(folder)" if family == "bert" else f"choose a model of: {', '.join(ARCHITECTURES)}")
    for option, harmless in HARMLESS.items():
        if option in config and config[option] not in harmless:
            _refuse(option, config[option], harmless)
    merged = DEFAULTS[family] | {key: value for key, value in config.items() if value is not None or key in NULLABLE}
    for key, default in DEFAULTS[family].items():
        wanted = (int, float) if isinstance(default, float) else type(default)
        if default is not None and key not in NULLABLE and (not isinstance(merged[key], wanted) or isinstance(merged[key], bool) != isinstance(default, bool)):
            why = f"wanted {type(default).__name__}, got {type(merged[key]).__name__}"
            raise UserError(f"config.json has `{key}={merged[key]!r}`", why, f"correct `{key}`")
    try:
        return (_gpt2 if family == "gpt2" else _opt if family == "opt" else _llama)(family, merged)
    except (TypeError, ValueError, AttributeError, KeyError, ZeroDivisionError) as error:
        raise UserError(f"config.json of a {family} model is malformed", f"{type(error).__name__}: {error}", "compare it with the published one") from error


NULLABLE = ("sliding_window", "bos_token_id", "eos_token_id")  # where null means "none" and not "default"


def _refuse(option: str, value: Any, supported: Any) -> None:
    wanted = supported[-1] if isinstance(supported, tuple) else supported
    raise UserError(f"config.json option `{option}={value!r}` is not supported", f"it would change the numbers; supported is {wanted!r}",
                    "choose a model without it")


def _ids(config: Mapping[str, Any]) -> dict[str, Any]:
    eos = config["eos_token_id"]
    return {"bos_id": config["bos_token_id"], "eos_ids": tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,),
            "extra": {key: config[key] for key in CARRIED if config.get(key) is not None}}


def _llama(family: str, c: Mapping[str, Any]) -> DecoderSpec:
    if c["hidden_act"] not in ("silu", "swish"):
        _refuse("hidden_act", c["hidden_act"], "silu")
    biased = bool(c.get("attention_bias"))
    if biased and family not in ("llama", "qwen3"):
        _refuse("attention_bias", True, False)
    if c.get("mlp_bias") and family != "llama":
        _refuse("mlp_bias", True, False)
    window, window_layers = _windows(family, c)
    heads = c["num_attention_heads"]
    return DecoderSpec(
        family=family, vocab=c["vocab_size"], dim=c["hidden_size"], layers=c["num_hidden_layers"], heads=heads,
        kv_heads=c.get("num_key_value_heads") or heads, head_dim=c.get("head_dim") or c["hidden_size"] // heads, ffn=c["intermediate_size"],
        context=c["max_position_embeddings"], norm_eps=float(c["rms_norm_eps"]), rope=_rope(c), qkv_bias=biased or family == "qwen2", o_bias=biased,
        mlp_bias=bool(c.get("mlp_bias")), qk_norm=family == "qwen3", tied=bool(c["tie_word_embeddings"]), window=window, window_layers=window_layers, **_ids(c))


def _windows(family: str, c: Mapping[str, Any]) -> tuple[int | None, tuple[bool, ...] | None]:
    kinds = c.get("layer_types")
    for kind in kinds or ():
        if kind not in ("full_attention", "sliding_attention"):
            _refuse("layer_types", kind, "full_attention, sliding_attention")
    window = c.get("sliding_window") if family == "mistral" or (family != "llama" and c.get("use_sliding_window")) else None
    if family in ("llama", "mistral"):
        if kinds and any((kind == "sliding_attention") != (window is not None) for kind in kinds):
            _refuse("layer_types", kinds, f"one kind in all layers of a {family} model")
        return window, None
    if window is None:
        if kinds and "sliding_attention" in kinds:
            _refuse("layer_types", kinds, "sliding_attention only with use_sliding_window=true")
        return None, None
    layers = c["num_hidden_layers"]
    flags = tuple(kind == "sliding_attention" for kind in kinds) if kinds else tuple(layer >= c["max_window_layers"] for layer in range(layers))
    return (window, None) if all(flags) else (window, flags) if any(flags) else (None, None)


def _rope(c: Mapping[str, Any]) -> Rope:
    given = dict(c.get("rope_scaling") or c.get("rope_parameters") or {})
    kind = given.get("rope_type") or given.get("type") or "default"
    theta = float(given.get("rope_theta") or c.get("rope_theta") or 10000.0)
    if any(isinstance(value, Mapping) for value in given.values()):
        _refuse("rope_parameters", sorted(given), "one set of parameters for all layers")
    if given.get("partial_rotary_factor", 1.0) not in (None, 1.0):
        _refuse("partial_rotary_factor", given["partial_rotary_factor"], 1.0)
    if kind == "default":
        return Rope(theta)
    if kind not in ("linear", "llama3", "yarn"):
        raise UserError(f"RoPE scaling `{kind}` is not supported", "it changes with the length of the sequence or per axis; built are linear, llama3, yarn",
                        "choose a model without it")
    if kind == "linear":
        return Rope(theta, "linear", float(given["factor"]))
    original = c.get("original_max_position_embeddings") or given.get("original_max_position_embeddings") or c["max_position_embeddings"]
    factor = float(given.get("factor") or c["max_position_embeddings"] / original)
    if kind == "llama3":
        return Rope(theta, "llama3", factor, original, float(given["low_freq_factor"]), float(given["high_freq_factor"]))
    return Rope(theta, "yarn", factor, original, beta_fast=float(given.get("beta_fast") or 32), beta_slow=float(given.get("beta_slow") or 1),
                truncate=bool(given.get("truncate", True)), attention_factor=_yarn_attention(given, factor))


def _yarn_attention(given: Mapping[str, Any], factor: float) -> float:
    def scale(by: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * by * math.log(factor) + 1.0

    if given.get("attention_factor") is not None:
        return float(given["attention_factor"])
    if given.get("mscale") and given.get("mscale_all_dim"):
        return scale(given["mscale"]) / scale(given["mscale_all_dim"])
    return scale(1)


def _activation(c: Mapping[str, Any]) -> Any:
    if c["activation_function"] not in ACTIVATIONS:
        _refuse("activation_function", c["activation_function"], " | ".join(ACTIVATIONS))
    return ACTIVATIONS[c["activation_function"]]


def _gpt2(family: str, c: Mapping[str, Any]) -> DecoderSpec:
    dim, heads = c["n_embd"], c["n_head"]
    return DecoderSpec(
        family=family, vocab=c["vocab_size"], dim=dim, layers=c["n_layer"], heads=heads, kv_heads=heads, head_dim=dim // heads, ffn=c.get("n_inner") or 4 * dim,
        context=c["n_positions"], norm="layer", norm_eps=float(c["layer_norm_epsilon"]), positions="learned", activation=_activation(c),
        qkv_bias=True, o_bias=True, mlp_bias=True, tied=bool(c["tie_word_embeddings"]), **_ids(c))


def _opt(family: str, c: Mapping[str, Any]) -> DecoderSpec:
    dim, heads, biased = c["hidden_size"], c["num_attention_heads"], bool(c["enable_bias"])
    wide = c.get("word_embed_proj_dim") or dim
    return DecoderSpec(
        family=family, vocab=c["vocab_size"], dim=dim, layers=c["num_hidden_layers"], heads=heads, kv_heads=heads, head_dim=dim // heads, ffn=c["ffn_dim"],
        context=c["max_position_embeddings"], norm="layer", norm_place="pre" if c["do_layer_norm_before"] else "post", positions="learned",
        activation=_activation(c), qkv_bias=biased, o_bias=biased, mlp_bias=biased, tied=bool(c["tie_word_embeddings"]),
        embed_dim=None if wide == dim else wide, **_ids(c))


def hf_from_spec(spec: DecoderSpec) -> dict[str, Any]:
    """The config.json of a spec, loadable by transformers. UserError when the family has no words for a field of the spec."""
    eos: Any = list(spec.eos_ids) if len(spec.eos_ids) > 1 else spec.eos_ids[0] if spec.eos_ids else None
    config = {"architectures": [ARCHITECTURES[spec.family]], "model_type": spec.family, "vocab_size": spec.vocab, "tie_word_embeddings": spec.tied,
              "bos_token_id": spec.bos_id, "eos_token_id": eos, **spec.extra}
    names = {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}
    if spec.family == "gpt2":
        config |= {"n_embd": spec.dim, "n_layer": spec.layers, "n_head": spec.heads, "n_inner": spec.ffn, "n_positions": spec.context,
                   "layer_norm_epsilon": spec.norm_eps, "activation_function": names.get(spec.activation)}
    elif spec.family == "opt":
        config |= {"hidden_size": spec.dim, "num_hidden_layers": spec.layers, "num_attention_heads": spec.heads, "ffn_dim": spec.ffn,
                   "max_position_embeddings": spec.context, "activation_function": names.get(spec.activation), "enable_bias": spec.mlp_bias,
                   "do_layer_norm_before": spec.norm_place == "pre", "word_embed_proj_dim": spec.embed_dim or spec.dim}
    else:
        config |= _llama_config(spec)
    try:
        back = spec_from_hf(config)
        compared = [name for name in DecoderSpec.__dataclass_fields__ if name not in ("extra", "window", "window_layers")]
        lost = [name for name in compared if getattr(back, name) != getattr(spec, name)]
        lost += ["window"] if any(back.window_of(layer) != spec.window_of(layer) for layer in range(spec.layers)) else []
    except UserError as error:
        lost = [error.what]
    if lost:
        why = f"it has no words for: {', '.join(lost)}"
        raise UserError(f"a {spec.family} config.json cannot express this model", why, "give the spec a family that has them")
    return config


def _llama_config(spec: DecoderSpec) -> dict[str, Any]:
    config: dict[str, Any] = {
        "hidden_size": spec.dim, "num_hidden_layers": spec.layers, "num_attention_heads": spec.heads, "num_key_value_heads": spec.kv_heads,
        "head_dim": spec.head_dim, "intermediate_size": spec.ffn, "max_position_embeddings": spec.context, "rms_norm_eps": spec.norm_eps, "hidden_act": "silu",
        "rope_theta": spec.rope.theta, "rope_scaling": _rope_config(spec.rope)}
    if spec.family in ("llama", "qwen3"):
        config["attention_bias"] = spec.qkv_bias
    if spec.family == "llama":
        return config | {"mlp_bias": spec.mlp_bias}
    windows = [spec.window_of(layer) is not None for layer in range(spec.layers)]
    config["sliding_window"] = spec.window if any(windows) else None
    if spec.family == "mistral":
        return config
    kinds = ["sliding_attention" if windowed else "full_attention" for windowed in windows]
    return config | {"use_sliding_window": any(windows), "layer_types": kinds, "max_window_layers": windows.index(True) if any(windows) else spec.layers}


def _rope_config(rope: Rope) -> dict[str, Any] | None:
    if rope.kind == "none":
        return None
    config: dict[str, Any] = {"rope_type": rope.kind, "factor": rope.factor}
    if rope.kind == "llama3":
        config |= {"low_freq_factor": rope.low_freq_factor, "high_freq_factor": rope.high_freq_factor}
    if rope.kind == "yarn":
        config |= {"beta_fast": rope.beta_fast, "beta_slow": rope.beta_slow, "attention_factor": rope.attention_factor, "truncate": rope.truncate}
    return config if rope.kind == "linear" else config | {"original_max_position_embeddings": rope.original_context}


# Canonical module (inside a block, or at the top) -> name in the checkpoint.
LLAMA_TOP = {"embed": "model.embed_tokens", "norm": "model.norm", "head": "lm_head"}
LLAMA_BLOCK = {"input_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm", "attn": "self_attn"}
GPT2_TOP = {"embed": "transformer.wte", "positions": "transformer.wpe", "norm": "transformer.ln_f", "head": "lm_head"}
GPT2_BLOCK = {"input_norm": "ln_1", "mlp_norm": "ln_2", "attn.o_proj": "attn.c_proj", "mlp.up_proj": "mlp.c_fc", "mlp.down_proj": "mlp.c_proj"}
OPT_TOP = {"embed": "model.decoder.embed_tokens", "positions": "model.decoder.embed_positions", "norm": "model.decoder.final_layer_norm",
           "project_in": "model.decoder.project_in", "project_out": "model.decoder.project_out", "head": "lm_head"}
OPT_BLOCK = {"input_norm": "self_attn_layer_norm", "mlp_norm": "final_layer_norm", "attn.o_proj": "self_attn.out_proj", "attn": "self_attn",
             "mlp.up_proj": "fc1", "mlp.down_proj": "fc2"}


def checkpoint_names(spec: DecoderSpec) -> dict[str, tuple[tuple[str, ...], Transform]]:
    """Canonical name -> (names in checkpoints, transform). The first name is written; the others are also accepted
    (the hub's older GPT-2 and OPT files lack the leading `transformer.` or `model.`)."""
    if spec.family == "gpt2":
        top, inner, blocks = GPT2_TOP, GPT2_BLOCK, "transformer.h"
    elif spec.family == "opt":
        top, inner, blocks = OPT_TOP, OPT_BLOCK, "model.decoder.layers"
    else:
        top, inner, blocks = LLAMA_TOP, LLAMA_BLOCK, "model.layers"
    out: dict[str, tuple[tuple[str, ...], Transform]] = {}
    for name in spec.shapes():
        module, _, kind = name.rpartition(".")
        transform: Transform = ("skip_rows", 2) if spec.family == "opt" and module == "positions" else "same"
        if module in top:
            full = f"{top[module]}.{kind}"
        else:
            _, layer, rest = module.split(".", 2)
            if spec.family == "gpt2":
                rest, transform = _fused(rest, kind)
            prefix = next((known for known in inner if rest == known or rest.startswith(known + ".")), "")
            full = f"{blocks}.{layer}.{inner[prefix] + rest[len(prefix):] if prefix else rest}.{kind}"
        short = full.partition(".")[2] if spec.family in ("gpt2", "opt") and module != "head" else ""
        out[name] = ((full, short) if short else (full,), transform)
    return out


def _fused(module: str, kind: str) -> tuple[str, Transform]:
    """GPT-2 keeps q, k and v in one Conv1D, and every matrix of a block transposed."""
    parts = {"attn.q_proj": 0, "attn.k_proj": 1, "attn.v_proj": 2}
    if module in parts:
        return "attn.c_attn", ("slice", parts[module], 3, "transpose") if kind == "weight" else ("slice", parts[module], 3)
    return module, "transpose" if kind == "weight" and "proj" in module else "same"


def stored_shape(transform: Transform, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape in the checkpoint of a canonical tensor of this shape: what a file's header must say."""
    if isinstance(transform, str):
        return shape[::-1] if transform == "transpose" else shape
    if transform[0] == "skip_rows":
        return (shape[0] + transform[1], *shape[1:])
    whole = (shape[0] * transform[2], *shape[1:])
    return whole[::-1] if transform[-1] == "transpose" else whole


def to_canonical(transform: Transform, tensor: Any) -> Any:
    """A checkpoint's tensor (or array of rows) as the canonical one: a view, not always contiguous."""
    if isinstance(transform, str):
        return tensor.t() if transform == "transpose" else tensor
    if transform[0] == "skip_rows":
        return tensor[transform[1] :]
    whole = tensor.t() if transform[-1] == "transpose" else tensor
    each = whole.shape[0] // transform[2]
    return whole[transform[1] * each : (transform[1] + 1) * each]


def from_canonical(spec: DecoderSpec, read: Callable[[str], Tensor]) -> Iterator[tuple[str, Tensor]]:
    """(checkpoint name, contiguous tensor) of every tensor of the checkpoint, one at a time; `read` gives a canonical tensor by its name."""
    import torch

    for name, ((stored, *_), transform) in checkpoint_names(spec).items():
        if isinstance(transform, str):
            yield stored, (read(name).t() if transform == "transpose" else read(name)).contiguous()
        elif transform[0] == "skip_rows":
            rows = read(name)
            yield stored, torch.cat([rows.new_zeros(transform[1], rows.shape[1]), rows])
        elif transform[1] == 0:  # written when its first part comes; the names of the others differ in one letter
            whole = torch.cat([read(name.replace("q_proj", part)) for part in ("q_proj", "k_proj", "v_proj")])
            yield stored, whole.t().contiguous() if transform[-1] == "transpose" else whole
