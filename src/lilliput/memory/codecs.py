"""Codecs of saved activations: how fp32 bytes lie between the forward and the backward pass when a plan does not keep them exactly.

    bf16    rounded                                     0.5 of the bytes
    fp8     E4M3 times a scale each 256 numbers         0.254
    nf4     the nearest of 16 levels, a scale each 64   0.141

A block's largest magnitude becomes the largest code, so outliers cost their own block only. An infinity or NaN makes its block NaN:
a gradient from it is NaN and the step is skipped. Sizes, without torch: memory.plan.stored_bytes. Pieces bound what is between.
"""

from __future__ import annotations

import statistics
from time import perf_counter

import torch
from torch import Tensor

from lilliput.memory.plan import FP8_BLOCK, stored_bytes
from lilliput.memory.simulate import Link
from lilliput.ops import native
from lilliput.ops.four_bits import NF4_BLOCK
from lilliput.ops.fp8 import widened
from lilliput.ops.nf4 import Nf4

PIECE = 1 << 18  # numbers worked on at a time
LARGEST = torch.finfo(torch.float8_e4m3fn).max


def _blocks(flat: Tensor, block: int) -> Tensor:
    """[blocks, block]; the last one is filled with zeros."""
    return torch.nn.functional.pad(flat, (0, -flat.numel() % block)).view(-1, block)


def _encode(flat: Tensor, codec: str) -> Tensor:
    if codec == "bf16":
        return flat.to(torch.bfloat16).view(torch.uint8)
    count = flat.numel()
    stored = torch.empty(stored_bytes(codec, 4 * count), dtype=torch.uint8, device=flat.device)
    if codec == "nf4":
        return stored.copy_(Nf4(1, count + -count % NF4_BLOCK, double=False).encode(_blocks(flat, NF4_BLOCK)))
    codes, scales = stored[:count].view(torch.float8_e4m3fn), stored[stored.numel() - 4 * -(-count // FP8_BLOCK) :]
    for start in range(0, count, PIECE):
        rows = _blocks(flat[start : start + PIECE], FP8_BLOCK)
        scale = (rows.abs().amax(1) / LARGEST).clamp_(min=torch.finfo(torch.float32).tiny)
        scales[start // FP8_BLOCK * 4 :][: 4 * len(rows)] = scale.view(torch.uint8)
        codes[start : start + PIECE] = (rows / scale[:, None]).to(torch.float8_e4m3fn).flatten()[: count - start]
    return stored


def _decode(stored: Tensor, count: int, codec: str) -> Tensor:
    if codec == "bf16":
        return stored.view(torch.bfloat16).float()
    if codec == "nf4":
        whole = Nf4(1, count + -count % NF4_BLOCK, double=False).decode(stored).flatten()
        return whole if whole.numel() == count else whole[:count].clone()
    out = torch.empty(count, device=stored.device)
    codes, scales = stored[:count].view(torch.float8_e4m3fn), stored[stored.numel() - 4 * -(-count // FP8_BLOCK) :].clone().view(torch.float32)
    for start in range(0, count, PIECE):
        rows = _blocks(widened(codes[start : start + PIECE]), FP8_BLOCK)
        rows *= scales[start // FP8_BLOCK :][: len(rows), None]
        out[start : start + PIECE] = rows.flatten()[: count - start]
    return out


def _fake_encode(flat: Tensor, codec: str) -> Tensor:
    return torch.empty(stored_bytes(codec, 4 * flat.numel()), dtype=torch.uint8, device=flat.device)


def _fake_decode(stored: Tensor, count: int, codec: str) -> Tensor:
    return torch.empty(count, device=stored.device)


# one operation each, so that a meter sees what goes in and what comes out
encode = native.define("stored_encode(Tensor flat, str codec) -> Tensor", _encode, _fake_encode, _encode)
decode = native.define("stored_decode(Tensor stored, int count, str codec) -> Tensor", _decode, _fake_decode, _decode)


def speed(codec: str, device: torch.device | str = "cpu") -> Link:
    """Stored bytes a second in both directions, timed on this machine: the median of five pieces."""
    flat, times = torch.ones(PIECE, device=device), []
    for _ in range(5):
        begin = perf_counter()
        stored = encode(flat, codec)
        middle = perf_counter()
        float(decode(stored, PIECE, codec)[0])  # waits for the device
        times.append((middle - begin, perf_counter() - middle))
    write, read = (stored.nbytes / statistics.median(t) for t in zip(*times, strict=True))
    return Link(write, read)
