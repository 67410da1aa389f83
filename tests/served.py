"""Small random models and engines for the tests of serve/."""

from __future__ import annotations

import random
import warnings
from typing import Any

import torch

from lilliput.data.tokenizer import Tokenizer
from lilliput.models.decoder import Decoder
from lilliput.models.families import from_canonical, hf_from_spec
from lilliput.models.spec import DecoderSpec, Rope
from lilliput.ops.panels import PackedWeight
from lilliput.serve.blocks import BlockPool
from lilliput.serve.engine import Engine
from lilliput.serve.request import Sampling
from lilliput.serve.scheduler import Chunk, Moves

LAYERNORM = dict(norm="layer", positions="learned", qkv_bias=True, o_bias=True, mlp_bias=True, tied=True)
SPECS = {
    "llama": DecoderSpec("llama", 259, 48, 3, 6, 2, 8, 96, 128, rope=Rope(10000.0), tied=True),
    "gpt2": DecoderSpec("gpt2", 259, 48, 2, 4, 4, 12, 192, 128, activation="gelu_tanh", **LAYERNORM),  # type: ignore[arg-type]
    "opt": DecoderSpec("opt", 259, 48, 2, 4, 4, 12, 96, 128, activation="relu", **LAYERNORM),  # type: ignore[arg-type]
    "qwen3": DecoderSpec("qwen3", 259, 48, 2, 4, 2, 16, 96, 128, qk_norm=True, norm_eps=1e-6),
    "mistral": DecoderSpec("mistral", 259, 48, 2, 4, 2, 12, 96, 128, window=10),
}
FAMILIES = tuple(SPECS)
SPECS["wide"] = DecoderSpec("llama", 259, 64, 2, 4, 2, 16, 96, 128)  # widths that 4-bit groups divide
GREEDY = Sampling(max_tokens=24, ignore_eos=True)


def model_of(family: str, seed: int = 0) -> Decoder:
    """A random model whose logits spread far enough for a greedy answer to vary."""
    model = Decoder(SPECS[family])
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm.weight" in name else 0.0, 0.15, generator=generator)
    return model.eval()


def held(model: Any) -> int:
    """Bytes of all that a native decoder's plan points into."""
    parts = {id(part): part for part in model.plan._held}.values()
    return sum(part.bytes if isinstance(part, PackedWeight) else part.nbytes for part in parts)


def prompts_of(count: int, seed: int = 1) -> list[list[int]]:
    draw = random.Random(seed)
    return [[draw.randrange(256) for _ in range(draw.randrange(1, 60))] for _ in range(count)]


def engine_of(model: Decoder, **settings: object) -> Engine:
    return Engine(model, Tokenizer.bytes_(), **({"kv_tokens": 1024} | settings))  # type: ignore[arg-type]


def twin_of(model: Decoder) -> Any:
    """transformers' model with the same weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_config(AutoConfig.for_model(**hf_from_spec(model.spec)), attn_implementation="eager").eval()
    missing, unexpected = theirs.load_state_dict(dict(from_canonical(model.spec, model.get_parameter)), strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}
    theirs.tie_weights()
    return theirs


def oracle(model: Decoder, prompts: list[list[int]], new: int, penalty: float = 1.0) -> list[list[int]]:
    """transformers' greedy generate on the same weights, one prompt at a time."""
    from transformers import GenerationConfig

    theirs = twin_of(model)
    how = GenerationConfig(max_new_tokens=new, do_sample=False, eos_token_id=None, pad_token_id=0, repetition_penalty=penalty)
    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("ignore")
        return [theirs.generate(torch.tensor([p]), attention_mask=torch.ones(1, len(p)), generation_config=how)[0, len(p) :].tolist() for p in prompts]


class Dice:
    """A runner without a model: logits that depend on the sequence and the position alone."""

    def forward(self, chunks: list[Chunk], mass: object = None) -> torch.Tensor:
        wanted = [(chunk.id, position) for chunk in chunks for position in range(chunk.stop - chunk.wants, chunk.stop)]
        rows = [torch.randn(259, generator=torch.Generator().manual_seed(1000 * id + position + 1)) for id, position in wanted]
        return torch.stack(rows) if rows else torch.empty(0, 259)

    def move(self, moves: Moves) -> None:
        """It has no cache."""


def forget(pool: BlockPool) -> None:
    """Nothing that was computed can be found any more."""
    for block in pool._index.values():
        pool._key[block] = None
    pool._index.clear()
