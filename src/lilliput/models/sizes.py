"""Presets: name -> DecoderSpec with random weights. For training from scratch and for planning models that need no download.

Published shapes give their published parameter counts (tested). Small ones of our own: gpt-nano is nanoGPT's CPU recipe
for tinyshakespeare, llama-3m the same task at 3 million parameters, tiny and tiny-draft the shapes of the two models that the package ships.
"""

from __future__ import annotations

from dataclasses import replace

from lilliput.base.errors import UserError, did_you_mean
from lilliput.models.spec import DecoderSpec, Rope


def _llama(vocab: int, dim: int, layers: int, heads: int, ffn: int, context: int, kv: int | None = None, **fields: object) -> DecoderSpec:
    return DecoderSpec("llama", vocab, dim, layers, heads, kv or heads, dim // heads, ffn, context, **fields)  # type: ignore[arg-type]


def _gpt(family: str, vocab: int, dim: int, layers: int, heads: int, context: int) -> DecoderSpec:
    return DecoderSpec(family, vocab, dim, layers, heads, heads, dim // heads, 4 * dim, context, norm="layer", positions="learned",
                       activation="relu" if family == "opt" else "gelu_tanh", qkv_bias=True, o_bias=True, mlp_bias=True, tied=True)


LLAMA3 = Rope(500000.0, "llama3", 32.0, 8192)  # Llama 3.2: 8192 tokens of context before scaling
PRESETS: dict[str, DecoderSpec] = {
    "tiny": _llama(1024, 96, 4, 4, 128, 256, kv=2, tied=True),
    "tiny-draft": _llama(1024, 48, 2, 2, 96, 256, kv=1, tied=True),
    "gpt-nano": _gpt("gpt2", 65, 128, 4, 4, 64),
    "llama-3m": _llama(65, 256, 4, 4, 640, 256),
    "smollm2-135m": _llama(49152, 576, 30, 9, 1536, 8192, kv=3, tied=True, rope=Rope(100000.0), bos_id=1, eos_ids=(2,)),
    "gpt2": replace(_gpt("gpt2", 50257, 768, 12, 12, 1024), bos_id=50256, eos_ids=(50256,)),
    "gpt2-xl": replace(_gpt("gpt2", 50257, 1600, 48, 25, 1024), bos_id=50256, eos_ids=(50256,)),
    "llama-1b": _llama(128256, 2048, 16, 32, 8192, 131072, kv=8, tied=True, rope=LLAMA3, bos_id=128000, eos_ids=(128001,)),
    "llama-7b": _llama(32000, 4096, 32, 32, 11008, 4096, bos_id=1, eos_ids=(2,)),
    "llama-13b": _llama(32000, 5120, 40, 40, 13824, 4096, bos_id=1, eos_ids=(2,)),
    "llama-70b": _llama(32000, 8192, 80, 64, 28672, 4096, kv=8, bos_id=1, eos_ids=(2,)),
    "opt-1.3b": replace(_gpt("opt", 50272, 2048, 24, 32, 2048), bos_id=2, eos_ids=(2,)),
    "opt-13b": replace(_gpt("opt", 50272, 5120, 40, 40, 2048), bos_id=2, eos_ids=(2,)),
    "opt-175b": replace(_gpt("opt", 50272, 12288, 96, 96, 2048), bos_id=2, eos_ids=(2,)),
    "gpt3-175b": _gpt("gpt2", 50257, 12288, 96, 96, 2048),
}


def preset(name: str) -> DecoderSpec:
    """The spec of a preset; UserError with the nearest name when there is none."""
    if name not in PRESETS:
        raise UserError(f"unknown preset `{name}`", fix=did_you_mean(name, PRESETS))
    return PRESETS[name]
