"""NF4 with double quantisation: a frozen matrix in 4.127 bits a weight, decoded to fp32 for each product.

    first level    blocks of 64 weights along the rows: the nearest of 16 levels of w / absmax, two numbers a byte
    second level   blocks of 256 absmax, their mean over the matrix taken off: int8 with one fp32 scale

4 + 8/64 + 32/(64 256) bits; scales kept in fp32 (double=False) cost half a bit instead of an eighth. One uint8 tensor holds it all:

    [fp32 step of each 256 scales][fp32 mean][numbers, the first weight high][int8 scales]          double
    [fp32 scales][numbers, the first weight high]                                                   not double

Numbers are those of bitsandbytes, byte for byte, and without the second level so are the decoded weights; its second level is an
8-bit map of its own, ours is int8, as torchao's. The compiled decoder (csrc/frozen.h) multiplies the 16 levels once a block and looks
up: bound by memory, the same bits as `reference`. Panels for compiled products with fp16 scales: ops/float_codecs.py.

Dettmers et al. 2023, arXiv 2305.14314, section 3.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lilliput.ops import native
from lilliput.ops.float_codecs import NF4, nearest_nf4
from lilliput.ops.four_bits import NF4_BLOCK as BLOCK
from lilliput.ops.four_bits import SECOND, nf4

PIECE = 1 << 20  # weights worked on at a time, so that what is between stays small beside the matrix
PAIRS = torch.tensor([(NF4[byte >> 4], NF4[byte & 15]) for byte in range(256)]).view(torch.int64).flatten()  # the two fp32 a byte stands for, as one number


@dataclass(frozen=True)
class Nf4:
    """The codec of a matrix [outputs, inputs] whose size is a multiple of 64. double: scales are quantised again."""

    outputs: int
    inputs: int
    double: bool = True

    @property
    def blocks(self) -> int:
        """Blocks of 64 weights."""
        return self.outputs * self.inputs // BLOCK

    @property
    def sections(self) -> tuple[int, int, int]:
        """Bytes of the fp32 numbers, of the 4-bit numbers and of the int8 scales."""
        return nf4(self.outputs * self.inputs, self.double)

    @property
    def bytes(self) -> int:
        """Of the whole matrix as it is stored."""
        return sum(self.sections)

    def encode(self, matrix_NK: Tensor) -> Tensor:
        """uint8 [bytes]."""
        blocks, numbers, tops = matrix_NK.detach().reshape(self.blocks, BLOCK), [], []
        for piece in blocks.split(PIECE // BLOCK):
            piece = piece.float()
            tops.append(piece.abs().amax(1))
            n = nearest_nf4(piece * (1 / tops[-1].clamp(min=1e-38))[:, None])
            numbers.append((n[:, ::2] << 4 | n[:, 1::2]).flatten())
        top = torch.cat(tops)
        wide, q = second_level(top) if self.double else (top.view(torch.uint8), top[:0].view(torch.uint8))
        return torch.cat([wide, *numbers, q])

    def part(self, stored: Tensor, number: int, count: int) -> Tensor:
        """The bytes of one of `count` equal pieces of the rows, which stand for the same weights. Pieces are whole blocks (double: of scales)."""
        return piece(stored.split(self.sections), 1 if self.double else 0, number, count)

    def decode(self, stored: Tensor) -> Tensor:
        """The fp32 matrix that the bytes stand for."""
        return DECODE(stored, self.outputs, self.inputs, self.double)


def second_level(values: Tensor) -> tuple[Tensor, Tensor]:
    """fp32 numbers, one a block, as bytes: ([a step each 256 of them][mean], int8): a number is q * step + mean."""
    mean = values.mean()
    apart = torch.nn.functional.pad(values - mean, (0, -values.numel() % SECOND)).view(-1, SECOND)
    steps = apart.abs().amax(1) / 127
    q = (apart / steps.clamp(min=1e-38)[:, None]).round().clamp(-127, 127).to(torch.int8).flatten()[: values.numel()]
    return torch.cat([steps, mean[None]]).view(torch.uint8), q.view(torch.uint8)


def piece(sections: Sequence[Tensor], means: int, number: int, count: int) -> Tensor:
    """Of each section its part `number` of `count`, one after the other; the first `means` of them end with a mean, which every piece has."""
    parts: list[Tensor] = []
    for place, section in enumerate(sections):
        parted, mean = section.split([section.numel() - 4, 4]) if place < means else (section, section[:0])
        parts += [parted.view(count, parted.numel() // count)[number], mean]
    return torch.cat(parts)


def from_second_level(wide: Tensor, q: Tensor) -> Tensor:
    """The fp32 numbers that `second_level`'s bytes stand for."""
    steps, mean = wide.view(torch.float32).split([wide.numel() // 4 - 1, 1])
    return q.view(torch.int8).float().mul_(steps[:, None].expand(-1, SECOND).reshape(-1)[: q.numel()]).add_(mean)


def supports(stored: Tensor) -> str | None:
    """Why the extension cannot decode these bytes; None when it can."""
    if native.module() is None:
        return native.missing()
    if stored.device.type != "cpu" or not stored.is_contiguous():
        return f"it takes contiguous bytes on the CPU, got {'contiguous' if stored.is_contiguous() else 'strided'} ones on {stored.device.type}"
    return f"its fp32 numbers lie at address {stored.data_ptr()}, no multiple of 4" if stored.data_ptr() % 4 else None


def reference(stored: Tensor, outputs: int, inputs: int, double: bool) -> Tensor:
    """The same by plain torch, on any device; beside the matrix lie its scales (a 64th) and a piece of indices."""
    codec = Nf4(outputs, inputs, double)
    wide, numbers, q = stored.split(codec.sections)
    scales = from_second_level(wide, q).clamp_(min=0) if double else wide.view(torch.float32)
    pairs = torch.empty(numbers.numel(), dtype=torch.int64, device=stored.device)
    table = PAIRS.to(stored.device)
    for part, out in zip(numbers.split(PIECE // 2), pairs.split(PIECE // 2), strict=True):
        torch.index_select(table, 0, part.int(), out=out)
    return pairs.view(torch.float32).view(codec.blocks, BLOCK).mul_(scales[:, None]).view(outputs, inputs)


def decoder(name: str, codec: Callable[[int, int, bool], Any], plain: Callable[[Tensor, int, int, bool], Tensor]) -> Any:
    """The op `name` (stored, outputs, inputs, double) -> matrix: compiled where `supports` says so, else `plain`."""

    def run(stored: Tensor, outputs: int, inputs: int, double: bool) -> Tensor:
        made = codec(outputs, inputs, double)
        assert stored.numel() == made.bytes, f"{stored.numel()} bytes are no {outputs} x {inputs} matrix"
        if supports(stored) is not None:
            return plain(stored, outputs, inputs, double)
        out = torch.empty(outputs, inputs)
        getattr(native.module(), name)(stored.data_ptr(), made.blocks, double, out.data_ptr())
        return out

    def fake(stored: Tensor, outputs: int, inputs: int, double: bool) -> Tensor:
        return torch.empty(outputs, inputs, device=stored.device)

    return native.define(f"{name}(Tensor stored, int outputs, int inputs, bool double) -> Tensor", run, fake, plain)


DECODE = decoder("nf4_decode", Nf4, reference)
