"""FlashAttention-2: exact attention, forward and backward, that never holds a row of scores longer than a tile.

Queries pass over tiles of 64 keys with a running maximum m and sum l; the division by l comes once, at the end. Forward keeps O and
L = m + log l beside its inputs: memory grows with S, not S^2. Backward computes P = exp(S - L) again, tile by tile:

    dV += P^T dO      dS = P * (dO V^T - rowsum(dO * O))      dK += dS^T Q      dQ += dS K

Causal masks skip hidden tiles whole and mask only those on the diagonal. Key heads are shared by groups (GQA), their gradients summed
over the group in a fixed order: gradients are the same bits for any number of threads. ALiBi, sliding windows with sinks, and packed
sequences (cu_seqlens). Only O(S) extra memory for the transposed keys. When not: tiny sequences, where the calls cost more.

Short sequences take E.T.'s on-the-fly form on the CPU: the scores of 16 queries with every key stay in the cache and the softmax is
taken once over whole rows. Its partial form, all scores in memory first, is there to be measured.

Dao 2023, arXiv 2307.08691, section 3.1; Chen et al. 2021 (E.T.), doi 10.1145/3458817.3476138, section 3. On CUDA: ops/triton/flash.py.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import Tensor

from lilliput.ops import native

LARGEST = 256  # head dimension
MOST_KEYS = 2**31 - 64
# How the forward pass of a sequence runs, by its own number of keys: (up to so many on the fly in strips, all scores in memory first).
# auto is measured (benchmarks/flash_forms.py): strips are 0 to 6 % faster up to 512 keys, tiles beyond; scores in memory never are.
FORMS = {"auto": (512, False), "tiled": (0, False), "strip": (MOST_KEYS, False), "partial": (0, True)}
TRITON = importlib.util.find_spec("triton") is not None


def supports(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    """Why the kernels cannot take these tensors; None when they can: the compiled ones on the CPU, Triton's on CUDA."""
    devices = {x.device for x in (q, k, v)}
    if len(devices) > 1 or q.device.type not in ("cpu", "cuda"):
        return f"flash runs on one CPU or CUDA device, got {', '.join(sorted(map(str, devices)))}"
    refusal = _cpu(q, k, v) if q.device.type == "cpu" else _cuda(q, k, v)
    if refusal is not None:
        return refusal
    if max(q.shape[-1], v.shape[-1]) > LARGEST:
        return f"flash takes heads of at most {LARGEST} numbers, got {max(q.shape[-1], v.shape[-1])}"
    if q.dim() == 4 and not q.shape[0] == k.shape[0] == v.shape[0]:
        return "flash broadcasts no batch"
    return None


def _cpu(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    if native.module() is None:
        return native.missing()
    if not q.dtype == k.dtype == v.dtype == torch.float32:
        return f"flash takes fp32 on the CPU, got {q.dtype}, {k.dtype}, {v.dtype}"
    return None


def _cuda(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    if not TRITON:
        return "flash on CUDA needs triton: pip install 'lilliput[triton]'"
    from lilliput.ops.triton import flash as twin

    return twin.supports(q, k, v)


def attention(
    q_BHTD: Tensor, k_BGSD: Tensor, v_BGSD: Tensor, *, causal: bool, window: int | None = None, sinks: int = 0, scale: float | None = None,
    slopes_H: Tensor | None = None, form: str = "auto",
) -> Tensor:  # fmt: skip
    """[B, H, T, D] over [B, G, S, D] -> [B, H, T, D of v], whose memory lies as [B, T, H, D]: joining the heads copies nothing.

    Queries lie at the end of the keys. window: a query sees itself, window - 1 keys before it and the first `sinks`; it needs causal.
    slopes_H: ALiBi, slope * (key - query) joins the scores. A query that sees nothing answers 0. form: see the module;
    every one saves the same L. Call `supports` before.
    """
    numbers = causal, window or 0, sinks, _scale(q_BHTD, scale)
    return FORWARD(_rows(q_BHTD), _rows(k_BGSD), _rows(v_BGSD), None, None, *numbers, *FORMS[form], slopes_H)[0]


def scores() -> tuple[int, int]:
    """Bytes of scratch that this thread's largest call so far has left: (scores and results that each worker has at once, all scores of the partial form)."""
    found = native.module()
    assert found is not None, "ask native.missing() first"
    each, whole = found.flash_scratch()
    return each // found.threads(), whole


def attention_varlen(
    q_THD: Tensor, k_TGD: Tensor, v_TGD: Tensor, cu_q: Tensor, cu_k: Tensor, *, causal: bool, window: int | None = None, sinks: int = 0,
    scale: float | None = None, slopes_H: Tensor | None = None, form: str = "auto",
) -> Tensor:  # fmt: skip
    """Packed sequences: rows cu_q[s]..cu_q[s + 1] of q over rows cu_k[s]..cu_k[s + 1] of k and v (int32) -> [T, H, D of v]."""
    q, k, v = (_rows(x.transpose(0, 1)[None]) for x in (q_THD, k_TGD, v_TGD))
    cu_q, cu_k = (c.to(torch.int32).contiguous() for c in (cu_q, cu_k))
    numbers = causal, window or 0, sinks, _scale(q_THD, scale)
    return FORWARD(q, k, v, cu_q, cu_k, *numbers, *FORMS[form], slopes_H)[0][0].transpose(0, 1)


def reference(
    q_BHTD: Tensor, k_BGSD: Tensor, v_BGSD: Tensor, *, causal: bool, window: int | None = None, sinks: int = 0, scale: float | None = None,
    slopes_H: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The same by plain torch, differentiable: (O, L), L = log sum exp of each query's scores [B, H, T]."""
    group, queries, keys = q_BHTD.shape[1] // k_BGSD.shape[1], q_BHTD.shape[2], k_BGSD.shape[2]
    k, v = k_BGSD.repeat_interleave(group, 1), v_BGSD.repeat_interleave(group, 1)
    ahead = torch.arange(keys) - torch.arange(keys - queries, keys)[:, None]
    scores = q_BHTD @ k.transpose(-1, -2) * _scale(q_BHTD, scale)
    if slopes_H is not None:
        scores = scores + slopes_H.to(scores.dtype)[:, None, None] * ahead
    seen = torch.ones_like(ahead, dtype=torch.bool)
    if causal:
        seen &= ahead <= 0
    if window is not None:
        seen &= (ahead > -window) | (torch.arange(keys) < sinks)
    scores = scores.masked_fill(~seen, float("-inf"))
    return scores.softmax(-1).masked_fill(~seen, 0.0).nan_to_num(0.0) @ v, scores.logsumexp(-1)


def _scale(q: Tensor, scale: float | None) -> float:
    return q.shape[-1] ** -0.5 if scale is None else scale


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _strided(x_BHTD: Tensor) -> tuple[int, int, int, int]:
    batch, head, row, _ = x_BHTD.stride()
    return x_BHTD.data_ptr(), batch, head, row


def _like(rows_of: Tensor, dim: int) -> Tensor:
    """Empty [B, H, T, dim] whose memory lies as [B, T, H, dim]."""
    batch, heads, rows, _ = rows_of.shape
    return rows_of.new_empty(batch, rows, heads, dim).transpose(1, 2)


def _check(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor | None, cu_k: Tensor | None, slopes: Tensor | None) -> None:
    """The kernels trust addresses and borders: a wrong one reads memory that is not theirs."""
    heads, groups = q.shape[1], k.shape[1]
    assert groups and heads % groups == 0, f"{heads} query heads cannot share {groups} key heads"
    assert q.shape[3] == k.shape[3] and k.shape[:3] == v.shape[:3], f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)} do not fit together"
    assert slopes is None or (slopes.dtype == torch.float32 and slopes.is_contiguous() and slopes.shape == (heads,)), f"slopes must be fp32 [{heads}]"
    assert (cu_q is None) == (cu_k is None), "borders of queries without borders of keys, or the other way round"
    if cu_q is None or cu_k is None:
        assert q.shape[0] == k.shape[0], f"batch {q.shape[0]} of queries, {k.shape[0]} of keys"
        return
    assert len(cu_q) == len(cu_k), f"borders of {len(cu_q) - 1} sequences of queries and {len(cu_k) - 1} of keys"
    for name, cu, rows in (("cu_q", cu_q, q.shape[2]), ("cu_k", cu_k, k.shape[2])):
        borders = cu.tolist()
        assert cu.dtype == torch.int32 and borders[0] == 0 and borders[-1] == rows and borders == sorted(borders), (
            f"{name} must be int32 borders that rise from 0 to {rows}; it is {borders}"
        )


def _call(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor | None, cu_k: Tensor | None, causal: bool, window: int, sinks: int, scale: float,
          slopes: Tensor | None) -> tuple[Any, Any]:  # fmt: skip
    module = native.module()
    packed = (0, 0) if cu_q is None or cu_k is None else (cu_q.data_ptr(), cu_k.data_ptr())
    batch = q.shape[0] if cu_q is None else cu_q.shape[0] - 1
    shape = module.FlashShape(batch, q.shape[1], k.shape[1], q.shape[3], v.shape[3], q.shape[2], k.shape[2], *packed)
    return shape, module.FlashMask(causal, window, sinks, scale, 0 if slopes is None else slopes.data_ptr())


def _room(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Empty (O, L)."""
    return _like(q, v.shape[3]), q.new_empty(q.shape[:3], dtype=torch.float32)


def _forward(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor | None, cu_k: Tensor | None, causal: bool, window: int, sinks: int, scale: float,
             strip_keys: int, partial: bool, slopes: Tensor | None) -> tuple[Tensor, Tensor]:  # fmt: skip
    _check(q, k, v, cu_q, cu_k, slopes)
    o, logsum = _room(q, v)
    if not q.numel():
        return o, logsum
    if q.device.type == "cuda":
        from lilliput.ops.triton import flash as twin

        twin.forward(q, k, v, cu_q, cu_k, causal, window, sinks, scale, slopes, o, logsum)
        return o, logsum
    call = _call(q, k, v, cu_q, cu_k, causal, window, sinks, scale, slopes)
    native.module().flash_forward(*call, *map(_strided, (q, k, v, o)), logsum.data_ptr(), strip_keys, partial)
    return o, logsum


def _fake_forward(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return _room(q, v)


def _backward(d_o: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, logsum: Tensor, cu_q: Tensor | None, cu_k: Tensor | None, causal: bool, window: int,
              sinks: int, scale: float, slopes: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    dq, dk, dv = _like(q, q.shape[3]), _like(k, k.shape[3]), _like(v, v.shape[3])
    if not q.numel() or not k.numel():
        return dq.zero_(), dk.zero_(), dv.zero_()
    d_o = _rows(d_o)
    if q.device.type == "cuda":
        from lilliput.ops.triton import flash as twin

        twin.backward(d_o, q, k, v, o, logsum, cu_q, cu_k, causal, window, sinks, scale, slopes, dq, dk, dv)
        return dq, dk, dv
    shape = _call(q, k, v, cu_q, cu_k, causal, window, sinks, scale, slopes)
    native.module().flash_backward(*shape, *map(_strided, (q, k, v, o, d_o)), logsum.data_ptr(), *map(_strided, (dq, dk, dv)))
    return dq, dk, dv


def _fake_backward(d_o: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _like(q, q.shape[3]), _like(k, k.shape[3]), _like(v, v.shape[3])


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, cu_q, cu_k, *ctx.numbers, _, _, slopes = inputs
    ctx.save_for_backward(q, k, v, *output, cu_q, cu_k, slopes)
    ctx.mark_non_differentiable(output[1])


def _gradients(ctx: Any, d_o: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    q, k, v, o, logsum, cu_q, cu_k, slopes = ctx.saved_tensors
    gradients = BACKWARD(_rows(d_o), q, k, v, o, logsum, cu_q, cu_k, *ctx.numbers, slopes)
    return (*gradients, *[None] * 9)


_HOW = "Tensor? cu_q, Tensor? cu_k, bool causal, int window, int sinks, float scale"
FORWARD = native.define(f"flash_forward(Tensor q, Tensor k, Tensor v, {_HOW}, int strip_keys, bool partial, Tensor? slopes) -> (Tensor, Tensor)",
                        _forward, _fake_forward, _forward if TRITON else None)  # fmt: skip
BACKWARD = native.define("flash_backward(Tensor d_o, Tensor q, Tensor k, Tensor v, Tensor o, Tensor logsum, "
                         f"{_HOW}, Tensor? slopes) -> (Tensor, Tensor, Tensor)",
                         _backward, _fake_backward, _backward if TRITON else None)  # fmt: skip
torch.library.register_autograd("lilliput::flash_forward", _gradients, setup_context=_save, lib=native.library())
