"""FP8 with one power of two a tensor: codes = round(x 2^b), and the three products of a Linear on codes.

    format              largest   smallest normal, subnormal    used for
    e4m3fn  e4m3fnuz    448  240  2^-6 2^-9    2^-7 2^-10        weights and activations
    e5m2    e5m2fnuz    57344     2^-14 2^-16  2^-15 2^-17       gradients

AMAX: b = floor(log2(largest / amax)) of the tensor itself; no history, so a forward pass that runs again finds the same codes.
CSCALE: one b for all. Multiplying by a power of two is exact: the only error is the rounding of the codes, at most 2^-4 of a
normal e4m3 number, 2^-3 of an e5m2 one. What does not fit saturates, said here and not left to the cast, which saturates
e4m3fn (infinities too) but not e5m2. A tensor with an infinity or NaN gets the scale NaN: all that is made from it is NaN and
the step is skipped, instead of going wrong in silence. A tensor of zeros has b = 0.

Products: `decoded` multiplies decoded codes in fp32, on CPUs faster than torch._scaled_mm and equal to it to the bit;
`scaled_mm` is for CUDA devices with 8-bit float units.

Perez et al. 2023, arXiv 2309.17224, section 3; formats: Micikevicius et al. 2022, arXiv 2209.05433.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lilliput.ops.linear import matrix

FORMATS = {"e4m3fn": torch.float8_e4m3fn, "e4m3fnuz": torch.float8_e4m3fnuz, "e5m2": torch.float8_e5m2, "e5m2fnuz": torch.float8_e5m2fnuz}
WIDEST = 126  # |b| at most: 2^b and 2^-b are both normal fp32 numbers
EIGHT_BITS = (8, 9)  # CUDA compute capability from which on there are 8-bit float units


class Coded(NamedTuple):
    """A tensor in 8 bits: codes (a float8 dtype) times `unscale` = 2^-b (fp32, no dims)."""

    codes: Tensor
    unscale: Tensor

    def decode(self) -> Tensor:
        """The fp32 tensor."""
        return self.codes.float() * self.unscale


@dataclass(frozen=True)
class Scaling:
    """Formats of weights and activations, and of gradients; `bias`: CSCALE's b, None = AMAX. `note(kind, codes)`: told of whatever is coded."""

    forward: str = "e4m3fn"
    backward: str = "e5m2"
    bias: int | None = None
    note: Callable[[str, Coded], None] | None = None

    def coded(self, kind: str, x: Tensor) -> Coded:
        """The codes of one of the "weights", "activations" or "gradients"."""
        codes = encode(x, self.backward if kind == "gradients" else self.forward, self.bias)
        if self.note is not None:
            self.note(kind, codes)
        return codes


def exponents(top: Tensor, largest: float) -> Tensor:
    """b = floor(log2(largest / top)) as int32, at most +-126, of fp32 magnitudes; 0 where top is 0. Exact: a difference of the numbers' bits."""
    (bits,) = struct.unpack("<i", struct.pack("<f", largest))
    return ((bits - top.view(torch.int32)) >> 23).clamp_(-WIDEST, WIDEST).masked_fill_(top == 0, 0)


def power(exponent: Tensor) -> Tensor:
    """2^exponent in fp32, of int32 in -126..127."""
    return ((exponent + 127) << 23).view(torch.float32)


def encode(x: Tensor, format: str, bias: int | None = None) -> Coded:
    """The codes of a tensor of any float dtype and shape. bias None: from its largest magnitude."""
    kind = FORMATS[format]
    largest = torch.finfo(kind).max
    low, high = torch.aminmax(x)
    top = torch.maximum(high, -low).float()
    b = exponents(top, largest) if bias is None else torch.full_like(top, bias, dtype=torch.int32)
    unscale = torch.where(torch.isfinite(top), power(-b), torch.nan)
    return Coded((x * power(b)).clamp_(-largest, largest).to(kind), unscale)


def widened(codes: Tensor) -> Tensor:
    """What codes other than NaN stand for, in fp32. torch widens e4m3fn one number at a time; in fp16's places its bits are the number times 2^-8."""
    if codes.dtype != torch.float8_e4m3fn or codes.is_cuda:
        return codes.float()
    half = codes.view(torch.int8).to(torch.int16).bitwise_left_shift_(7).bitwise_and_(~(1 << 14))
    return half.view(torch.float16).float().mul_(256)


class Decoded:
    """fp32 products of decoded codes: any device, any format."""

    name = "decoded"

    def supports(self, a_MK: Tensor, b_KN: Tensor) -> str | None:
        """Takes everything."""
        return None

    def run(self, a_MK: Tensor, b_KN: Tensor, unscale: Tensor) -> Tensor:
        """fp32 [M, N]."""
        return (widened(a_MK) @ widened(b_KN)).mul_(unscale)


class ScaledMm:
    """torch._scaled_mm on the tensor cores of CUDA devices from compute capability 8.9."""

    name = "scaled_mm"

    def supports(self, a_MK: Tensor, b_KN: Tensor) -> str | None:
        """Refuses CPUs, which have no such units, older GPUs, the formats that NVIDIA's units lack, and sizes that they do not take."""
        if not a_MK.is_cuda:
            return "no 8-bit float units on this device"
        if torch.cuda.get_device_capability(a_MK.device) < EIGHT_BITS:
            return f"compute capability {torch.cuda.get_device_capability(a_MK.device)} has no 8-bit float units, {EIGHT_BITS} has"
        kinds = {a_MK.dtype, b_KN.dtype}
        if not kinds <= {torch.float8_e4m3fn, torch.float8_e5m2} or kinds == {torch.float8_e5m2}:
            return f"no units for {a_MK.dtype} times {b_KN.dtype}"
        odd = [n for n in (*a_MK.shape, b_KN.shape[1]) if n % 16]
        return f"{odd[0]} is no multiple of 16" if odd else None

    def run(self, a_MK: Tensor, b_KN: Tensor, unscale: Tensor) -> Tensor:
        """fp32 [M, N]. The units read both operands along K, so the other layout is copied (bytes)."""
        one = torch.ones_like(unscale)
        return torch._scaled_mm(a_MK.contiguous(), b_KN.t().contiguous().t(), unscale, one, out_dtype=torch.float32)


BACKENDS = (ScaledMm(), Decoded())


def choose(a_MK: Tensor, b_KN: Tensor) -> tuple[str, str]:
    """(backend, why the ones before it refused)."""
    reasons: list[str] = []
    for backend in BACKENDS:
        refused = backend.supports(a_MK, b_KN)
        if refused is None:
            return backend.name, "; ".join(reasons)
        reasons.append(f"{backend.name}: {refused}")
    raise AssertionError("the last backend takes everything")


def product(a_MK: Coded, b_KN: Coded, backend: str = "auto") -> Tensor:
    """fp32 [M, N] of two coded matrices: the product of the codes, then both powers of two. The only way in: what goes through here is in FP8."""
    name = choose(a_MK.codes, b_KN.codes)[0] if backend == "auto" else backend
    return next(b for b in BACKENDS if b.name == name).run(a_MK.codes, b_KN.codes, a_MK.unscale * b_KN.unscale)


class _Linear(torch.autograd.Function):
    """y = x W^T + b. Keeps the codes of x (where W learns) and of W, or W's own bytes where codes are made anew from them."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, x8: Coded, w8: Coded | None, scaling: Scaling, decode: Callable[[Tensor], Tensor] | None
    ) -> Tensor:
        ctx.scaling, ctx.decode = scaling, decode
        ctx.dtypes = x.dtype, weight.dtype, None if bias is None else bias.dtype
        ctx.save_for_backward(*(x8 if ctx.needs_input_grad[1] else (None, None)), *((weight, None) if w8 is None else w8))
        w_NK = _coded(weight, scaling, decode) if w8 is None else w8
        y = product(Coded(x8.codes.reshape(-1, x.shape[-1]), x8.unscale), Coded(w_NK.codes.t(), w_NK.unscale))
        if bias is not None:
            y += bias
        return y.view(*x.shape[:-1], -1).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_codes, x_unscale, w_codes, w_unscale = ctx.saved_tensors
        x_dtype, w_dtype, bias_dtype = ctx.dtypes
        flat = grads[0].reshape(-1, grads[0].shape[-1])
        g_MN = ctx.scaling.coded("gradients", flat)
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            w_NK = Coded(w_codes, w_unscale) if w_unscale is not None else _coded(w_codes, ctx.scaling, ctx.decode)
            grad_x = product(g_MN, w_NK).view(*grads[0].shape[:-1], -1).to(x_dtype)
        if ctx.needs_input_grad[1]:
            x_MK = Coded(x_codes.reshape(-1, x_codes.shape[-1]), x_unscale)
            grad_weight = product(Coded(g_MN.codes.t(), g_MN.unscale), x_MK).to(w_dtype)
        grad_bias = flat.sum(0).to(bias_dtype) if ctx.needs_input_grad[2] else None
        return grad_x, grad_weight, grad_bias, None, None, None, None


def _coded(weight: Tensor, scaling: Scaling, decode: Callable[[Tensor], Tensor] | None) -> Coded:
    return scaling.coded("weights", matrix(weight, decode))


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, x8: Coded, w8: Coded | None, scaling: Scaling, decode: Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    """x [..., in], weight [out, in], bias [out] -> [..., out] in x's dtype, forward and both gradients as products of codes.

    x8: the codes of x. w8: those of weight; None: made here and again in the backward pass, from what decode makes of a weight that is
    stored as bytes. The bias and its gradient stay as they are.
    """
    return _Linear.apply(x, weight, bias, x8, w8, scaling, decode)
