"""Facts of a decoder from its spec alone: what planner, rooms and loops read instead of the model.

Flops count multiply and add of every matrix product, and of exactly the (query, key) pairs that the mask lets through:
half of what T x T counts. Activations list what autograd really keeps of one micro-batch (models/decoder.py with
cross-entropy on fp32 logits), by owner: the tests hold the sums to the measured storages within 10 %.
"""

from __future__ import annotations

import math
from functools import partial

from lilliput.base.facts import Activation, Facts, KVShape
from lilliput.models.spec import DecoderSpec
from lilliput.ops import native

ROWS, TP = ("sp", "cp"), ("tp", "cp")  # mesh axes that divide a term: per-token rows, or rows of heads and hidden units

KEPT = {"swiglu": 4, "gelu": 2, "gelu_tanh": 2, "relu": 1}  # of the MLP's width: gate, silu(gate), up, product | input, output | output


def facts(spec: DecoderSpec) -> Facts:
    """The Facts of a decoder; see base/facts.py for the fields."""
    mlp = ("gate_proj", "up_proj") if spec.gated else ("up_proj",)
    linears = [*(f"attn.{name}_proj" for name in "qkvo"), *(f"mlp.{name}" for name in mlp), "mlp.down_proj"]
    layout = {f"layers.*.{name}": "row" if name.endswith(("o_proj", "down_proj")) else "col" for name in linears}
    return Facts(
        family=spec.family,
        shapes=spec.shapes(),
        chain=_chain(spec),
        layers=spec.layers,
        vocab=spec.vocab,
        context=spec.context,
        tied=(("embed.weight", "head.weight"),) if spec.tied else (),
        layout={"embed": "vocab", "head": "vocab", **layout},
        feeds=_feeds(spec, mlp),
        linears=tuple(f"layers.*.{name}" for name in linears),
        kv=KVShape(spec.layers, spec.kv_heads, spec.head_dim),
        flops=partial(flops, spec),
        activations=partial(activations, spec),
    )


def _chain(spec: DecoderSpec) -> tuple[str, ...]:
    present = {name.split(".")[0] for name in spec.shapes()}
    parts = ("embed", "project_in", "positions", "layers.*", "norm", "project_out", "head")
    return tuple(part for part in parts if part in present or part in ("layers.*", "head"))


def _feeds(spec: DecoderSpec, mlp: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
    qkv, hidden = tuple(f"layers.*.attn.{name}_proj" for name in "qkv"), tuple(f"layers.*.mlp.{name}" for name in mlp)
    last = "project_out" if spec.embed_dim else "head"
    norms: dict[str, tuple[str, ...]] = {"layers.*.attn.q_norm": ("attention",), "layers.*.attn.k_norm": ("attention",)} if spec.qk_norm else {}
    if spec.norm_place == "post":  # the last block's mlp_norm feeds the head, the others the next block
        return {"layers.*.input_norm": (*hidden, "residual"), "layers.*.mlp_norm": (*qkv, last, "residual"), **norms}
    return {"layers.*.input_norm": qkv, "layers.*.mlp_norm": hidden, "norm": (last,), **norms}


def flops(spec: DecoderSpec, tokens: int, context: int) -> float:
    """Forward flops of `tokens` consecutive tokens of which the last sees `context` tokens, itself included.

    flops(T, T) is a whole sequence, flops(1, C) a decoded token, flops(N, T) with N > T is N tokens in sequences of T.
    """
    whole, rest = divmod(tokens, context)
    pairs = 0
    for layer in range(spec.layers):
        window = spec.window_of(layer) or context
        pairs += whole * _pairs(context, context, window) + _pairs(rest, context if not whole else rest, window)
    matrices = sum(math.prod(shape) for name, shape in spec.shapes().items() if len(shape) == 2 and name not in ("embed.weight", "positions.weight"))
    head = spec.vocab * (spec.embed_dim or spec.dim) if spec.tied else 0
    return 2.0 * tokens * (matrices + head) + 4.0 * pairs * spec.heads * spec.head_dim


def _pairs(tokens: int, context: int, window: int) -> int:
    """(query, key) pairs of the last `tokens` tokens of a sequence of `context`."""

    def first(count: int) -> int:  # of the first `count` tokens
        short = min(count, window)
        return short * (short + 1) // 2 + (count - short) * window

    return first(context) - first(context - tokens)


def activations(spec: DecoderSpec, sequences: int, tokens: int, element: int) -> list[Activation]:
    """What one micro-batch keeps for its backward pass, in bytes; `element` = bytes of a computed number (4 on CPUs).

    Saved terms add up: all "model" terms plus layers x the "block" terms. Two transients stand beside them (saved=False,
    never times layers): the loss's ("model"), on top of that sum, and the last block's ("block"), on top of the sum
    without the early terms. Peak = the larger of the two.
    """
    rows = sequences * tokens
    stats = rows * 4 * (2 if spec.norm == "layer" else 1)
    stream, heads, kv = rows * spec.dim * element, rows * spec.heads * spec.head_dim * element, rows * spec.kv_heads * spec.head_dim * element
    hidden, logits = rows * spec.ffn * element, rows * spec.vocab * 4
    block = [
        Activation("norm inputs", 2 * (stream + stats), divided_by=ROWS),
        Activation("attention input", stream, inputs_of=("q_proj", "k_proj", "v_proj"), divided_by=ROWS),
        Activation("mlp input", stream, inputs_of=("gate_proj", "up_proj") if spec.gated else ("up_proj",), divided_by=ROWS),
        Activation("q, k, v", heads + 2 * kv, divided_by=TP),
        Activation("attention output", heads + rows * spec.heads * 4, divided_by=TP),
        Activation("mlp", max(1, KEPT[spec.activation] - 1) * hidden, divided_by=TP),
    ]
    if spec.activation != "relu":  # relu's own backward pass keeps its output
        block.append(Activation("mlp product", hidden, inputs_of=("down_proj",), divided_by=TP))
    if spec.qk_norm:
        block.append(Activation("q, k before their norm", heads + kv + rows * (spec.heads + spec.kv_heads) * 4, divided_by=TP))
    wide = rows * (spec.embed_dim or 0) * element
    last = (2 * stream + stats if spec.norm_place == "pre" else 0) + wide  # what is free when the last block's backward begins
    first = wide if spec.norm_place == "pre" else wide + stream
    model = [
        Activation("embedding output", first, "model", divided_by=ROWS),
        Activation("last norm and head inputs", last, "model", early=True, divided_by=ROWS),
        Activation("log-probabilities", logits, "model", early=True, divided_by=TP),
        Activation("token ids", 2 * rows * 8, "model", divided_by=("cp",)),
    ]
    if spec.positions == "rope":
        model.append(Activation("rope tables", 2 * tokens * spec.head_dim * element, "model", divided_by=("cp",)))
    if spec.window is not None and tokens > spec.window and native.missing():  # compiled attention takes windows as numbers
        model.append(Activation("window mask", tokens * tokens * element, "model", divided_by=("cp",)))
    kept_bytes = sum(a.size for a in model) + spec.layers * sum(a.size for a in block)
    return [*block, *(a for a in model if a.size), *_transients(spec, rows, element, kept_bytes)]


def _transients(spec: DecoderSpec, rows: int, element: int, kept_bytes: int) -> list[Activation]:
    """The most gradient bytes in the air around the loss and the embedding ("model"), and in the last block.

    At the loss: of log-probabilities and logits; or of the head's weight and input; or the three rows of an RMSNorm's
    backward. At the embedding nothing saved is left, but its gradient is dense; tied, there are the head's and the sum too. In a block:
    of both inputs of the gate's product (its output is free by then), of relu's output and input, or of the down
    projection's input and weight; or those of attention, when the MLP is free.
    """
    stream, hidden, logits = rows * spec.dim * element, rows * spec.ffn * element, rows * spec.vocab * 4
    weight, table = spec.dim * spec.ffn * element, spec.vocab * (spec.embed_dim or spec.dim) * element
    held = table if spec.tied else 0
    loss = max(2 * logits, table + stream, 3 * stream - logits, (3 * table if spec.tied else table + stream) - kept_bytes)
    mlp = stream + max(2 * hidden if spec.activation in ("swiglu", "relu") else 0, hidden + weight)
    attention = 2 * rows * (spec.heads + spec.kv_heads) * spec.head_dim * element - KEPT[spec.activation] * hidden - stream
    return [
        Activation("gradients in the loss", loss, "model", saved=False, divided_by=TP),
        Activation("gradients in a block", max(mlp, attention) + held, saved=False, divided_by=TP),
    ]
