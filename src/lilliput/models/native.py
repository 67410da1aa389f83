"""A decoder on the native kernels: every family of models/decoder.py lowered to one plan (ops/step.py), weights packed once.

How weights are stored is one word, the same for all matrices; norms, biases and positions stay fp32:

    file   as it lies in the file where kernels read that, bit for bit: 4 and 8 bits of a GGUF (Q4_0, Q4_1, Q8_0), GPTQ or AWQ, times
           int8 rows; fp16. Else fp32.
    fp32 fp16 nf4 fp8      stored so, arithmetic in fp32            w8 q4      rounded, times int8 rows
    fp8_rows               as fp8, times rows rounded to e4m3 (ops/fp8.py); head and projections as fp8

int8 rows are quantised anew before each product, with one scale a group of the weight (32 or 64 inputs), or a row where the weight
has one scale an output: one scale for a whole tensor would be set by one outlier. Which matrices there are, and how each is stored,
is told by models/stored.py.

The eager Decoder stays the oracle: in fp32 the two differ by rounding alone. A LoRA adapter is lowered beside it (lower_adapter).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import Tensor

from lilliput.base.errors import UserError
from lilliput.models import rope
from lilliput.models.facts import facts
from lilliput.models.stored import Layout, Layouts, Matrix, chosen, matrices
from lilliput.ops import codecs, float_codecs
from lilliput.ops.low_rank import LowRank, Pair
from lilliput.ops.paged import KvStore
from lilliput.ops.panels import INT8_ROWS, PackedWeight
from lilliput.ops.step import LAYER_SLOTS, POST, PRE, StepPlan, decoder_step

if TYPE_CHECKING:
    from lilliput.models.spec import DecoderSpec

Weights = Literal["file", "fp32", "fp16", "w8", "q4", "nf4", "fp8", "fp8_rows"]
Read = Callable[[str], Tensor]  # canonical name -> fp32 tensor
Packed = Callable[[Sequence[str]], PackedWeight]  # canonical names of one layout -> the matrices as they lie in the file, stacked


class NativeDecoder:
    """A lowered decoder that answers as `Decoder` does: `hidden` then `head`. The serving runner drives its `plan`."""

    def __init__(self, spec: DecoderSpec, read: Read, layout: Layouts = lambda name: None, packed: Packed | None = None, weights: Weights = "file",
                 context: int | None = None, kv: str = "fp32", rotate_on_read: bool = False, sinks: int = 0) -> None:  # fmt: skip
        """Read every tensor once and pack it (`narrow`: no matrix of a layer in fp32). layout, packed: of a Checkpoint. context: positions of the
        RoPE table (None: the model's own). kv: the codec of the caches that `hidden` makes. rotate_on_read: keys lie before RoPE (ops/step.py).
        sinks: first tokens that layers with a window see too."""
        if weights not in get_args(Weights):
            raise UserError(f"unknown storage `{weights}`", f"known: {', '.join(get_args(Weights))}", "serve.weights=file")
        self.spec, self.facts, self.weights, self.kv = spec, facts(spec), weights, kv
        self.device = torch.device("cpu")
        self.plan, self.stored, self.narrow = _lower(spec, read, layout, packed, weights, context or spec.context, rotate_on_read, sinks)

    @property
    def bytes(self) -> int:
        """Bytes of the packed matrices."""
        return sum(self.stored.values())

    def hidden(self, tokens_BT: Tensor) -> Tensor:
        """What `head` reads, [B, T, C]: rows from position 0, each attending to those before it. Runs on a cache of its own."""
        sequences, tokens = tokens_BT.shape
        store, tables = _own_cache(self, sequences, tokens)
        self.plan.cache(store)
        cu_q = torch.arange(sequences + 1, dtype=torch.int32) * tokens
        lengths, positions = torch.full((sequences,), tokens, dtype=torch.int32), torch.arange(tokens, dtype=torch.int32).repeat(sequences)
        none = torch.empty(0, dtype=torch.int32)
        hidden_RC, _ = decoder_step(self.plan, tokens_BT.flatten().to(torch.int32), None, positions_R=positions, cu_q=cu_q, lengths=lengths,
                                    tables=tables, sampled_N=none)  # fmt: skip
        return hidden_RC.view(sequences, tokens, -1)

    def head(self, h: Tensor) -> Tensor:
        """[..., C] of `hidden` -> logits [..., vocab] fp32: the final norm and the head."""
        flat = h.reshape(-1, self.spec.dim).contiguous()
        rows = torch.arange(flat.shape[0], dtype=torch.int32)
        nothing = torch.zeros(1, dtype=torch.int32)
        _, logits = decoder_step(self.plan, None, flat, positions_R=torch.zeros(flat.shape[0], dtype=torch.int32), cu_q=nothing, lengths=nothing[:0],
                                 tables=nothing[:0, None], sampled_N=rows, layers=(0, 0))  # fmt: skip
        return logits.view(*h.shape[:-1], -1)

    def __call__(self, tokens_BT: Tensor) -> Tensor:
        """Logits [B, T, vocab]."""
        return self.head(self.hidden(tokens_BT))


def lower_adapter(spec: DecoderSpec, pairs: Mapping[str, Pair], half: bool = False) -> LowRank:
    """Updates of a model's Linears (canonical path -> (A, B), the scale in B) for the rows of a step that are an adapter's. half: kept in fp16."""
    lowered, head, kv = LowRank(spec.layers, half), spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
    places = {
        "qkv": (("attn.q_proj", 0), ("attn.k_proj", head), ("attn.v_proj", head + kv)),
        "out": (("attn.o_proj", 0),),
        "up": (("mlp.gate_proj", 0), ("mlp.up_proj", spec.ffn if spec.gated else 0)),
        "down": (("mlp.down_proj", 0),),
    }
    for layer in range(spec.layers):
        for slot, parts in places.items():
            found = [(output, pairs[path]) for name, output in parts if (path := f"layers.{layer}.{name}") in pairs]
            if found:
                lowered.put(layer, LAYER_SLOTS.index(slot), found)
    return lowered


def _own_cache(model: NativeDecoder, sequences: int, tokens: int) -> tuple[KvStore, Tensor]:
    spec, each = model.spec, -(-tokens // 16)
    store = KvStore(layers=spec.layers, blocks=max(1, sequences * each), kv_heads=spec.kv_heads, head_dim=spec.head_dim, codec=model.kv)
    return store, torch.arange(sequences * each, dtype=torch.int32).view(sequences, each)


def _lower(
    spec: DecoderSpec, read: Read, layout: Layouts, as_stored: Packed | None, weights: str, context: int, rotate_on_read: bool, sinks: int
) -> tuple[StepPlan, dict[str, int], bool]:
    wide = spec.embed_dim or spec.dim
    plan = StepPlan(dim=spec.dim, heads=spec.heads, kv_heads=spec.kv_heads, head_dim=spec.head_dim, ffn=spec.ffn, vocab=spec.vocab, wide=wide,
                    act=spec.activation, scale=spec.head_dim**-0.5)  # fmt: skip
    shapes, stored, formats = spec.shapes(), dict[str, int](), set[str]()

    def vector(name: str) -> Tensor | None:
        return read(name).float() if name in shapes else None

    def put(matrix: Matrix) -> None:
        layer, slot, parts = matrix
        how = chosen(matrix, shapes[parts[0]][1], weights, layout)
        packed = as_stored(parts) if weights == "file" and as_stored is not None and layout(parts[0]) == how else _pack(parts, read, how)
        stored[f"{layer}.{slot}"], int8 = packed.bytes, packed.format in INT8_ROWS
        if slot == "embed":
            plan.embed(packed)
            if spec.tied:
                plan.product(None, "head", packed, None, int8)
            return
        biases = [vector(part.replace(".weight", ".bias")) for part in parts]
        bias = None if biases[0] is None else torch.cat([b for b in biases if b is not None])
        plan.product(layer, slot, packed, bias, int8, float8=layer is not None and weights == "fp8_rows")
        if layer is not None:
            formats.add(packed.format)

    for layer in range(spec.layers):
        plan.add_layer(PRE if spec.norm_place == "pre" else POST, spec.window_of(layer), sinks)
        for slot in ("input_norm", "mlp_norm"):
            plan.norm(layer, slot, read(f"layers.{layer}.{slot}.weight"), vector(f"layers.{layer}.{slot}.bias"), spec.norm_eps)
        if spec.qk_norm:
            plan.head_norms(layer, read(f"layers.{layer}.attn.q_norm.weight"), read(f"layers.{layer}.attn.k_norm.weight"), spec.norm_eps)
    for matrix in matrices(spec):
        put(matrix)
    if spec.norm_place == "pre":
        plan.norm(None, "norm", read("norm.weight"), vector("norm.bias"), spec.norm_eps)
    if spec.positions == "learned":
        plan.learned(read("positions.weight"))
    else:
        cos, sin = rope.tables(rope.frequencies(spec.rope, spec.head_dim), torch.arange(context)[None], spec.rope.attention_factor, torch.float32)
        half = spec.head_dim // 2
        plan.rope(cos[0, :, 0, :half], sin[0, :, 0, half:], rotate_on_read)
    return plan, stored, "f32" not in formats


def _pack(parts: Sequence[str], read: Read, how: Layout) -> PackedWeight:
    """The matrices stacked along their outputs, rounded to a layout."""
    whole = torch.cat([read(name).float() for name in parts])
    if how.format == "w8":
        return codecs.quantize_w8(whole)
    return codecs.quantize_q4(whole, how.group) if how.format == "q4" else float_codecs.encode(whole, how.format, how.group)
