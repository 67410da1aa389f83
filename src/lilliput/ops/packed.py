"""y = x W^T + b for weights packed once into panels of 16 outputs, stored in 32, 16, 8 or 4 bits.

    q8 rows   x is quantised to int8 (one scale a group of the weight, or a row), sums are exact int32: formats w8 and q4
    fp32 rows weights are widened as they are read: every format

A weight is read from memory once a product, so one row costs bytes / bandwidth; many rows cost arithmetic. A row's result
depends on that row and the weight alone, bit for bit: every output is one chain of sums in a fixed order (torch's own fp32
`linear` picks other kernels for other numbers of rows, and its int8 one saturates on CPUs without VNNI).

Layouts: csrc/linear.h. Codecs: ops/codecs.py (w8, q4), ops/float_codecs.py. Without the extension a product unpacks the weight
and multiplies in torch: right, slow, and bench says so. SBI-GeMM: Aminabadi et al. 2022, arXiv 2207.00032, section III.C.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lilliput.ops import codecs, float_codecs, native
from lilliput.ops.panels import FORMATS, INT8_ROWS, OFFSETS, PackedWeight


def quantize_rows(x_RK: Tensor, group: int, static_G: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """fp32 rows -> (q int8 [R, K], scales fp32 [R, G], sums int32 [R, G]) by plain torch: q = round(x / scale) within +-127.

    scale = max|x| / 127 of each row and group anew, or `static_G` for every row.
    """
    grouped = x_RK.unflatten(-1, (-1, group or x_RK.shape[-1]))
    top = grouped.abs().amax(-1) if static_G is None else static_G.expand(x_RK.shape[0], -1) * 127
    scales = top / 127 if static_G is None else static_G.expand(x_RK.shape[0], -1)
    inverse = torch.where(top > 1e-30, 127 / top if static_G is None else 1 / scales, torch.zeros(()))
    q = (grouped * inverse[..., None]).round().clamp(-127, 127).to(torch.int8)
    return q.flatten(-2), scales, q.sum(-1, dtype=torch.int32)


def rows8(x_RK: Tensor, group: int = 0, static_G: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """What a product makes of fp32 rows first: (q int8 [R, K], scales fp32 [R, G]), bit for bit. Not finite: the scale is NaN."""
    if native.module() is None or x_RK.device.type != "cpu":
        return quantize_rows(x_RK, group, static_G)[:2]
    return (ROWS8 if native.watched(x_RK) else _run_rows8)(x_RK.contiguous(), group, static_G)


def supports(x: Tensor, weight: PackedWeight) -> str | None:
    """Why the extension cannot multiply these; None when it can."""
    if native.module() is None:
        return native.missing()
    if not x.is_cpu or x.dtype != torch.float32:
        return f"it takes fp32 on the CPU, x is {x.dtype} on {x.device.type}"
    return None


def linear(
    x: Tensor, weight: PackedWeight, bias: Tensor | None = None, *, activations: str = "auto", static_G: Tensor | None = None, add_to: Tensor | None = None
) -> Tensor:
    """x [..., inputs] fp32 -> [..., outputs]. activations: "int8" (formats w8, q4), "fp32", or auto = int8 where the format has it.

    static_G [weight.groups] fp32: scales of int8 rows from calibration, instead of each row's own: what is larger than 127 of them
    saturates. add_to [..., outputs], contiguous: the product is added to it in place, and it is returned.
    """
    int8 = weight.format in INT8_ROWS if activations == "auto" else activations == "int8"
    assert not int8 or weight.format in INT8_ROWS, f"{weight.format} takes no int8 rows"
    assert static_G is None or (int8 and static_G.shape == (weight.groups,) and static_G.dtype == torch.float32 and static_G.is_contiguous()), (
        f"static scales are fp32 [{weight.groups}] for int8 rows, got {None if static_G is None else (static_G.dtype, tuple(static_G.shape))}"
    )
    if supports(x, weight) is not None:
        y = reference(x, weight, bias, int8, static_G)
        return y if add_to is None else add_to.add_(y)
    flat = x if x.dim() == 2 else x.reshape(-1, weight.inputs)
    if flat.stride(-1) != 1:
        flat = flat.contiguous()
    if add_to is None and native.watched(flat):
        numbers = FORMATS.index(weight.format), weight.outputs, weight.group, OFFSETS.index(weight.offset)
        return LINEAR(flat, weight.data, weight.scales, weight.offsets, *numbers, bias, int8, static_G).view(*x.shape[:-1], weight.outputs)
    assert add_to is None or add_to.is_contiguous(), "add_to must be contiguous"
    y = flat.new_empty(flat.shape[0], weight.outputs) if add_to is None else add_to  # torch.empty takes 3 us, this one
    _multiply(flat, weight, bias, int8, static_G, y, add_to is not None)
    return y if add_to is not None or flat is x else y.view(*x.shape[:-1], weight.outputs)


def reference(x: Tensor, weight: PackedWeight, bias: Tensor | None, int8: bool, static_G: Tensor | None = None) -> Tensor:
    """The same by plain torch: rows rounded to int8 and back where `int8`, times the unpacked weight."""
    flat = x.reshape(-1, weight.inputs)
    if int8:
        q, scales, _ = quantize_rows(flat, weight.group, static_G)
        flat = (q.unflatten(-1, (weight.groups, -1)) * scales[..., None]).flatten(-2)
    whole = (codecs if weight.format in INT8_ROWS else float_codecs).decode(weight)
    y = flat @ whole.t()
    return (y if bias is None else y + bias).view(*x.shape[:-1], weight.outputs)


def _multiply(x_RK: Tensor, weight: PackedWeight, bias: Tensor | None, int8: bool, static_G: Tensor | None, y: Tensor, add: bool) -> None:
    module, count = native.module(), x_RK.shape[0]
    bias_at, into = 0 if bias is None else bias.data_ptr(), (y.data_ptr(), weight.outputs, add)
    if int8:
        module.linear8(weight.native, x_RK.data_ptr(), x_RK.stride(0), count, 0 if static_G is None else static_G.data_ptr(), bias_at, *into)
    else:
        module.linear32(weight.native, x_RK.data_ptr(), x_RK.stride(0), count, bias_at, *into)


def _run(x: Tensor, data: Tensor, scales: Tensor | None, offsets: Tensor | None, format: int, outputs: int, group: int, offset: int,
         bias: Tensor | None, int8: bool, static_G: Tensor | None) -> Tensor:  # fmt: skip
    y = x.new_empty(x.shape[0], outputs)
    _multiply(x, PackedWeight(FORMATS[format], outputs, x.shape[1], group, OFFSETS[offset], data, scales, offsets), bias, int8, static_G, y, False)
    return y


def _fake(x: Tensor, data: Tensor, scales: Tensor | None, offsets: Tensor | None, format: int, outputs: int, group: int, offset: int,
          bias: Tensor | None, int8: bool, static_G: Tensor | None) -> Tensor:  # fmt: skip
    return x.new_empty(x.shape[0], outputs)


LINEAR = native.define("linear_packed(Tensor x, Tensor data, Tensor? scales, Tensor? offsets, int format, int outputs, int group, int offset, "
                       "Tensor? bias, bool int8, Tensor? static_G) -> Tensor", _run, _fake)  # fmt: skip


def _run_rows8(x: Tensor, group: int, static_G: Tensor | None) -> tuple[Tensor, Tensor]:
    (q, scales), (count, width) = _fake_rows8(x, group, static_G), x.shape
    native.module().quantize_rows(x.data_ptr(), count, width, group, 0 if static_G is None else static_G.data_ptr(), q.data_ptr(), scales.data_ptr())
    return q, scales


def _fake_rows8(x: Tensor, group: int, static_G: Tensor | None) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=torch.int8), x.new_empty(x.shape[0], x.shape[1] // group if group else 1)


ROWS8 = native.define("quantize_rows(Tensor x, int group, Tensor? static_G) -> (Tensor, Tensor)", _run_rows8, _fake_rows8)
