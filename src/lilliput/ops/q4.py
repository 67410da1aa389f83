"""A GGUF's own 4-bit numbers under QLoRA: a frozen matrix w = scale n + offset in blocks of 32, decoded to fp32 for each product.

    Q4_1   fp16 scale and offset a block        Q4_0   fp16 scale, and offset = -8 scale (kept as one more number a block)

A file that was rounded once starts from its own weights: rounding them again to NF4 costs a small model much. Numbers stay those of the
file. double: scales and offsets as int8 with an fp32 step each 256 blocks, as QLoRA does with its scales: 4 + 16/32 + 64/(32 256) = 4.508
bits a weight, 1/7.1 of fp32; else as the file has them, 5 bits and bit for bit what the file stands for.

    [fp32 step of each 256 scales][mean][the same of offsets][numbers][int8 scales][int8 offsets]          double
    [fp16 scales][fp16 offsets][numbers]                                                                   not double

Byte j of a block's 16 holds inputs j (low) and 16 + j (high). The compiled decoder (csrc/frozen.h) gives the same bits as `reference`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lilliput.base.errors import UserError
from lilliput.ops.four_bits import Q4_BLOCK as BLOCK
from lilliput.ops.four_bits import q4
from lilliput.ops.nf4 import decoder, from_second_level, piece, second_level

if TYPE_CHECKING:
    import numpy as np

KINDS = {"Q4_0": 18, "Q4_1": 20}  # bytes of a block in the file


@dataclass(frozen=True)
class Q4:
    """The codec of a matrix [outputs, inputs] whose rows are blocks of 32. double: scales and offsets are quantised."""

    outputs: int
    inputs: int
    double: bool = True

    @property
    def blocks(self) -> int:
        """Blocks of 32 weights."""
        return self.outputs * self.inputs // BLOCK

    @property
    def sections(self) -> tuple[int, int, int, int, int]:
        """Bytes of the wide parts of scales and of offsets, of the 4-bit numbers, and of the int8 scales and offsets."""
        return q4(self.outputs * self.inputs, self.double)

    @property
    def bytes(self) -> int:
        """Of the whole matrix as it is stored."""
        return sum(self.sections)

    def encode(self, kind: str, rows: np.ndarray) -> Tensor:
        """uint8 [bytes] from a file's blocks, uint8 [outputs, bytes of a row]. UserError for another type than Q4_0 and Q4_1."""
        if kind not in KINDS:
            raise UserError(f"blocks of {kind} cannot be kept as a base", f"kept are {', '.join(KINDS)}", "qlora.storage=nf4")
        blocks = torch.from_numpy(rows).reshape(self.blocks, KINDS[kind])
        numbers = blocks[:, -BLOCK // 2 :].flatten()
        scales = blocks[:, :2].contiguous().view(torch.float16).flatten()
        offsets = blocks[:, 2:4].contiguous().view(torch.float16).flatten() if kind == "Q4_1" else scales * -8
        if not self.double:
            return torch.cat([scales.view(torch.uint8), offsets.view(torch.uint8), numbers])
        (first, q), (second, r) = second_level(scales.float()), second_level(offsets.float())
        return torch.cat([first, second, numbers, q, r])

    def part(self, stored: Tensor, number: int, count: int) -> Tensor:
        """See Nf4."""
        return piece(stored.split(self.sections), 2 if self.double else 0, number, count)

    def decode(self, stored: Tensor) -> Tensor:
        """The fp32 matrix that the bytes stand for."""
        return DECODE(stored, self.outputs, self.inputs, self.double)


def reference(stored: Tensor, outputs: int, inputs: int, double: bool) -> Tensor:
    """The same by plain torch, on any device."""
    codec = Q4(outputs, inputs, double)
    first, second, numbers, q, r = stored.split(codec.sections)
    scales = from_second_level(first, q) if double else first.view(torch.float16).float()
    offsets = from_second_level(second, r) if double else second.view(torch.float16).float()
    byte = numbers.view(codec.blocks, BLOCK // 2)
    return torch.cat((byte & 15, byte >> 4), 1).float().mul_(scales[:, None]).add_(offsets[:, None]).view(outputs, inputs)


DECODE = decoder("q4_decode", Q4, reference)
