"""Small random models and engines for the tests of serve/."""

from __future__ import annotations

import random

import torch

from lilliput.data.tokenizer import Tokenizer
from lilliput.models.decoder import Decoder
from lilliput.models.spec import DecoderSpec, Rope
from lilliput.serve.engine import Engine
from lilliput.serve.request import Sampling
from lilliput.serve.scheduler import Chunk

LAYERNORM = dict(norm="layer", positions="learned", qkv_bias=True, o_bias=True, mlp_bias=True, tied=True)
SPECS = {
    "llama": DecoderSpec("llama", 259, 48, 3, 6, 2, 8, 96, 128, rope=Rope(10000.0), tied=True),
    "gpt2": DecoderSpec("gpt2", 259, 48, 2, 4, 4, 12, 192, 128, activation="gelu_tanh", **LAYERNORM),  # type: ignore[arg-type]
    "opt": DecoderSpec("opt", 259, 48, 2, 4, 4, 12, 96, 128, activation="relu", **LAYERNORM),  # type: ignore[arg-type]
    "qwen3": DecoderSpec("qwen3", 259, 48, 2, 4, 2, 16, 96, 128, qk_norm=True, norm_eps=1e-6),
    "mistral": DecoderSpec("mistral", 259, 48, 2, 4, 2, 12, 96, 128, window=10),
}
GREEDY = Sampling(max_tokens=24, ignore_eos=True)


def model_of(family: str, seed: int = 0) -> Decoder:
    """A random model whose logits spread far enough for a greedy answer to vary."""
    model = Decoder(SPECS[family])
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm.weight" in name else 0.0, 0.15, generator=generator)
    return model.eval()


def prompts_of(count: int, seed: int = 1) -> list[list[int]]:
    draw = random.Random(seed)
    return [[draw.randrange(256) for _ in range(draw.randrange(1, 60))] for _ in range(count)]


def engine_of(model: Decoder, **settings: object) -> Engine:
    return Engine(model, Tokenizer.bytes_(), **({"kv_tokens": 1024} | settings))  # type: ignore[arg-type]


class Dice:
    """A runner without a model: logits that depend on the sequence and the position alone."""

    def forward(self, sequences: list[tuple[Chunk, list[int]]]) -> torch.Tensor:
        wanted = [(chunk.id, position) for chunk, _ in sequences for position in range(chunk.stop - chunk.wants, chunk.stop)]
        rows = [torch.randn(259, generator=torch.Generator().manual_seed(1000 * id + position + 1)) for id, position in wanted]
        return torch.stack(rows) if rows else torch.empty(0, 259)
