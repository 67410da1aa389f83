"""Kernels against torch: time, rate, share of the machine's limit, ratio to torch's plain op and to its best stock one.

Limits are measured first, in the same run (ops/roofline.py): a share counts bytes over read bandwidth or operations over the fma
or int8 peak, whichever limit is nearer. Weights that are read once a call are larger than the caches in the widest shape only;
shares above 100 % are what a cache gives.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lilliput.loops.bench import alternate, ratio
from lilliput.ops import adamw, codecs, flash, float_codecs, fused, packed, paged, roofline, sampling, sparse
from lilliput.ops.panels import PackedWeight

COLUMNS = ["op", "shape", "us", "rate", "% of limit", "x torch", "x best stock", "best stock"]
MATRICES = [(3072, 576), (576, 1536), (49152, 576)]  # SmolLM2-135M: gate and up, down, head
ROWS = (1, 16, 64)

Line = tuple[str, str, dict[str, float], str, Callable[[], object], Callable[[], object], dict[str, Any]]


def measure(rounds: int, note: Callable[[str], None]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(the limits as text, one row a kernel and shape)."""
    limits = roofline.measure()
    said = {"read": f"{limits.read / 1e9:.1f} GB/s", "fma": f"{limits.fma / 1e9:.0f} GFLOP/s", "int8": f"{limits.int8 / 1e9:.0f} GOP/s"}
    note(", ".join(f"{key} {value}" for key, value in said.items()))
    rows = []
    with torch.inference_mode():
        for op, shape, work, rate, ours, plain, stock in lines():
            rows.append(_row(op, shape, work, rate, alternate({"ours": ours, "torch": plain, **stock}, rounds), limits))
            note(f"{op} {shape}: {rows[-1]['us']} us, {rows[-1]['rate']}, {rows[-1]['x torch']} x torch")
    for line in training():
        op, shape, work, rate, ours, plain, stock = line
        rows.append(_row(op, shape, work, rate, alternate({"ours": ours, "torch": plain, **stock}, rounds), limits))
        note(f"{op} {shape}: {rows[-1]['us']} us, {rows[-1]['rate']}, {rows[-1]['x torch']} x torch")
    return said, rows


def _row(op: str, shape: str, work: dict[str, float], rate: str, times: dict[str, list[float]], limits: roofline.Roofline) -> dict[str, Any]:
    seconds = statistics.median(times["ours"])
    best = min((name for name in times if name != "ours"), key=lambda name: statistics.median(times[name]))
    amount = work[rate] / seconds / 1e9
    unit = {"bytes": "GB/s", "flops": "GFLOP/s", "int8": "GOP/s"}[rate]
    share = round(100 * limits.seconds(**work) / seconds)
    return {"op": op, "shape": shape, "us": round(seconds * 1e6, 1), "rate": f"{amount:.0f} {unit}", "% of limit": share,
            "x torch": round(ratio(times, "ours", "torch"), 2), "x best stock": round(ratio(times, "ours", best), 2), "best stock": best}  # fmt: skip


def lines() -> Iterator[Line]:
    """Every inference kernel."""
    for outputs, inputs in MATRICES:
        weight = torch.randn(outputs, inputs) * 0.1
        stock8 = torch.ao.nn.quantized.dynamic.Linear(inputs, outputs)
        q = torch.quantize_per_channel(weight, weight.abs().amax(1) / 127, torch.zeros(outputs, dtype=torch.long), 0, torch.qint8)
        stock8.set_weight_bias(q, None)
        half = torch.ops.quantized.linear_prepack_fp16(weight, None)
        for name, ours in _formats(weight).items():
            for rows in ROWS:
                yield _linear(name, ours, weight, rows, {"linear_dynamic int8": stock8, "linear_dynamic_fp16": _fp16(half)})
    yield from _parts_of_matrices()
    yield from _rowwise()
    yield from _attention()
    logits = torch.randn(16, 49152) * 3
    draws = [sampling.Draw(0.3, 0.8, top_p=0.9) for _ in range(16)]
    yield ("sampler top-p", "16 x 49152", {"bytes": logits.nbytes}, "bytes", lambda: sampling.choose_rows(logits, draws), lambda: _sorted_top_p(logits), {})


def _formats(weight: Tensor) -> dict[str, tuple[PackedWeight, str]]:
    return {
        "w8 x int8": (codecs.quantize_w8(weight), "int8"),
        "q4 g32 x int8": (codecs.quantize_q4(weight, 32), "int8"),
        "q4 g32 mins x int8": (codecs.quantize_q4(weight, 32, "mins"), "int8"),
        "q4 g64 x fp32": (codecs.quantize_q4(weight, 64), "fp32"),
        "nf4 g64": (float_codecs.encode(weight, "nf4"), "fp32"),
        "e4m3": (float_codecs.encode(weight, "e4m3"), "fp32"),
        "f16": (float_codecs.encode(weight, "f16"), "fp32"),
        "f32": (float_codecs.encode(weight, "f32"), "fp32"),
    }


def _linear(name: str, ours: tuple[PackedWeight, str], weight: Tensor, rows: int, stock: dict[str, Callable[[Tensor], object]]) -> Line:
    packed_weight, how = ours
    x = torch.randn(rows, weight.shape[1])
    operations = 2.0 * rows * weight.numel()
    work = {"bytes": float(packed_weight.bytes), "int8" if how == "int8" else "flops": operations}
    others = {title: (lambda op=op: op(x)) for title, op in stock.items()}
    return (f"linear {name}", f"{rows} x {weight.shape[1]} -> {weight.shape[0]}", work, "bytes" if rows == 1 else "int8" if how == "int8" else "flops",
            lambda: packed.linear(x, packed_weight, activations=how), lambda: F.linear(x, weight), others)  # fmt: skip


def _fp16(prepacked: Any) -> Callable[[Tensor], object]:
    return lambda x: torch.ops.quantized.linear_dynamic_fp16(x, prepacked)


def _parts_of_matrices(outputs: int = 3072, inputs: int = 576, share: float = 0.2) -> Iterator[Line]:
    """A fifth of a matrix: chosen rows for one token, 16 x 16 tiles for many. torch: the whole matrix; stock: its own gather or block-sparse product."""
    weight = torch.randn(outputs, inputs) * 0.1
    ids = torch.randperm(outputs)[: int(share * outputs)].sort().values.to(torch.int32)
    rows, x = sparse.RowMatrix(weight), torch.randn(1, inputs)
    work = {"bytes": 4.0 * ids.numel() * inputs, "flops": 2.0 * ids.numel() * inputs}
    yield ("20 % of the rows", f"1 x {inputs} -> {outputs}", work, "bytes", lambda: rows.dots(x, ids), lambda: F.linear(x, weight),
           {"index_select, linear": lambda: F.linear(x, weight.index_select(0, ids))})  # fmt: skip
    keep = torch.rand(outputs // sparse.TILE, inputs // sparse.TILE) < share
    tiles, dense = sparse.prune_tiles(weight, keep), float_codecs.encode(weight, "f32")
    whole = tiles.dense()
    blocks = whole.to_sparse_bsr((sparse.TILE, sparse.TILE))
    for count in (1, 16, 128):
        many = torch.randn(count, inputs)
        work = {"bytes": float(tiles.bytes), "flops": 2.0 * count * tiles.data.numel()}
        others: dict[str, Callable[[], object]] = {
            "sparse_bsr": partial(F.linear, many, blocks), "ours, dense": partial(packed.linear, many, dense, activations="fp32")
        }  # fmt: skip
        yield (f"{100 * tiles.density:.0f} % of the tiles", f"{count} x {inputs} -> {outputs}", work, "bytes" if count == 1 else "flops",
               partial(tiles.product, many), partial(F.linear, many, whole), others)  # fmt: skip


def _rowwise(rows: int = 2048, width: int = 768) -> Iterator[Line]:
    """ByteTransformer's fused steps between products, on the rows of BERT-base."""
    x, residual, bias = torch.randn(rows, width), torch.randn(rows, width), torch.randn(width)
    wide, wide_bias = torch.randn(rows, 4 * width), torch.randn(4 * width)
    weight, shift = torch.ones(width), torch.zeros(width)
    yield ("bias + GELU", f"{rows} x {4 * width}", {"bytes": 2.0 * wide.nbytes}, "bytes", lambda: fused.bias_gelu(wide, wide_bias),
           lambda: F.gelu(wide + wide_bias), {})  # fmt: skip
    yield ("bias + residual + LayerNorm", f"{rows} x {width}", {"bytes": 3.0 * x.nbytes}, "bytes",
           lambda: fused.residual_norm(x, bias, residual, weight, shift, 1e-12),
           lambda: F.layer_norm(x + bias + residual, (width,), weight, shift, 1e-12), {})  # fmt: skip


def _attention() -> Iterator[Line]:
    for batch, heads, tokens in ((1, 9, 256), (1, 9, 512), (2, 9, 1024), (1, 9, 2048)):
        q, k, v = (torch.randn(batch, tokens, heads, 64).transpose(1, 2) for _ in range(3))
        flops = 2.0 * batch * heads * tokens * (tokens + 1) * 64
        ours, plain = partial(flash.attention, q, k, v, causal=True), partial(F.scaled_dot_product_attention, q, k, v, is_causal=True)
        yield ("flash forward, causal", f"{batch} x {heads} x {tokens} x 64", {"flops": flops}, "flops", ours, plain, {})
    for batch, tokens in ((1, 128), (1, 2048), (16, 512)):
        yield _decode(batch, tokens)


def _decode(batch: int, tokens: int, heads: int = 9, kv_heads: int = 3, dim: int = 64) -> Line:
    """One token of `batch` sequences over caches of `tokens`; torch: its own attention, one sequence after another, over contiguous caches."""
    each = -(-tokens // 16)
    store = paged.KvStore(layers=1, blocks=batch * each, kv_heads=kv_heads, head_dim=dim)
    tables = torch.randperm(batch * each).to(torch.int32).view(batch, each)
    lengths = torch.full((batch,), tokens, dtype=torch.int32)
    k, v = torch.randn(batch * tokens, kv_heads, dim), torch.randn(batch * tokens, kv_heads, dim)
    paged.write(store, 0, k, v, torch.arange(batch + 1, dtype=torch.int32) * tokens, lengths, tables)
    q, cu_q = torch.randn(batch, heads, dim), torch.arange(batch + 1, dtype=torch.int32)
    keys, values = (x.view(batch, tokens, kv_heads, dim).transpose(1, 2).contiguous() for x in (k, v))

    def plain() -> None:
        for b in range(batch):
            F.scaled_dot_product_attention(q[b, None, :, None], keys[b, None], values[b, None], enable_gqa=True)

    work = {"bytes": 2.0 * k.nbytes}
    shape = f"{batch} x {heads}/{kv_heads} x {tokens} x {dim}"
    return ("paged decode", shape, work, "bytes", lambda: paged.attention(store, 0, q, cu_q, lengths, tables), plain, {})


def _sorted_top_p(logits_NV: Tensor) -> None:
    """Top-p the usual way: sort, cumulative sum, mask, draw."""
    values, ids = (logits_NV / 0.8).sort(dim=-1, descending=True)
    p = values.softmax(-1)
    p = p.masked_fill(p.cumsum(-1) - p > 0.9, 0.0)
    ids.gather(1, p.multinomial(1))


def _flash(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return flash.attention(q, k, v, causal=True)


def _sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def _both_ways(run: Callable[[Tensor, Tensor, Tensor], Tensor], q: Tensor, k: Tensor, v: Tensor, d_o: Tensor) -> None:
    torch.autograd.grad(run(q, k, v), (q, k, v), d_o)


def training() -> Iterator[Line]:
    """Kernels of training: attention forward and backward, AdamW."""
    for batch, heads, tokens in ((1, 9, 512), (2, 9, 1024)):
        q, k, v = (torch.randn(batch, tokens, heads, 64).transpose(1, 2).requires_grad_() for _ in range(3))
        d_o = torch.randn(batch, tokens, heads, 64).transpose(1, 2)
        flops = 3.5 * 2.0 * batch * heads * tokens * (tokens + 1) * 64
        ours, plain = (partial(_both_ways, run, q, k, v, d_o) for run in (_flash, _sdpa))
        yield ("flash forward + backward, causal", f"{batch} x {heads} x {tokens} x 64", {"flops": flops}, "flops", ours, plain, {})
    count = 8_000_000
    w, g, m, s = (torch.rand(count) for _ in range(4))
    rule = adamw.Rule(1e-3, (0.9, 0.95), 1e-8, 0.1, 3)

    def fused() -> None:
        how: dict[str, Any] = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.95, "weight_decay": 0.1, "eps": 1e-8, "amsgrad": False, "maximize": False}
        torch._fused_adamw_([w], [g], [m], [s], [], [torch.tensor(3.0)], **how)

    yield ("adamw", f"{count:,}", {"bytes": 28.0 * count}, "bytes", lambda: adamw.update(w, g, m, s, rule, 0), fused, {})
