"""DecoderSpec: the whole shape of a decoder in one frozen value. One class covers Llama, Mistral, Qwen2, Qwen3, GPT-2, OPT.

Everything else follows from it without torch: parameter names and shapes (`shapes`), memory and arithmetic (facts.py),
config.json (families.py). Names are canonical, the same for every family:

    embed.weight  positions.weight  project_in.weight
    layers.{i}.input_norm.*  layers.{i}.attn.{q,k,v,o}_proj.*  layers.{i}.attn.{q,k}_norm.weight
    layers.{i}.mlp_norm.*    layers.{i}.mlp.{gate,up,down}_proj.*
    norm.*  project_out.weight  head.weight (absent when tied)

`norm_place="post"` (OPT-350m): input_norm is applied after attention was added, mlp_norm after the MLP was added, and
there is no final norm. Linear weights are [out, in].
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from lilliput.base.errors import UserError


@dataclass(frozen=True)
class Rope:
    """Rotary positions. Fields past `kind` count only where the named kind uses them."""

    theta: float = 10000.0
    kind: Literal["none", "linear", "llama3", "yarn"] = "none"
    factor: float = 1.0  # linear, llama3, yarn: how many times longer than `original_context`
    original_context: int = 0  # llama3, yarn: context before scaling
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    truncate: bool = True  # yarn: round the borders of the ramp to whole dimensions
    attention_factor: float = 1.0  # yarn: cos and sin are multiplied by it (mscale already folded in)


@dataclass(frozen=True)
class DecoderSpec:
    """See the field comments. Raises UserError where the numbers contradict each other."""

    family: str  # llama | mistral | qwen2 | qwen3 | gpt2 | opt: decides names in files, nothing else
    vocab: int
    dim: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    context: int  # longest position the model was made for
    norm: Literal["rms", "layer"] = "rms"
    norm_eps: float = 1e-5
    norm_place: Literal["pre", "post"] = "pre"
    positions: Literal["rope", "learned"] = "rope"
    rope: Rope = Rope()
    activation: Literal["swiglu", "gelu", "gelu_tanh", "relu"] = "swiglu"
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False  # RMSNorm over head_dim of q and k, before RoPE
    tied: bool = False  # the head is the embedding
    window: int | None = None  # a token sees itself and the window - 1 before it
    window_layers: tuple[bool, ...] | None = None  # which layers have the window; None = all
    embed_dim: int | None = None  # width of the embedding where it differs from dim (OPT-350m)
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    extra: Mapping[str, Any] = field(default_factory=dict, hash=False)  # config.json keys carried along unread: pad_token_id

    def __post_init__(self) -> None:
        sizes = {name: getattr(self, name) for name in ("vocab", "dim", "layers", "heads", "kv_heads", "head_dim", "ffn", "context")}
        for name, value in sizes.items():
            if value < 1:
                raise UserError(f"{name}={value} is no size of a model", "it must be at least 1", f"give {name} a positive number")
        if self.heads % self.kv_heads:
            raise UserError(f"heads={self.heads} is not a multiple of kv_heads={self.kv_heads}", "each key head serves an equal group of query heads",
                            f"kv_heads must divide {self.heads}")
        if self.positions == "rope" and self.head_dim % 2:
            raise UserError(f"head_dim={self.head_dim} is odd", "RoPE rotates pairs of dimensions", "choose an even head_dim")
        if self.window is not None and self.window < 1:
            raise UserError(f"window={self.window} lets a token see nothing", "a token sees itself and window - 1 before it", "window must be at least 1")
        if self.window_layers is not None and len(self.window_layers) != self.layers:
            raise UserError(f"window_layers has {len(self.window_layers)} entries", f"the model has {self.layers} layers", "give one entry a layer")

    @property
    def gated(self) -> bool:
        """Whether the MLP has a gate projection."""
        return self.activation == "swiglu"

    def window_of(self, layer: int) -> int | None:
        """The window of one layer in tokens, or None when it sees everything before it."""
        return self.window if self.window_layers is None or self.window_layers[layer] else None

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Canonical parameter name -> shape, in execution order; tied tensors once, under `embed.weight`."""
        wide = self.embed_dim or self.dim
        out: dict[str, tuple[int, ...]] = {"embed.weight": (self.vocab, wide)}
        if self.embed_dim:
            out["project_in.weight"] = (self.dim, wide)
        if self.positions == "learned":
            out["positions.weight"] = (self.context, self.dim)
        block = self.block_shapes()
        for layer in range(self.layers):
            out |= {f"layers.{layer}.{name}": shape for name, shape in block.items()}
        if self.norm_place == "pre":
            out |= self._norm("norm")
        if self.embed_dim:
            out["project_out.weight"] = (wide, self.dim)
        if not self.tied:
            out["head.weight"] = (self.vocab, wide)
        return out

    def block_shapes(self) -> dict[str, tuple[int, ...]]:
        """The parameters of one block, without the `layers.{i}.` before them, in execution order."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        attention: dict[str, tuple[int, ...]] = {}
        for name, rows in (("q_proj", q), ("k_proj", kv), ("v_proj", kv)):
            attention |= _linear(f"attn.{name}", rows, self.dim, self.qkv_bias)
        if self.qk_norm:
            attention |= {"attn.q_norm.weight": (self.head_dim,), "attn.k_norm.weight": (self.head_dim,)}
        attention |= _linear("attn.o_proj", self.dim, q, self.o_bias)
        mlp: dict[str, tuple[int, ...]] = {}
        for name in ("gate_proj", "up_proj") if self.gated else ("up_proj",):
            mlp |= _linear(f"mlp.{name}", self.ffn, self.dim, self.mlp_bias)
        mlp |= _linear("mlp.down_proj", self.dim, self.ffn, self.mlp_bias)
        first, second = self._norm("input_norm"), self._norm("mlp_norm")
        if self.norm_place == "pre":
            return first | attention | second | mlp
        return attention | first | mlp | second

    def _norm(self, name: str) -> dict[str, tuple[int, ...]]:
        bias = {f"{name}.bias": (self.dim,)} if self.norm == "layer" else {}
        return {f"{name}.weight": (self.dim,), **bias}


def _linear(name: str, rows: int, columns: int, bias: bool) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (rows, columns), **({f"{name}.bias": (rows,)} if bias else {})}
