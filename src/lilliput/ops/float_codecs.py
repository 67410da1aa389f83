"""Floating codecs: matrices stored as fp32, fp16, NF4 or FP8 in panels; products widen them to fp32 as they are read.

    f32, f16     the numbers themselves
    nf4          16 levels of a normal distribution times an fp16 scale (the largest magnitude) a group of 32, 64 or 128 inputs
    e4m3, e5m2   8-bit floats times an fp32 scale an output, the best of eight; what does not fit saturates, ties round to even, subnormals count

NF4 suits weights, which are nearly normal; it is decoded by a table, FP8 by moving its bits into fp32's places.
`decode` is the reference of every product with these formats.

Dettmers et al. 2023 (QLoRA), arXiv 2305.14314, section 3 and appendix E; Micikevicius et al. 2022 (FP8), arXiv 2209.05433.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lilliput.ops.codecs import check_group
from lilliput.ops.panels import PackedWeight, group_tensor, panels, rows

NF4 = (-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
       0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
       0.7229568362236023, 1.0)  # fmt: skip
FP8 = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}


def encode(weight_NK: Tensor, format: str, group: int = 64) -> PackedWeight:
    """A matrix in one of f32, f16, nf4 (with its group), e4m3, e5m2. UserError for a group that does not divide the inputs."""
    weight_NK = weight_NK.detach().float()
    outputs, inputs = weight_NK.shape
    if format in ("f32", "f16"):
        stored = weight_NK if format == "f32" else weight_NK.half()
        return PackedWeight(format, outputs, inputs, 0, "symmetric", _by_input(stored))
    if format in FP8:
        kind = FP8[format]
        scales = _nearest_scales(weight_NK, kind)
        q = (weight_NK / scales).clamp(-torch.finfo(kind).max, torch.finfo(kind).max).to(kind).view(torch.uint8)
        return PackedWeight(format, outputs, inputs, 0, "symmetric", _by_input(q), group_tensor(scales))
    assert format == "nf4", f"{format} is not a floating format"
    check_group(inputs, group)
    grouped = weight_NK.unflatten(1, (-1, group))
    scales_NG = grouped.abs().amax(-1).half()
    n = nearest_nf4(grouped / scales_NG.float().clamp(min=1e-24)[..., None]).flatten(1)
    eights = panels(n).unflatten(2, (-1, 2, 4))
    data = (eights[:, :, :, 0] | eights[:, :, :, 1] << 4).transpose(1, 2).contiguous()
    return PackedWeight("nf4", outputs, inputs, group, "symmetric", data, group_tensor(scales_NG))


def _nearest_scales(weight_NK: Tensor, kind: torch.dtype) -> Tensor:
    """fp32 [N, 1]: of eight scales of an output within the factor 2, the largest number never above the format's, the one of the least squared error."""
    largest = torch.finfo(kind).max
    first = weight_NK.abs().amax(1, keepdim=True).div_(largest).clamp_(min=1e-38)
    best, least = first, torch.full_like(first, torch.inf)
    for eighth in range(8):
        scales = first * 2 ** (eighth / 8)
        error = (weight_NK / scales).clamp_(-largest, largest).to(kind).float().mul_(scales).sub_(weight_NK).square_().sum(1, keepdim=True)
        best, least = torch.where(error < least, scales, best), torch.minimum(error, least)
    return best


def nearest_nf4(x: Tensor) -> Tensor:
    """uint8 numbers 0..15 of the levels nearest to x in -1..1; halfway between two, the lower one."""
    levels = torch.tensor(NF4)
    first, *others = ((levels[1:] + levels[:-1]) / 2).tolist()
    numbers = (x > first).view(torch.uint8)
    for middle in others:  # a third of the time of torch.bucketize
        numbers += (x > middle).view(torch.uint8)
    return numbers


def decode(weight: PackedWeight) -> Tensor:
    """The fp32 matrix [outputs, inputs]: the reference of every product."""
    if weight.format == "nf4":
        byte = weight.data.transpose(1, 2)
        n = rows(torch.stack((byte & 15, byte >> 4), 3).flatten(2), weight.outputs)
        scales = rows(_scales(weight).transpose(1, 2), weight.outputs).float()
        return (torch.tensor(NF4)[n.long()].unflatten(1, (weight.groups, -1)) * scales[..., None]).flatten(1)
    stored = rows(weight.data.transpose(1, 2), weight.outputs)
    if weight.format in FP8:
        return stored.contiguous().view(FP8[weight.format]).float() * rows(_scales(weight).transpose(1, 2), weight.outputs)
    return stored.float()


def _by_input(stored_NK: Tensor) -> Tensor:
    """[N, K] -> [panel, K, 16]."""
    return panels(stored_NK).transpose(1, 2).contiguous()


def _scales(weight: PackedWeight) -> Tensor:
    assert weight.scales is not None, f"{weight.format} has scales"
    return weight.scales
