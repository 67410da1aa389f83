"""One call per decode step: a decoder lowered to a plan of fused regions that native code runs over packed rows.

Deep-Fusion of DeepSpeed-Inference: what one op writes, the next reads from the cache, and no op costs a trip through Python
or the dispatcher (a PyTorch decoder of 30 layers spends 12 to 19 ms a step on that alone). Regions of a layer:

    [norm, quantise, QKV] [RoPE, cache write] [attention] [O, + residual] [norm, quantise, gate and up] [act, quantise, down, + residual]

A StepPlan owns every tensor its plan points into. `decoder_step` runs any range of layers, hidden states in and out, and can call
`reduce` on the partial sums of O and down before they meet the residual (tensor parallelism), or add low-rank updates to some rows
(ops/low_rank.py). Rows are packed: cu_q says which belong to whom, as everywhere (ops/paged.py). When not: training (nothing is kept for a backward pass),
CUDA.

Aminabadi et al. 2022, arXiv 2207.00032, section III.
"""

from __future__ import annotations

import weakref
from array import array
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lilliput.ops import native, paged
from lilliput.ops.low_rank import LowRank
from lilliput.ops.paged import KvStore
from lilliput.ops.panels import PackedWeight

REGIONS = ("qkv", "rotate", "attend", "out", "up", "down", "norm_1", "norm_2")  # csrc/step.h: enum Region
PRE = ("qkv", "rotate", "attend", "out", "up", "down")
POST = ("qkv", "rotate", "attend", "out", "norm_1", "up", "down", "norm_2")
ACTS = ("swiglu", "gelu", "gelu_tanh", "relu")
TOP_SLOTS, LAYER_SLOTS = ("project_in", "project_out", "head"), ("qkv", "out", "up", "down")

Reduce = Callable[[Tensor], None]  # partial sums, fp32, flat: reduced in place
Adapted = Sequence[tuple[int, int, LowRank]]  # rows [start, stop) that get an adapter's updates

_plans: weakref.WeakValueDictionary[int, StepPlan] = weakref.WeakValueDictionary()


class StepPlan:
    """A lowered decoder. Built once by its methods, then `decoder_step(plan, ...)`; runs one step at a time."""

    def __init__(self, *, dim: int, heads: int, kv_heads: int, head_dim: int, ffn: int, vocab: int, wide: int, act: str, scale: float) -> None:
        """`wide`: the embedding's width where it differs from dim, else dim. `scale`: of attention's scores."""
        assert native.module() is not None, "ask native.missing() before building a plan"
        self.dim, self.vocab, self.kv_heads, self.layers, self.on_read = dim, vocab, kv_heads, 0, False
        self._held: list[Any] = []  # what the native plan points to
        self.products: dict[tuple[int | None, str], tuple[PackedWeight, bool]] = {}  # (layer, slot): (weight, whether its rows are int8)
        self.store: KvStore | None = None
        self._native = native.module().Plan(dim, heads, kv_heads, head_dim, ffn, vocab, wide, ACTS.index(act), scale)
        self.handle = id(self)
        _plans[self.handle] = self

    def rope(self, cos_PD: Tensor, sin_PD: Tensor, on_read: bool = False) -> None:
        """Tables [positions, head_dim / 2] fp32. on_read: keys lie before RoPE and are rotated by their place in the cache when they are
        read, so that tokens may leave from among them (queries are rotated by `positions`, then places too)."""
        self.on_read = on_read
        self._native.rope(self._address(cos_PD), self._address(sin_PD))
        if on_read:
            self._native.rotate_on_read(*(self._address(paged.tiled(table)) for table in (cos_PD, sin_PD)))

    def learned(self, table_PC: Tensor) -> None:
        """Learned positions [positions, dim] fp32."""
        self._native.learned(self._address(table_PC))

    def embed(self, weight: PackedWeight) -> None:
        """The embedding, a packed matrix [vocab, wide] in f32, f16, w8 or q4."""
        self._native.embed(self._weight(weight))

    def add_layer(self, regions: Sequence[str], window: int | None, sinks: int = 0) -> None:
        """A layer that runs these regions in order. window and sinks: ops/paged.py."""
        self._native.add_layer([REGIONS.index(region) for region in regions], window or 0, sinks)
        self.layers += 1

    def product(self, layer: int | None, slot: str, weight: PackedWeight, bias: Tensor | None, int8: bool, static_G: Tensor | None = None,
                float8: bool = False) -> None:  # fmt: skip
        """Give a slot of a layer (qkv, out, up, down) or of the top (layer None: project_in, project_out, head) its matrix.

        static_G: scales of its int8 rows from calibration (ops/packed.py); None: each row's own. float8: rows are rounded to e4m3 first,
        each times a power of two of its own (ops/fp8.py).
        """
        number = (TOP_SLOTS if layer is None else LAYER_SLOTS).index(slot)
        self.products[layer, slot] = weight, int8
        self._native.product(-1 if layer is None else layer, number, self._weight(weight), self._address(bias), int8, self._address(static_G), float8)

    def norm(self, layer: int | None, slot: str, weight: Tensor, bias: Tensor | None, eps: float) -> None:
        """A norm of a layer (input_norm, mlp_norm) or the final one (layer None): RMS without a bias, else LayerNorm."""
        number = 0 if slot == "input_norm" else 1
        kind = 1 if bias is None else 2
        self._native.norm(-1 if layer is None else layer, number, kind, self._address(weight), self._address(bias), eps)

    def head_norms(self, layer: int, q_D: Tensor, k_D: Tensor, eps: float) -> None:
        """RMS norms of each query and key head, before RoPE."""
        self._native.head_norms(layer, self._address(q_D), self._address(k_D), eps)

    def clock(self) -> Tensor:
        """Seconds of each region, in the order of REGIONS, added up from now on: fp64, zero them between steps. Unasked, nothing is timed."""
        seconds = torch.zeros(len(REGIONS), dtype=torch.float64)
        self._held.append(seconds)
        self._native.clock(seconds.data_ptr())
        return seconds

    @property
    def scratch(self) -> int:
        """Bytes that regions hand results to each other in, of the largest step so far; all layers use the same."""
        return int(self._native.scratch())

    def cache(self, store: KvStore) -> None:
        """Where keys and values lie; another store may take its place between steps."""
        self.store = store
        for layer in range(self.layers):
            self._native.cache(layer, store.layer(layer))

    def step(self, numbers: array[int], rows: int, sequences: int, logits_NV: Tensor, layers: int, mass: Tensor | None = None, adapted: Adapted = ()) -> None:
        """`decoder_step` from tokens to logits without a trip through the dispatcher or a tensor for each list: for who runs step after step.

        numbers: tokens [rows], positions [rows], cu_q [sequences + 1], lengths [sequences], sampled [N] and tables [sequences, blocks], one
        behind the other. logits_NV: contiguous fp32, written. layers: so many of the first.
        """
        sampled = logits_NV.shape[0]
        blocks, rest = divmod(len(numbers) - 2 * rows - 2 * sequences - 1 - sampled, sequences)
        assert rest == 0 and blocks > 0 and numbers.itemsize == 4, f"{len(numbers)} numbers are no step of {rows} rows of {sequences} sequences"
        tokens, _ = numbers.buffer_info()
        positions = tokens + 4 * rows
        cu_q = positions + 4 * rows
        lengths = cu_q + 4 * (sequences + 1)
        asked = lengths + 4 * sequences
        into = (0, 0) if mass is None else self._mass(mass, sequences, max(numbers[2 * rows + sequences + 1 :][:sequences]))
        self._native.forward(tokens, 0, positions, rows, sequences, cu_q, lengths, asked + 4 * sampled, blocks, 0, layers, asked, sampled, logits_NV.data_ptr(),
                             *into, None, [(a, b, whose.native()) for a, b, whose in adapted] if adapted else ())  # fmt: skip

    def _mass(self, mass: Tensor, sequences: int, longest: int) -> tuple[int, int]:
        """Address and stride of what attention adds to."""
        assert mass.shape[:3] == (self.layers, sequences, self.kv_heads) and mass.is_contiguous() and mass.dtype == torch.float32, (
            f"mass must be fp32 [{self.layers}, {sequences}, {self.kv_heads}, longest]"
        )
        assert mass.shape[3] >= longest, "mass has room for fewer keys than the longest sequence has"
        return mass.data_ptr(), mass.shape[3]

    def _weight(self, weight: PackedWeight) -> Any:
        self._held.append(weight)
        return weight.native

    def _address(self, tensor: Tensor | None) -> int:
        if tensor is None:
            return 0
        kept = tensor.detach().float().contiguous()
        self._held.append(kept)
        return kept.data_ptr()


def _int32(tensor: Tensor, name: str) -> Tensor:
    assert tensor.dtype == torch.int32 and tensor.is_contiguous(), f"{name} must be contiguous int32, got {tensor.dtype}"
    return tensor


def _run(plan: int, tokens: Tensor | None, hidden: Tensor, positions: Tensor, cu_q: Tensor, lengths: Tensor, tables: Tensor, sampled: Tensor,
         first: int, last: int, mass: Tensor | None = None, reduce: Any = None, adapted: Adapted = ()) -> Tensor:
    owner = _plans[plan]
    rows, sequences = hidden.shape[0], lengths.shape[0]
    assert hidden.shape[1] == owner.dim and hidden.is_contiguous() and hidden.dtype == torch.float32, f"hidden must be [rows, {owner.dim}] fp32"
    assert tables.shape[0] == sequences and cu_q.shape[0] == sequences + 1 and positions.shape[0] == rows, "one table and one length a sequence"
    for name, tensor in (("positions", positions), ("cu_q", cu_q), ("lengths", lengths), ("tables", tables), ("sampled", sampled)):
        _int32(tensor, name)
    into = (0, 0) if mass is None else owner._mass(mass, sequences, int(lengths.max()) if sequences else 0)
    start = 0 if tokens is None else _int32(tokens, "tokens").data_ptr()
    logits = hidden.new_empty(sampled.shape[0], owner.vocab)
    owner._native.forward(start, hidden.data_ptr(), positions.data_ptr(), rows, sequences, cu_q.data_ptr(), lengths.data_ptr(), tables.data_ptr(),
                          tables.shape[1], first, last, sampled.data_ptr(), sampled.shape[0], logits.data_ptr(), *into, reduce,
                          [(a, b, whose.native()) for a, b, whose in adapted])  # fmt: skip
    return logits


def _fake(plan: int, tokens: Tensor | None, hidden: Tensor, positions: Tensor, cu_q: Tensor, lengths: Tensor, tables: Tensor, sampled: Tensor,
          first: int, last: int, mass: Tensor | None = None) -> Tensor:
    return hidden.new_empty(sampled.shape[0], _plans[plan].vocab)


STEP = native.define("decoder_step(int plan, Tensor? tokens, Tensor(a!) hidden, Tensor positions, Tensor cu_q, Tensor lengths, Tensor tables, "
                     "Tensor sampled, int first, int last, Tensor(b!)? mass=None) -> Tensor", _run, _fake)  # fmt: skip


def decoder_step(
    plan: StepPlan, tokens_R: Tensor | None, hidden_RC: Tensor | None, *, positions_R: Tensor, cu_q: Tensor, lengths: Tensor, tables: Tensor,
    sampled_N: Tensor, layers: tuple[int, int] | None = None, mass: Tensor | None = None, reduce: Reduce | None = None,
    adapted: Adapted = (),
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """One step of layers [a, b) over R packed rows: (hidden states [R, C] after layer b - 1, logits [N, vocab] of the rows `sampled_N`).

    tokens_R (int32) are embedded first; None: hidden_RC is gone on from, and written in place. cu_q [S + 1], lengths [S] (keys of each
    sequence, the new ones included), tables [S, blocks], positions_R and sampled_N: int32. Logits only make sense after the last layer.
    mass [all layers, S, kv_heads, >= longest] fp32: what ops/paged.py adds to it, layer by layer (H2O's accumulated attention).
    reduce: called with a flat view of the partial sums after O and after down, before they are added to the residual.
    adapted: rows that get the low-rank updates of an adapter; segments do not overlap.
    """
    assert (tokens_R is None) != (hidden_RC is None), "either tokens or hidden states go in"
    first, last = layers or (0, plan.layers)
    if hidden_RC is None:
        hidden_RC = torch.empty(positions_R.shape[0], plan.dim)
    assert reduce is None or not adapted, "updates of sharded products are not summed over ranks"
    if reduce is None and not adapted:
        return hidden_RC, STEP(plan.handle, tokens_R, hidden_RC, positions_R, cu_q, lengths, tables, sampled_N, first, last, mass)
    return hidden_RC, _run(plan.handle, tokens_R, hidden_RC, positions_R, cu_q, lengths, tables, sampled_N, first, last, mass,
                           None if reduce is None else _hook(reduce), adapted)  # fmt: skip


def _hook(reduce: Reduce) -> Callable[[int, int], None]:
    import ctypes

    def call(address: int, count: int) -> None:
        reduce(torch.frombuffer((ctypes.c_float * count).from_address(address), dtype=torch.float32))

    return call
