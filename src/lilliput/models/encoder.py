"""A BERT-class encoder: token, position and type embeddings, post-norm blocks, an optional pooler over the first token.

`forward` runs padding-free (ops/varlen.py): rows are packed once after the embeddings and unpacked once at the end, so padding costs
nothing in between. On a CPU in fp32 without gradients the products run on packed panels with fused bias + GELU and bias + residual +
LayerNorm; elsewhere the same steps run in plain torch. `padded` is the textbook form, every padded row computed: the oracle, and the
other side of benchmarks/packed_vs_padded.py.

What is read: folders with a config.json of `model_type: bert` and safetensors weights. Names inside follow transformers' BertModel, so
no table maps them. Devlin et al. 2019, arXiv 1810.04805; Zhai et al. 2023 (ByteTransformer), arXiv 2210.03052.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lilliput.base import records
from lilliput.base.errors import UserError
from lilliput.models import safetensor
from lilliput.ops import float_codecs, fused, packed
from lilliput.ops.panels import PackedWeight
from lilliput.ops.varlen import Packing

GELUS = {"gelu": False, "gelu_new": True, "gelu_pytorch_tanh": True}  # name -> by tanh
REFUSED = {"position_embedding_type": "absolute", "is_decoder": False, "add_cross_attention": False}


@dataclass(frozen=True)
class EncoderSpec:
    """The shape of an encoder."""

    vocab: int
    dim: int
    layers: int
    heads: int
    ffn: int
    context: int = 512
    types: int = 2
    eps: float = 1e-12
    gelu_tanh: bool = False
    pooler: bool = True


def spec_from_hf(config: Mapping[str, Any]) -> EncoderSpec:
    """The spec of a parsed config.json. UserError for another model type or an option that is not built here."""
    if config.get("model_type") != "bert":
        raise UserError(f"unsupported encoder `{config.get('model_type')}`", "config.json names it as model_type", "choose a model of: bert")
    for option, harmless in REFUSED.items():
        if config.get(option, harmless) != harmless:
            raise UserError(f"this encoder's `{option}={config[option]!r}` is not built here", f"built is {harmless!r}", "choose another model")
    act = config.get("hidden_act", "gelu")
    if act not in GELUS:
        raise UserError(f"this encoder's `hidden_act={act!r}` is not built here", f"built are: {', '.join(GELUS)}", "choose another model")
    return EncoderSpec(
        vocab=config.get("vocab_size", 30522), dim=config.get("hidden_size", 768), layers=config.get("num_hidden_layers", 12),
        heads=config.get("num_attention_heads", 12), ffn=config.get("intermediate_size", 3072), context=config.get("max_position_embeddings", 512),
        types=config.get("type_vocab_size", 2), eps=config.get("layer_norm_eps", 1e-12), gelu_tanh=GELUS[act],
    )  # fmt: skip


class Block(nn.Module):
    """One post-norm block. Weights may be packed by `pack`; then the fused kernels run."""

    def __init__(self, spec: EncoderSpec) -> None:
        super().__init__()
        self.spec = spec
        self.qkv, self.out = nn.Linear(spec.dim, 3 * spec.dim), nn.Linear(spec.dim, spec.dim)
        self.up, self.down = nn.Linear(spec.dim, spec.ffn), nn.Linear(spec.ffn, spec.dim)
        self.norm_1, self.norm_2 = (nn.LayerNorm(spec.dim, spec.eps) for _ in range(2))
        self.panels: dict[str, PackedWeight] = {}

    def pack(self) -> None:
        """Store the four matrices in panels too; call again when weights change."""
        self.panels = {name: float_codecs.encode(getattr(self, name).weight.detach(), "f32") for name in ("qkv", "out", "up", "down")}

    def forward(self, x_RC: Tensor, packing: Packing) -> Tensor:
        """Packed rows in and out."""
        q, k, v = self._product("qkv", x_RC, bias=True).unflatten(-1, (3, self.spec.heads, -1)).unbind(1)
        attended = packing.attention(q, k, v).flatten(1)
        h = self._join("out", attended, x_RC, self.norm_1)
        up = fused.bias_gelu(self._product("up", h, bias=False), self.up.bias, tanh=self.spec.gelu_tanh)
        return self._join("down", up, h, self.norm_2)

    def padded(self, x_BSC: Tensor, mask_BS: Tensor) -> Tensor:
        """The same over padded rows, by plain torch."""
        q, k, v = self.qkv(x_BSC).unflatten(-1, (3, self.spec.heads, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask_BS[:, None, None].bool()).transpose(1, 2).flatten(2)
        h = self.norm_1(self.out(attended) + x_BSC)
        up = F.gelu(self.up(h), approximate="tanh" if self.spec.gelu_tanh else "none")
        return self.norm_2(self.down(up) + h)

    def _product(self, name: str, x: Tensor, bias: bool) -> Tensor:
        layer = getattr(self, name)
        if name in self.panels and not torch.is_grad_enabled() and packed.supports(x, self.panels[name]) is None:
            return packed.linear(x, self.panels[name], layer.bias if bias else None)
        return F.linear(x, layer.weight, layer.bias if bias else None)

    def _join(self, name: str, x: Tensor, residual: Tensor, norm: nn.LayerNorm) -> Tensor:
        return fused.residual_norm(self._product(name, x, bias=False), getattr(self, name).bias, residual, norm.weight, norm.bias, norm.eps)


class Encoder(nn.Module):
    """Embeddings, blocks, pooler. Weights are uninitialised until `init_weights` or `load_encoder` fills them."""

    def __init__(self, spec: EncoderSpec) -> None:
        super().__init__()
        self.spec = spec
        self.words, self.places = nn.Embedding(spec.vocab, spec.dim), nn.Embedding(spec.context, spec.dim)
        self.kinds, self.norm = nn.Embedding(spec.types, spec.dim), nn.LayerNorm(spec.dim, spec.eps)
        self.layers = nn.ModuleList(Block(spec) for _ in range(spec.layers))
        self.pooler = nn.Linear(spec.dim, spec.dim) if spec.pooler else None

    def pack(self) -> Encoder:
        """Put the matrices of all blocks in panels for the compiled products (as much memory again); returns itself."""
        for block in self.layers:
            block.pack()  # type: ignore[operator]
        return self

    def embed(self, tokens_BS: Tensor, kinds_BS: Tensor | None = None) -> Tensor:
        """Sum of the three embeddings, normed: [B, S, C]. UserError for more tokens than positions."""
        tokens = tokens_BS.shape[1]
        if tokens > self.spec.context:
            most = self.spec.context
            raise UserError(f"{tokens} tokens do not fit into this encoder", f"it has {most} positions", f"cut texts to {most} tokens")
        kinds_BS = torch.zeros_like(tokens_BS) if kinds_BS is None else kinds_BS
        return self.norm(self.words(tokens_BS) + self.places(torch.arange(tokens, device=tokens_BS.device)) + self.kinds(kinds_BS))

    def forward(self, tokens_BS: Tensor, mask_BS: Tensor | None = None, kinds_BS: Tensor | None = None) -> Tensor:
        """Hidden states [B, S, C] by packed rows, zeros where the mask is 0. mask: 1 = valid; None = all."""
        packing = Packing(torch.ones_like(tokens_BS) if mask_BS is None else mask_BS)
        rows = packing.pack(self.embed(tokens_BS, kinds_BS))
        for block in self.layers:
            rows = block(rows, packing)
        return packing.unpack(rows)

    def padded(self, tokens_BS: Tensor, mask_BS: Tensor | None = None, kinds_BS: Tensor | None = None) -> Tensor:
        """Hidden states [B, S, C] with every padded row computed; what stands where the mask is 0 means nothing."""
        mask = torch.ones_like(tokens_BS) if mask_BS is None else mask_BS
        h = self.embed(tokens_BS, kinds_BS)
        for block in self.layers:
            h = block.padded(h, mask)  # type: ignore[operator]
        return h

    def pooled(self, hidden_BSC: Tensor) -> Tensor:
        """tanh of a product of each first token [B, C], what sentence classifiers read. UserError without a pooler."""
        if self.pooler is None:
            raise UserError("this encoder has no pooler", "its checkpoint has no pooler weights", "use mean_pool")
        return torch.tanh(self.pooler(hidden_BSC[:, 0]))

    def init_weights(self, seed: int = 0, std: float = 0.02) -> Encoder:
        """Normal weights, zero biases, norms of one: BERT's own."""
        generator = torch.Generator().manual_seed(seed)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=std, generator=generator)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)
        return self


def mean_pool(hidden_BSC: Tensor, mask_BS: Tensor) -> Tensor:
    """The mean of each text's valid rows [B, C]; zeros for an empty one."""
    weight = (mask_BS != 0).to(hidden_BSC.dtype)[..., None]
    return (hidden_BSC * weight).sum(1) / weight.sum(1).clamp(min=1)


def load_encoder(folder: str | Path) -> Encoder:
    """Read an encoder from a folder as transformers writes it; packed for the compiled products, in evaluation mode.

    UserError for a missing file, another model type, or weights that are not the config's.
    """
    folder = Path(folder)
    config = records.read_json(folder / "config.json") if (folder / "config.json").is_file() else None
    if not isinstance(config, dict):
        raise UserError(f"{folder} has no config.json that is an object", "an encoder is a folder as transformers writes it", "check the path")
    stored = safetensor.shards(folder)
    prefix = "bert." if any(name.startswith("bert.") for name in stored) else ""  # models with a head on top
    spec = spec_from_hf(config)
    if f"{prefix}pooler.dense.weight" not in stored:
        spec = replace(spec, pooler=False)
    model = Encoder(spec)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            sources = [prefix + source for source in _sources(name)]
            if missing := [source for source in sources if source not in stored]:
                raise UserError(f"{folder} has no tensor {missing[0]}", "config.json says it should", "download the folder again")
            value = torch.cat([safetensor.read(stored[source][0], source).float() for source in sources])
            if value.shape != parameter.shape:
                why = f"it is {tuple(value.shape)}, config.json asks for {tuple(parameter.shape)}"
                raise UserError(f"{sources[0]} in {folder} has another shape", why, "download the folder again")
            parameter.copy_(value)
    return model.eval().requires_grad_(False).pack()


INNER = {"qkv": ("attention.self.query", "attention.self.key", "attention.self.value"), "out": ("attention.output.dense",), "up": ("intermediate.dense",),
         "down": ("output.dense",), "norm_1": ("attention.output.LayerNorm",), "norm_2": ("output.LayerNorm",)}
OUTER = {"words": "embeddings.word_embeddings", "places": "embeddings.position_embeddings", "kinds": "embeddings.token_type_embeddings",
         "norm": "embeddings.LayerNorm", "pooler": "pooler.dense"}


def _sources(name: str) -> list[str]:
    """transformers' names of one parameter; those of Q, K and V are stacked."""
    parts = name.split(".")
    if parts[0] != "layers":
        return [f"{OUTER[parts[0]]}.{parts[1]}"]
    return [f"encoder.layer.{parts[1]}.{source}.{parts[3]}" for source in INNER[parts[2]]]
