"""From GGUF's words to ours: metadata -> DecoderSpec, tensor names -> canonical names, and the one change of layout.

RoPE rotates pairs of dimensions. Hugging Face (and this house) pairs d with d + D/2, llama.cpp's `llama` graph pairs 2d
with 2d + 1, so its converter permutes the rows of q and k; `unpermute` undoes that. Qwen and GPT-2 files are stored as
they were. Reading a permuted file without undoing it gives fluent nonsense: NLL 5.89 instead of 3.2 on the default model.

Llama 3 keeps its RoPE scaling as a tensor of divisors, `rope_freqs.weight`: it is compared with the published rule and
refused when it follows another one. Options that would change the numbers are refused by name.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lilliput.base.errors import UserError
from lilliput.models.families import Transform
from lilliput.models.gguf import Header, read
from lilliput.models.spec import DecoderSpec, Rope

if TYPE_CHECKING:
    import numpy as np

ARCHITECTURES = ("llama", "qwen2", "qwen3", "gpt2")
TOP = {"embed": "token_embd", "positions": "position_embd", "norm": "output_norm", "head": "output"}
BLOCK = {"input_norm": "attn_norm", "mlp_norm": "ffn_norm", "attn.q_proj": "attn_q", "attn.k_proj": "attn_k", "attn.v_proj": "attn_v",
         "attn.o_proj": "attn_output", "attn.q_norm": "attn_q_norm", "attn.k_norm": "attn_k_norm",
         "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}  # fmt: skip
FUSED = {"attn.q_proj": 0, "attn.k_proj": 1, "attn.v_proj": 2}  # GPT-2's attn_qkv
FREQUENCIES = "rope_freqs.weight"
# Key after the architecture -> values that change nothing; anything else is refused.
HARMLESS: dict[str, tuple[Any, ...]] = {
    "expert_count": (0,), "logit_scale": (1.0,), "residual_scale": (1.0,), "embedding_scale": (1.0,), "attention.scale": (), "attention.clamp_kqv": (0.0,),
    "attention.max_alibi_bias": (0.0,), "attention.causal": (True,), "attn_logit_softcapping": (0.0,), "final_logit_softcapping": (0.0,),
    "rope.freq_base_swa": (), "rope.dimension_sections": (), "attention.sliding_window_pattern": (), "use_parallel_residual": (False,),
    "rope.scaling.yarn_log_multiplier": (0.0,)}  # fmt: skip


def spec_from_gguf(header: Header) -> DecoderSpec:
    """The spec that the metadata and the tensor shapes state. UserError for an architecture or option not built here, by name."""
    architecture = header.metadata.get("general.architecture")
    if architecture not in ARCHITECTURES:
        raise UserError(f"unsupported GGUF architecture `{architecture}`", f"{header.path} names it as general.architecture",
                        f"choose a model of: {', '.join(ARCHITECTURES)} (Mistral and SmolLM2 are `llama`)")
    keys = _Keys(header.path, header.metadata, architecture)
    for key, harmless in HARMLESS.items():
        value = keys.get(key)
        if value is not None and value not in harmless:
            raise UserError(f"GGUF option `{architecture}.{key}={value!r}` is not supported", "it would change the numbers", "choose a model without it")
    dim, heads, layers = keys.whole("embedding_length"), keys.whole("attention.head_count"), keys.whole("block_count")
    head_dim = keys.whole("attention.key_length", dim // heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if architecture != "gpt2" and keys.whole(key, head_dim) != head_dim:
            raise UserError(f"GGUF option `{architecture}.{key}={keys.get(key)}` is not supported", f"it must equal the head size {head_dim}",
                            "choose another model")
    names = header.tensors
    if "token_embd.weight" not in names or layers > len(names):  # and no names are made for a billion layers
        lacks = f"its {len(names)} tensors cannot hold {layers:,} layers" if "token_embd.weight" in names else "it has no tensor `token_embd.weight`"
        raise UserError(f"{header.path} is not a whole model", lacks, "download it again")
    window = keys.whole("attention.sliding_window", 0) or None
    if window and architecture != "llama":
        raise UserError(f"GGUF option `{architecture}.attention.sliding_window={window}` is not supported", "the file does not say in which layers",
                        "use the model's safetensors folder")
    gpt2 = architecture == "gpt2"
    return DecoderSpec(
        family="mistral" if window else architecture, vocab=names["token_embd.weight"].shape[0], dim=dim, layers=layers, heads=heads,
        kv_heads=keys.whole("attention.head_count_kv", heads), head_dim=head_dim, ffn=keys.whole("feed_forward_length"), context=keys.whole("context_length"),
        norm="layer" if gpt2 else "rms", norm_eps=_short(keys.number("attention.layer_norm_epsilon" if gpt2 else "attention.layer_norm_rms_epsilon")),
        positions="learned" if gpt2 else "rope", rope=Rope() if gpt2 else _rope(header, keys, head_dim), activation="gelu_tanh" if gpt2 else "swiglu",
        qkv_bias="blk.0.attn_q.bias" in names or "blk.0.attn_qkv.bias" in names, o_bias="blk.0.attn_output.bias" in names,
        mlp_bias="blk.0.ffn_up.bias" in names, qk_norm="blk.0.attn_q_norm.weight" in names, tied=_tied(header), window=window, **_ids(header))  # fmt: skip


def names(spec: DecoderSpec) -> dict[str, tuple[str, Transform]]:
    """Canonical name -> (name in the file, transform as in models.families: what the file's shape must be)."""
    out: dict[str, tuple[str, Transform]] = {}
    for name in spec.shapes():
        module, _, kind = name.rpartition(".")
        if module in TOP:
            out[name] = (f"{TOP[module]}.{kind}", "same")
            continue
        _, layer, rest = module.split(".", 2)
        fused = spec.family == "gpt2" and rest in FUSED
        out[name] = (f"blk.{layer}.{'attn_qkv' if fused else BLOCK[rest]}.{kind}", ("slice", FUSED[rest], 3) if fused else "same")
    return out


def ignorable(header: Header, name: str) -> bool:
    """Whether a tensor of the file needs no place in the model: the RoPE divisors, and a head that repeats the embedding."""
    return name == FREQUENCIES or (name == "output.weight" and _tied(header))


def unpermute(rows: np.ndarray, heads: int) -> np.ndarray:
    """q or k rows [heads * D, ...] from pairs (2d, 2d + 1) to pairs (d, d + D/2). Undoes convert_hf_to_gguf's permute()."""
    split = rows.reshape(heads, rows.shape[0] // heads // 2, 2, *rows.shape[1:])
    return split.swapaxes(1, 2).reshape(rows.shape)


def permuted_heads(spec: DecoderSpec, name: str) -> int | None:
    """How many heads the rows of a canonical tensor are permuted by in a GGUF (or llama2.c) file; None when they are not."""
    if spec.family not in ("llama", "mistral"):
        return None
    return spec.heads if ".q_proj." in name else spec.kv_heads if ".k_proj." in name else None


class _Keys:
    """Metadata of one architecture, with the type that a key must have."""

    def __init__(self, path: Path, metadata: Mapping[str, Any], architecture: str) -> None:
        self.path, self.metadata, self.architecture = path, metadata, architecture

    def get(self, key: str) -> Any:
        value = self.metadata.get(f"{self.architecture}.{key}")
        if isinstance(value, list) and value and all(part == value[0] for part in value):
            return value[0]  # some converters repeat a number for every layer
        return value

    def whole(self, key: str, default: int | None = None) -> int:
        value = self.get(key)
        value = default if value is None else value
        if type(value) is not int or not 0 <= value < 1 << 31 or (value == 0 and default is None):
            raise self._wrong(key, value, "a whole number above 0")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value: Any = self.get(key)
        value = default if value is None else value
        if type(value) not in (int, float) or not 0 < value < math.inf:
            raise self._wrong(key, value, "a number above 0")
        return float(value)

    def _wrong(self, key: str, value: Any, wanted: str) -> UserError:
        shown = "the key is missing" if value is None else f"it is {str(value)[:40]!r}"
        return UserError(f"{self.path}: `{self.architecture}.{key}` must be {wanted}", shown, "download it again, or convert it with a current llama.cpp")


def _short(value: float) -> float:
    """The short decimal that a float32 was written from: 9.999999747378752e-06 -> 1e-05."""
    return float(f"{value:.7g}")


def _ids(header: Header) -> dict[str, Any]:
    ids = {name: header.metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos", "eot", "padding")}
    if wrong := [f"{name} = {value!r}" for name, value in ids.items() if value is not None and type(value) is not int]:
        raise UserError(f"{header.path}: a token id is not a number", ", ".join(wrong)[:100], "download it again")
    ends = tuple(dict.fromkeys(i for i in (ids["eos"], ids["eot"]) if i is not None))
    return {"bos_id": ids["bos"], "eos_ids": ends, "extra": {} if ids["padding"] is None else {"pad_token_id": ids["padding"]}}


def _tied(header: Header) -> bool:
    """No head of its own, or (older GPT-2 files) one whose bytes repeat the embedding's."""
    embed, head = header.tensors["token_embd.weight"], header.tensors.get("output.weight")
    if head is None:
        return True
    if header.metadata.get("general.architecture") != "gpt2" or embed[:2] != head[:2]:
        return False
    import numpy as np

    data = np.memmap(header.path, mode="r")
    return np.array_equal(data[embed.start : embed.end], data[head.start : head.end])


def _rope(header: Header, keys: _Keys, head_dim: int) -> Rope:
    theta = _short(keys.number("rope.freq_base", 10000.0))
    kind = keys.get("rope.scaling.type") or ("linear" if keys.get("rope.scale_linear") else "none")
    if FREQUENCIES in header.tensors:
        return _llama3(header, keys, theta, head_dim)
    if kind == "none":
        return Rope(theta)
    if kind == "linear":
        return Rope(theta, "linear", keys.number("rope.scaling.factor", keys.get("rope.scale_linear")))
    if kind != "yarn":
        raise UserError(f"RoPE scaling `{kind}` of this GGUF file is not supported", "built are linear, yarn and Llama 3's", "choose a model without it")
    factor = _short(keys.number("rope.scaling.factor"))
    attention = keys.number("rope.scaling.attn_factor", 1.0) * (0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0)  # ggml's rope_yarn: mscale
    return Rope(theta, "yarn", factor, keys.whole("rope.scaling.original_context_length"), beta_fast=keys.number("rope.scaling.yarn_beta_fast", 32.0),
                beta_slow=keys.number("rope.scaling.yarn_beta_slow", 1.0), attention_factor=attention)


def _llama3(header: Header, keys: _Keys, theta: float, head_dim: int) -> Rope:
    """The rule behind rope_freqs.weight [D/2], divisors of each pair's frequency: the largest is the factor."""
    import numpy as np

    found = read(header, FREQUENCIES).reshape(-1)
    original = keys.whole("rope.scaling.original_context_length", 8192)
    factor, low, high = float(found.max()), 1.0, 4.0
    turns = original / (2 * math.pi * theta ** (np.arange(found.size) / found.size))
    blend = np.clip((turns - low) / (high - low), 0, 1)
    if 2 * found.size != head_dim or not factor >= 1 or not np.allclose(found, 1 / ((1 - blend) / factor + blend), rtol=1e-4):
        why = f"the {found.size} divisors of {FREQUENCIES} do not follow Llama 3's rule (factor {factor:g}, {low:g} to {high:g} turns, {original:,} positions)"
        raise UserError(f"RoPE scaling of {header.path} is not supported", why, "use the model's safetensors folder")
    return Rope(theta, "llama3", _short(factor), original, low, high)
