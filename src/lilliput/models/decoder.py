"""The decoder: one class for every family that a DecoderSpec can describe. Blind to parallelism, caches and techniques.

    tokens -> embed (+ positions) -> dropout -> Block x layers -> norm -> head -> logits (fp32)
    pre-norm Block:   x + attn(norm(x));  x + mlp(norm(x))          post-norm:  norm(x + attn(x));  norm(x + mlp(x))

Two seams, all plain attributes or arguments:
    attend   (layer, q, k, v, window) -> o    where a serving runner puts its cache; default: causal attention
    deltas   on each Linear (layers.py)

RoPE tables and window masks are made once a forward and shared by all layers. Built on the meta device it holds no
memory; built elsewhere its weights are uninitialised until init_weights or a checkpoint fills them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lilliput.base import seeds
from lilliput.base.errors import UserError
from lilliput.models import rope
from lilliput.models.facts import facts
from lilliput.models.layers import Embedding, Head, LayerNorm, Linear, RMSNorm
from lilliput.models.spec import DecoderSpec
from lilliput.ops.attention import attend as attention
from lilliput.ops.attention import choose, visible
from lilliput.ops.dropout import Counter, Dropout

Attend = Callable[[int, Tensor, Tensor, Tensor, int | None], Tensor]
Tables = tuple[Tensor, Tensor] | None

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}


class Attention(nn.Module):
    """q, k, v projections, optional norm of q and k, RoPE, attention, output projection."""

    def __init__(self, spec: DecoderSpec, layer: int) -> None:
        super().__init__()
        self.layer, self.heads, self.kv_heads, self.window = layer, spec.heads, spec.kv_heads, spec.window_of(layer)
        self.q_proj = Linear(spec.dim, spec.heads * spec.head_dim, spec.qkv_bias)
        self.k_proj = Linear(spec.dim, spec.kv_heads * spec.head_dim, spec.qkv_bias)
        self.v_proj = Linear(spec.dim, spec.kv_heads * spec.head_dim, spec.qkv_bias)
        self.q_norm = RMSNorm(spec.head_dim, spec.norm_eps) if spec.qk_norm else None
        self.k_norm = RMSNorm(spec.head_dim, spec.norm_eps) if spec.qk_norm else None
        self.o_proj = Linear(spec.heads * spec.head_dim, spec.dim, spec.o_bias)

    def forward(self, x_BTC: Tensor, tables: Tables, attend: Attend) -> Tensor:
        """[B, T, C] -> [B, T, C]."""
        q_BTHD = self.q_proj(x_BTC).unflatten(-1, (self.heads, -1))
        k_BTGD = self.k_proj(x_BTC).unflatten(-1, (self.kv_heads, -1))
        v_BTGD = self.v_proj(x_BTC).unflatten(-1, (self.kv_heads, -1))
        if self.q_norm is not None and self.k_norm is not None:
            q_BTHD, k_BTGD = self.q_norm(q_BTHD), self.k_norm(k_BTGD)
        if tables is not None:
            q_BTHD, k_BTGD = rope.rotate(q_BTHD, *tables), rope.rotate(k_BTGD, *tables)
        o_BHTD = attend(self.layer, q_BTHD.transpose(1, 2), k_BTGD.transpose(1, 2), v_BTGD.transpose(1, 2), self.window)
        return self.o_proj(o_BHTD.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """down(silu(gate(x)) * up(x)), or down(activation(up(x)))."""

    def __init__(self, spec: DecoderSpec) -> None:
        super().__init__()
        self.gate_proj = Linear(spec.dim, spec.ffn, spec.mlp_bias) if spec.gated else None
        self.up_proj = Linear(spec.dim, spec.ffn, spec.mlp_bias)
        self.down_proj = Linear(spec.ffn, spec.dim, spec.mlp_bias)
        self.activation = spec.activation

    def forward(self, x_BTC: Tensor) -> Tensor:
        """[B, T, C] -> [B, T, C]."""
        if self.gate_proj is not None:
            return self.down_proj(F.silu(self.gate_proj(x_BTC)) * self.up_proj(x_BTC))
        return self.down_proj(ACTIVATIONS[self.activation](self.up_proj(x_BTC)))


class Block(nn.Module):
    """One layer. Submodules are registered in execution order, so state dicts list names as DecoderSpec.shapes does."""

    def __init__(self, spec: DecoderSpec, layer: int, counter: Counter) -> None:
        super().__init__()
        self.post = spec.norm_place == "post"
        if self.post:
            self.attn, self.input_norm = Attention(spec, layer), _norm(spec)
            self.mlp, self.mlp_norm = Mlp(spec), _norm(spec)
        else:
            self.input_norm, self.attn = _norm(spec), Attention(spec, layer)
            self.mlp_norm, self.mlp = _norm(spec), Mlp(spec)
        self.attn_dropout, self.mlp_dropout = Dropout(counter, 1 + 2 * layer), Dropout(counter, 2 + 2 * layer)

    def forward(self, x_BTC: Tensor, tables: Tables, attend: Attend) -> Tensor:
        """[B, T, C] -> [B, T, C]. tables: cos and sin of rope.tables, or None."""
        if self.post:
            x_BTC = self.input_norm(x_BTC + self.attn_dropout(self.attn(x_BTC, tables, attend)))
            return self.mlp_norm(x_BTC + self.mlp_dropout(self.mlp(x_BTC)))
        x_BTC = x_BTC + self.attn_dropout(self.attn(self.input_norm(x_BTC), tables, attend))
        return x_BTC + self.mlp_dropout(self.mlp(self.mlp_norm(x_BTC)))


class Decoder(nn.Module):
    """The model of a spec. `spec` and `facts` describe it; `counter` places dropout's masks."""

    def __init__(self, spec: DecoderSpec) -> None:
        super().__init__()
        self.spec, self.facts = spec, facts(spec)
        self.counter = Counter()
        wide = spec.embed_dim or spec.dim
        self.embed = Embedding(spec.vocab, wide)
        self.project_in = Linear(wide, spec.dim) if spec.embed_dim else None
        self.positions = Embedding(spec.context, spec.dim) if spec.positions == "learned" else None
        self.embed_dropout = Dropout(self.counter, 0)
        self.layers = nn.ModuleList(Block(spec, layer, self.counter) for layer in range(spec.layers))
        self.norm = _norm(spec) if spec.norm_place == "pre" else None
        self.project_out = Linear(spec.dim, wide) if spec.embed_dim else None
        self.head = Head(spec.vocab, wide, self.embed if spec.tied else None)
        self._angles = rope.frequencies(spec.rope, spec.head_dim) if spec.positions == "rope" else None

    @property
    def device(self) -> torch.device:
        """Where the weights lie."""
        return self.embed.weight.device

    @property
    def dropout(self) -> float:
        """Probability that an element of the embeddings, of attention's output and of the MLP's output is zeroed in training."""
        return self.embed_dropout.p

    @dropout.setter
    def dropout(self, p: float) -> None:
        for module in self.modules():
            if isinstance(module, Dropout):
                module.p = p

    def hidden(self, tokens_BT: Tensor | None, positions_BT: Tensor | None = None, attend: Attend | None = None,
               inputs_BTC: Tensor | None = None) -> Tensor:
        """Hidden states [B, T, C] after the final norm; what the head reads.

        positions_BT: 0..T-1 when None. attend: see the module's text. inputs_BTC [B, T, embedding width]: takes the place
        of the embedded tokens. UserError when learned positions end before T.
        """
        x_BTC = self.embed(tokens_BT) if inputs_BTC is None else inputs_BTC
        tokens = x_BTC.shape[1]
        if positions_BT is None:
            if self.positions is not None and tokens > self.spec.context:
                raise UserError(f"{tokens} tokens are too many", f"{self.spec.family} has {self.spec.context} learned positions",
                                f"at most {self.spec.context} tokens in a sequence")
            positions_BT = torch.arange(tokens, device=x_BTC.device).unsqueeze(0)
        if self.project_in is not None:
            x_BTC = self.project_in(x_BTC)
        if self.positions is not None:
            x_BTC = x_BTC + self.positions(positions_BT)
        x_BTC = self.embed_dropout(x_BTC)
        tables = None if self._angles is None else rope.tables(self._angles, positions_BT, self.spec.rope.attention_factor, x_BTC.dtype)
        see = attend or self._causal(tokens, x_BTC)
        for block in self.layers:
            x_BTC = block(x_BTC, tables, see)
        if self.norm is not None:
            x_BTC = self.norm(x_BTC)
        return x_BTC if self.project_out is None else self.project_out(x_BTC)

    def forward(self, tokens_BT: Tensor, positions_BT: Tensor | None = None, attend: Attend | None = None) -> Tensor:
        """Logits [B, T, vocab] in fp32."""
        return self.head(self.hidden(tokens_BT, positions_BT, attend))

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Fill every parameter of the spec (deltas excepted) with init_tensor."""
        for name, shape in self.spec.shapes().items():
            self.get_parameter(name).copy_(init_tensor(name, shape, seed, self.spec))

    def _causal(self, tokens: int, like: Tensor) -> Attend:
        """Causal attention. A backend without windows gets a mask, made once, as floats, and shared by the layers."""
        window = self.spec.window
        if window is None or tokens <= window:
            return lambda layer, q, k, v, _: attention(q, k, v, causal=True)
        masks: list[Tensor] = []

        def see(layer: int, q: Tensor, k: Tensor, v: Tensor, own: int | None) -> Tensor:
            if own is None or choose(q, k, v)[0] == "flash":
                return attention(q, k, v, causal=True, window=own)
            if not masks:
                seen = visible(tokens, tokens, window, like.device)
                masks.append(torch.zeros(seen.shape, dtype=like.dtype, device=like.device).masked_fill_(~seen, float("-inf")))
            return attention(q, k, v, causal=False, mask=masks[0])

        return see


def init_tensor(name: str, shape: tuple[int, ...], seed: int, spec: DecoderSpec) -> Tensor:
    """A parameter's first value in fp32 on the CPU, from (seed, name) alone, so that order and sharding do not matter.

    Matrices are normal(0, 0.02), divided by sqrt(2 * layers) where they write to the residual stream (GPT-2's rule);
    norm weights 1, biases 0.
    """
    if name.endswith("bias"):
        return torch.zeros(shape, device="cpu")
    if len(shape) == 1:
        return torch.ones(shape, device="cpu")
    generator = torch.Generator("cpu").manual_seed(seeds.key(seed, name))
    deviation = 0.02 / (2 * spec.layers) ** 0.5 if name.endswith(("o_proj.weight", "down_proj.weight")) else 0.02
    return torch.empty(shape, device="cpu").normal_(0, deviation, generator=generator)


def _norm(spec: DecoderSpec) -> RMSNorm | LayerNorm:
    return RMSNorm(spec.dim, spec.norm_eps) if spec.norm == "rms" else LayerNorm(spec.dim, spec.norm_eps)
