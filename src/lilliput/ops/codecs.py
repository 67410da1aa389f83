"""Integer codecs: matrices as int8 (w8) or 4 bits (q4) in panels, by rounding or bit for bit from GGUF's blocks.

    w8   w = s q            q in -128..127, one fp32 scale an output, or a group
    q4   symmetric s (n - 8)      mins s n + m      zeros s (n - z)      n in 0..15; s, m, z fp16, one a group of 32, 64 or 128 inputs

Nothing is requantised on import: GGUF's Q4_0 is q4 symmetric, Q4_1 is q4 with mins, Q8_0 is w8 in groups of 32; GPTQ and AWQ
(ops/words.py) are q4 with zeros. `decode` is the reference: the fp32 matrix that a packed one stands for.

A nibble panel interleaves 8 inputs of 16 outputs: byte j of an output's four holds input k + j low and k + 4 + j high, so that one
vector load, one mask and one shift give both halves in the order in which rows are broadcast.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from lilliput.base.errors import UserError
from lilliput.ops.panels import PackedWeight, group_tensor, panels, rows

GROUPS = (32, 64, 128)
GGUF_BLOCKS = {"Q4_0": 18, "Q4_1": 20, "Q8_0": 34}  # bytes of a block of 32


def check_group(inputs: int, group: int) -> None:
    """UserError, with the sizes that this width allows, when `group` does not divide it or no kernel has it."""
    if group in GROUPS and inputs % group == 0:
        return
    valid = [str(g) for g in GROUPS if inputs % g == 0]
    why = f"{inputs} inputs in groups of {group}; groups of {', '.join(valid)} divide them" if valid else f"no group of {GROUPS} divides {inputs} inputs"
    raise UserError(f"group={group} does not fit", why, f"group={valid[-1]}" if valid else "store this matrix as w8")


def quantize_w8(weight_NK: Tensor, group: int = 0) -> PackedWeight:
    """Round to int8 with one scale an output (group 0) or a group: s = max|w| / 127, q = round(w / s)."""
    if group:
        check_group(weight_NK.shape[1], group)
    grouped = weight_NK.float().unflatten(1, (-1, group or weight_NK.shape[1]))
    scales_NG = grouped.abs().amax(-1) / 127
    q = (grouped / scales_NG.clamp(min=1e-38)[..., None]).round().clamp(-127, 127).to(torch.int8)
    return pack_w8(q.flatten(1), scales_NG, group)


def quantize_q4(weight_NK: Tensor, group: int, offset: str = "symmetric") -> PackedWeight:
    """Round to 4 bits. symmetric: the largest number of a group becomes -8 (as Q4_0); mins: the group's range in 15 steps (as Q4_1)."""
    check_group(weight_NK.shape[1], group)
    grouped = weight_NK.float().unflatten(1, (-1, group))
    if offset == "mins":
        low, high = grouped.amin(-1), grouped.amax(-1)
        scales, mins = ((high - low) / 15).half(), low.half()
        n = ((grouped - mins.float()[..., None]) / scales.float().clamp(min=1e-38)[..., None]).round().clamp(0, 15)
        return pack_q4(n.flatten(1).to(torch.uint8), scales, group, "mins", mins)
    assert offset == "symmetric", f"rounding gives symmetric or mins, not {offset}"
    largest = grouped.gather(-1, grouped.abs().argmax(-1, keepdim=True)).squeeze(-1)
    scales = (largest / -8).half()
    safe = torch.where(scales == 0, torch.ones(()), scales.float())
    n = (grouped / safe[..., None] + 8).round().clamp(0, 15)
    return pack_q4(n.flatten(1).to(torch.uint8), scales, group, "symmetric")


def pack_w8(q_NK: Tensor, scales_NG: Tensor, group: int) -> PackedWeight:
    """int8 numbers and fp32 scales into panels."""
    outputs, inputs = q_NK.shape
    padded = torch.nn.functional.pad(q_NK, (0, -inputs % 4))
    data = panels(padded).unflatten(2, (-1, 4)).transpose(1, 2).contiguous()  # [panel, K/4, 16, 4]
    return PackedWeight("w8", outputs, inputs, group, "symmetric", data, group_tensor(scales_NG.float()))


def pack_q4(n_NK: Tensor, scales_NG: Tensor, group: int, offset: str, offsets_NG: Tensor | None = None) -> PackedWeight:
    """Nibbles (uint8 0..15) with fp16 scales and offsets into panels."""
    outputs, inputs = n_NK.shape
    check_group(inputs, group)
    eights = panels(n_NK).unflatten(2, (-1, 2, 4))  # [panel, 16, K/8, half, 4]
    data = (eights[:, :, :, 0] | eights[:, :, :, 1] << 4).transpose(1, 2).contiguous()  # [panel, K/8, 16, 4]
    offsets = None if offsets_NG is None else group_tensor(offsets_NG.half())
    return PackedWeight("q4", outputs, inputs, group, offset, data, group_tensor(scales_NG.half()), offsets)


def numbers(weight: PackedWeight) -> Tensor:
    """The stored integers [outputs, inputs]: int8, or uint8 0..15."""
    if weight.format == "w8":
        return rows(weight.data.transpose(1, 2).flatten(2), weight.outputs)[:, : weight.inputs]
    byte = weight.data.transpose(1, 2)  # [panel, 16, K/8, 4]
    return rows(torch.stack((byte & 15, byte >> 4), 3).flatten(2), weight.outputs)


def decode(weight: PackedWeight) -> Tensor:
    """The fp32 matrix [outputs, inputs]: the reference of every product."""
    assert weight.scales is not None, "integer formats have scales"
    wide = lambda t: rows(t.transpose(1, 2), weight.outputs).float()[..., None]  # [outputs, groups, 1]
    n = numbers(weight).float().unflatten(1, (weight.groups, -1))
    if weight.format == "w8":
        return (n * wide(weight.scales)).flatten(1)
    if weight.offset == "symmetric":
        return (wide(weight.scales) * (n - 8)).flatten(1)
    assert weight.offsets is not None, f"{weight.offset} has offsets"
    if weight.offset == "mins":
        return (wide(weight.scales) * n + wide(weight.offsets)).flatten(1)
    return (wide(weight.scales) * (n - wide(weight.offsets))).flatten(1)


def from_gguf(kind: str, blocks: np.ndarray) -> PackedWeight:
    """Rows of Q4_0, Q4_1 or Q8_0 blocks, uint8 [outputs, bytes], bit for bit."""
    size = GGUF_BLOCKS[kind]
    parts = torch.from_numpy(np.ascontiguousarray(blocks)).unflatten(1, (-1, size))  # [outputs, groups, bytes]
    half = lambda at: parts[..., at : at + 2].contiguous().view(torch.float16).squeeze(-1)
    if kind == "Q8_0":
        return pack_w8(parts[..., 2:].contiguous().view(torch.int8).flatten(1), half(0).float(), 32)
    start = 2 if kind == "Q4_0" else 4
    byte = parts[..., start:]  # 16 bytes: low nibbles are inputs 0..15, high nibbles 16..31
    n = torch.cat((byte & 15, byte >> 4), -1).flatten(1)
    return pack_q4(n, half(0), 32, "symmetric") if kind == "Q4_0" else pack_q4(n, half(0), 32, "mins", half(2))
