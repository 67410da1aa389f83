"""Kernels against torch: time, rate, share of the machine's limit, ratio to torch's plain op and to its best stock one.

Limits are measured first, in the same run (ops/roofline.py): a share counts bytes over read bandwidth or operations over the fma
or int8 peak, whichever limit is nearer. Weights that are read once a call are larger than the caches in the section `memory` only;
shares above 100 % are what a cache gives.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Collection, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lilliput.loops.bench import alternate, ratio
from lilliput.ops import adamw, codecs, flash, float_codecs, fused, low_rank, nf4, packed, paged, q4, roofline, sampling, sparse, varlen
from lilliput.ops.panels import PackedWeight

COLUMNS = ["op", "shape", "us", "rate", "% of limit", "x torch", "x best stock", "best stock"]
MATRICES = [(3072, 576), (576, 1536), (49152, 576)]  # SmolLM2-135M: gate and up, down, head
BEYOND = (81920, 1024)  # 4 bits of it are 47 MB: no cache holds them
ROWS = (1, 16, 64)

Line = tuple[str, str, dict[str, float], str, Callable[[], object], Callable[[], object], dict[str, Any]]


def measure(rounds: int, note: Callable[[str], None], only: Collection[str] = ()) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(the limits as text, one row a kernel and shape); only: of these SECTIONS, else of all."""
    limits = roofline.measure()
    said = {"read": f"{limits.read / 1e9:.1f} GB/s", "fma": f"{limits.fma / 1e9:.0f} GFLOP/s", "int8": f"{limits.int8 / 1e9:.0f} GOP/s"}
    note(", ".join(f"{key} {value}" for key, value in said.items()))
    rows = []
    for name, section in SECTIONS.items():
        if only and name not in only:
            continue
        with torch.inference_mode(name != "training"):
            for op, shape, work, rate, ours, plain, stock in section():
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


def _products(matrices: Collection[tuple[int, int]] = MATRICES, counts: tuple[int, ...] = ROWS) -> Iterator[Line]:
    """Every storage of a product's weight beside fbgemm's int8 and fp16."""
    for outputs, inputs in matrices:
        weight = torch.randn(outputs, inputs) * 0.1
        stock8 = torch.ao.nn.quantized.dynamic.Linear(inputs, outputs)
        q = torch.quantize_per_channel(weight, weight.abs().amax(1) / 127, torch.zeros(outputs, dtype=torch.long), 0, torch.qint8)
        stock8.set_weight_bias(q, None)
        half = torch.ops.quantized.linear_prepack_fp16(weight, None)
        for name, ours in _formats(weight).items():
            for rows in counts:
                yield _linear(name, ours, weight, rows, {"linear_dynamic int8": stock8, "linear_dynamic_fp16": _fp16(half)})


def _adapters(rows: int = 16, inputs: int = 576, outputs: int = 3072, rank: int = 8) -> Iterator[Line]:
    """LoRA's updates of a batch in which every second row has another adapter; what is read are the adapters."""
    x, y = torch.randn(rows, inputs), torch.zeros(rows, outputs)
    for dtype in (torch.float32, torch.float16):
        plain = [(r, r + 2, (torch.randn(rank, inputs).to(dtype), torch.randn(outputs, rank).to(dtype))) for r in range(0, rows, 2)]
        ours = [(a, b, (down, low_rank.panels_of(up))) for a, b, (down, up) in plain]
        wide = [(a, b, (down.float(), up.float())) for a, b, (down, up) in plain]
        size = dtype.itemsize * len(plain) * rank * (inputs + outputs)
        yield (f"LoRA rows, {len(plain)} adapters, {'fp32' if dtype == torch.float32 else 'fp16'}", f"{rows} x {inputs} -> {rank} -> {outputs}",
               {"bytes": float(size)}, "bytes", partial(low_rank.add_grouped, x, ours, y), partial(_plain_low_rank, x, wide, y), {})


def _plain_low_rank(x: Tensor, segments: list[tuple[int, int, low_rank.Pair]], y: Tensor) -> None:
    y.add_(low_rank.grouped(x, segments, y.shape[1]))


def _frozen(outputs: int = 3072, inputs: int = 576) -> Iterator[Line]:
    """QLoRA's matrices decoded to fp32: bytes read and written."""
    for name, codec, op, plain in (("NF4", nf4.Nf4, nf4.DECODE, nf4.reference), ("Q4_1", q4.Q4, q4.DECODE, q4.reference)):
        for double in (True, False):
            made = codec(outputs, inputs, double)
            stored = torch.zeros(made.bytes, dtype=torch.uint8)
            yield (f"{name} decoded{', scales in int8' if double else ''}", f"{outputs} x {inputs}", {"bytes": 4.0 * outputs * inputs + made.bytes}, "bytes",
                   partial(op, stored, outputs, inputs, double), partial(plain, stored, outputs, inputs, double), {})


def _sampler(rows: int = 16, vocab: int = 49152) -> Iterator[Line]:
    logits = torch.randn(rows, vocab) * 3
    seen = dict.fromkeys(range(0, 2000, 7), 1)
    plain: dict[str, tuple[sampling.Draw, Callable[[], object]]] = {
        "greedy": (sampling.GREEDY, lambda: (logits.argmax(-1), logits.logsumexp(-1))),
        "temperature": (sampling.Draw(0.3, 0.8), lambda: (logits / 0.8).softmax(-1).multinomial(1)),
        "top-p": (sampling.Draw(0.3, 0.8, top_p=0.9), lambda: _sorted_top_p(logits)),
        "top-k, penalty": (sampling.Draw(0.3, 0.8, top_k=50, repetition_penalty=1.1, seen=seen), lambda: _top_k(logits, list(seen))),
    }
    for name, (how, reference) in plain.items():
        ours = partial(sampling.choose_rows, logits, [how] * rows)
        yield (f"sampler {name}", f"{rows} x {vocab}", {"bytes": float(logits.nbytes)}, "bytes", ours, reference, {})


def _top_k(logits_NV: Tensor, seen: list[int]) -> None:
    scores = logits_NV.clone()
    scores[:, seen] = torch.where(scores[:, seen] > 0, scores[:, seen] / 1.1, scores[:, seen] * 1.1)
    values, ids = scores.topk(50)
    ids.gather(1, (values / 0.8).softmax(-1).multinomial(1))


def _formats(weight: Tensor) -> dict[str, tuple[PackedWeight, str]]:
    return {
        "w8 x int8": (codecs.quantize_w8(weight), "int8"),
        "w8 x int8, static": (codecs.quantize_w8(weight), "int8"),
        "q4 g32 x int8": (codecs.quantize_q4(weight, 32), "int8"),
        "q4 g32 mins x int8": (codecs.quantize_q4(weight, 32, "mins"), "int8"),
        **({"q4 g128 x int8": (codecs.quantize_q4(weight, 128), "int8")} if weight.shape[1] % 128 == 0 else {}),
        "q4 g64 x fp32": (codecs.quantize_q4(weight, 64), "fp32"),
        "nf4 g64": (float_codecs.encode(weight, "nf4"), "fp32"),
        "e4m3": (float_codecs.encode(weight, "e4m3"), "fp32"),
        "e5m2": (float_codecs.encode(weight, "e5m2"), "fp32"),
        "f16": (float_codecs.encode(weight, "f16"), "fp32"),
        "f32": (float_codecs.encode(weight, "f32"), "fp32"),
    }


def _linear(name: str, ours: tuple[PackedWeight, str], weight: Tensor, rows: int, stock: dict[str, Callable[[Tensor], object]]) -> Line:
    packed_weight, how = ours
    x = torch.randn(rows, weight.shape[1])
    operations = 2.0 * rows * weight.numel()
    work = {"bytes": float(packed_weight.bytes), "int8" if how == "int8" else "flops": operations}
    others = {title: (lambda op=op: op(x)) for title, op in stock.items()}
    static = torch.full((packed_weight.groups,), 4.0 / 127) if "static" in name else None
    return (f"linear {name}", f"{rows} x {weight.shape[1]} -> {weight.shape[0]}", work, "bytes" if rows == 1 else "int8" if how == "int8" else "flops",
            lambda: packed.linear(x, packed_weight, activations=how, static_G=static), lambda: F.linear(x, weight), others)  # fmt: skip


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
    a, stored = torch.randn(1, ids.numel()), weight.t().contiguous()  # a down matrix [inputs, outputs]: its columns are our rows
    whole_row = F.pad(a, (0, outputs - ids.numel()))
    yield ("20 % of the columns", f"1 x {outputs} -> {inputs}", work, "bytes", lambda: rows.add(a, ids), lambda: F.linear(whole_row, stored),
           {"index_select, matmul": lambda: a @ weight.index_select(0, ids)})  # fmt: skip
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
    """Rows in 8 bits; ByteTransformer's fused steps between products and its packing, on the rows of BERT-base."""
    for count, inputs in ((64, 576), (64, 1536)):
        narrow = torch.randn(count, inputs)
        sides = partial(packed.rows8, narrow), partial(packed.quantize_rows, narrow, 0)
        yield ("rows to int8", f"{count} x {inputs}", {"bytes": 1.25 * narrow.nbytes}, "bytes", *sides, {})
    x, residual, bias = torch.randn(rows, width), torch.randn(rows, width), torch.randn(width)
    wide, wide_bias = torch.randn(rows, 4 * width), torch.randn(4 * width)
    weight, shift = torch.ones(width), torch.zeros(width)
    yield ("bias + GELU", f"{rows} x {4 * width}", {"bytes": 2.0 * wide.nbytes}, "bytes", lambda: fused.bias_gelu(wide, wide_bias),
           lambda: F.gelu(wide + wide_bias), {})  # fmt: skip
    yield ("bias + residual + LayerNorm", f"{rows} x {width}", {"bytes": 3.0 * x.nbytes}, "bytes",
           lambda: fused.residual_norm(x, bias, residual, weight, shift, 1e-12),
           lambda: F.layer_norm(x + bias + residual, (width,), weight, shift, 1e-12), {})  # fmt: skip
    lengths = torch.linspace(0.2, 1, 16).mul(256).long()  # mean / longest 0.6
    mask = torch.arange(256) < lengths[:, None]
    batch, packing = torch.randn(16, 256, width), varlen.Packing(mask)
    valid = packing.pack(batch)
    yield ("pack rows", f"16 x 256 x {width}, 60 %", {"bytes": 2.0 * valid.nbytes}, "bytes", lambda: packing.pack(batch), lambda: batch[mask], {})
    yield ("unpack rows", f"16 x 256 x {width}, 60 %", {"bytes": float(valid.nbytes + batch.nbytes)}, "bytes", lambda: packing.unpack(valid),
           lambda: torch.zeros_like(batch).masked_scatter_(mask[:, :, None], valid), {})  # fmt: skip
    q, k, v = (torch.randn(packing.count, 12, 64) for _ in range(3))
    padded = [packing.unpack(t).transpose(1, 2).contiguous() for t in (q, k, v)]
    flops = 4.0 * 64 * 12 * float(lengths.square().sum())
    yield ("varlen flash", "16 x 12 x 256 x 64, 60 %", {"flops": flops}, "flops", lambda: packing.attention(q, k, v),
           lambda: varlen.attention_reference(q, k, v, packing.cu),
           {"SDPA, padded": lambda: F.scaled_dot_product_attention(padded[0], padded[1], padded[2], mask[:, None, None])})  # fmt: skip


def _attention() -> Iterator[Line]:
    for batch, heads, tokens in ((1, 9, 256), (1, 9, 512), (2, 9, 1024), (1, 9, 2048)):
        q, k, v = (torch.randn(batch, tokens, heads, 64).transpose(1, 2) for _ in range(3))
        flops = 2.0 * batch * heads * tokens * (tokens + 1) * 64
        ours, plain = partial(flash.attention, q, k, v, causal=True), partial(F.scaled_dot_product_attention, q, k, v, is_causal=True)
        yield ("flash forward, causal", f"{batch} x {heads} x {tokens} x 64", {"flops": flops}, "flops", ours, plain, {})


def _paged() -> Iterator[Line]:
    for batch, tokens in ((1, 128), (1, 2048), (16, 512)):
        for codec in paged.CODECS:
            yield _cached(batch, tokens, 1, codec)
    yield _cached(16, 512, 1, "fp16", mass=True)
    yield _cached(1, 2048, 1, "fp16", mass=True)
    for codec in paged.CODECS:
        yield _cached(1, 512, 512, codec)
    yield _cached(1, 2048, 128, "fp16")


def _cached(batch: int, tokens: int, new: int, codec: str, mass: bool = False, heads: int = 9, kv_heads: int = 3, dim: int = 64) -> Line:
    """The last `new` tokens of `batch` sequences over caches of `tokens`; torch: its own attention over contiguous fp32 caches, one after another."""
    each = -(-tokens // 16)
    store = paged.KvStore(layers=1, blocks=batch * each, kv_heads=kv_heads, head_dim=dim, codec=codec)
    tables = torch.randperm(batch * each).to(torch.int32).view(batch, each)
    lengths = torch.full((batch,), tokens, dtype=torch.int32)
    k, v = torch.randn(batch * tokens, kv_heads, dim), torch.randn(batch * tokens, kv_heads, dim)
    paged.write(store, 0, k, v, torch.arange(batch + 1, dtype=torch.int32) * tokens, lengths, tables)
    q, cu_q = torch.randn(batch * new, heads, dim), torch.arange(batch + 1, dtype=torch.int32) * new
    keys, values = (x.view(batch, tokens, kv_heads, dim).transpose(1, 2).contiguous() for x in (k, v))
    seen = torch.zeros(batch, kv_heads, tokens) if mass else None
    visible = torch.ones(new, tokens, dtype=torch.bool).tril(tokens - new)

    def plain() -> list[Tensor]:
        answers = []
        for b in range(batch):
            mine = q[b * new : (b + 1) * new].transpose(0, 1)[None]
            whole = 1 < new == tokens
            seen_by = None if whole or new == 1 else visible
            answers.append(F.scaled_dot_product_attention(mine, keys[b, None], values[b, None], seen_by, is_causal=whole, enable_gqa=True))
        return answers

    work = {"bytes": float(batch * tokens * store.bytes_per_token), "flops": 4.0 * batch * heads * dim * new * (tokens - (new - 1) / 2)}
    name = f"paged {'decode' if new == 1 else 'prefill'}, {codec}{', attention mass' if mass else ''}"
    return (name, f"{batch} x {heads}/{kv_heads} x {f'{new} of ' if new > 1 else ''}{tokens} x {dim}", work, "bytes" if new == 1 else "flops",
            lambda: paged.attention(store, 0, q, cu_q, lengths, tables, mass=seen), plain, {})  # fmt: skip


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
    yield from _updates()


def _updates(count: int = 8_000_000) -> Iterator[Line]:
    """AdamW beside torch's fused one: fp32; bf16, which ours rounds stochastically; fp32 masters of bf16 weights, where torch copies afterwards."""
    rule = adamw.Rule(1e-3, (0.9, 0.95), 1e-8, 0.1, 3)
    how: dict[str, Any] = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.95, "weight_decay": 0.1, "eps": 1e-8, "amsgrad": False, "maximize": False}
    w, g, m, s = (torch.rand(count) for _ in range(4))
    w16, g16, m16, s16 = (t.bfloat16() for t in (w, g, m, s))

    def fused(weight: Tensor, gradient: Tensor, first: Tensor, second: Tensor) -> None:
        torch._fused_adamw_([weight], [gradient], [first], [second], [], [torch.tensor(3.0)], **how)

    def copied() -> None:
        fused(w, g16.float(), m, s)
        w16.copy_(w)

    yield ("adamw fp32", f"{count:,}", {"bytes": 28.0 * count}, "bytes", lambda: adamw.update(w, g, m, s, rule, 0), lambda: fused(w, g, m, s), {})
    yield ("adamw bf16, fp32 moments", f"{count:,}", {"bytes": 22.0 * count}, "bytes", lambda: adamw.update(w16, g16, m, s, rule, 0),
           lambda: fused(w16, g16, m16, s16), {})  # fmt: skip
    yield ("adamw masters, bf16 copy", f"{count:,}", {"bytes": 28.0 * count}, "bytes", lambda: adamw.update_master(w, g16, m, s, w16, rule), copied, {})


SECTIONS: dict[str, Callable[[], Iterator[Line]]] = {
    "linear": _products, "memory": partial(_products, [BEYOND], (1,)), "parts": _parts_of_matrices, "rows": _rowwise, "adapters": _adapters, "frozen": _frozen,
    "attention": _attention, "cache": _paged, "sampler": _sampler, "training": training,
}  # fmt: skip
