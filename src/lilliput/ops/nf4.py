"""NF4 with double quantisation: a frozen matrix in 4.127 bits a weight, decoded to fp32 for each product.

    first level    blocks of 64 weights along the rows: the nearest of 16 levels of w / absmax, two numbers a byte
    second level   blocks of 256 absmax, their mean over the matrix taken off: int8 with one fp32 scale

4 + 8/64 + 32/(64 256) bits; a scale kept in fp32 would cost half a bit instead of an eighth. One uint8 tensor holds it all:

    [fp32 scales of scales][fp32 mean][numbers, the first weight high][int8 scales]

Numbers are those of bitsandbytes, byte for byte; its second level is an 8-bit map of its own, ours is int8, as torchao's.
Panels for compiled products with plain fp16 scales (4.25 or 4.5 bits): ops/float_codecs.py.

Dettmers et al. 2023, arXiv 2305.14314, section 3.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lilliput.ops.float_codecs import NF4, nearest_nf4

BLOCK, SECOND = 64, 256
PIECE = 1 << 20  # weights worked on at a time, so that what is between stays small beside the matrix
PAIRS = torch.tensor([(NF4[byte >> 4], NF4[byte & 15]) for byte in range(256)]).view(torch.int64).flatten()  # the two fp32 a byte stands for, as one number


@dataclass(frozen=True)
class Nf4:
    """The codec of a matrix [outputs, inputs] whose size is a multiple of 64."""

    outputs: int
    inputs: int

    @property
    def blocks(self) -> int:
        """Blocks of 64 weights."""
        return self.outputs * self.inputs // BLOCK

    @property
    def sections(self) -> tuple[int, int, int]:
        """Bytes of the fp32 numbers, of the 4-bit numbers and of the int8 scales."""
        return 4 * (-(-self.blocks // SECOND) + 1), self.blocks * BLOCK // 2, self.blocks

    def encode(self, matrix_NK: Tensor) -> Tensor:
        """uint8 [sum(sections)]."""
        blocks, numbers, tops = matrix_NK.detach().reshape(self.blocks, BLOCK), [], []
        for piece in blocks.split(PIECE // BLOCK):
            piece = piece.float()
            tops.append(piece.abs().amax(1))
            n = nearest_nf4(piece * (1 / tops[-1].clamp(min=1e-38))[:, None])
            numbers.append((n[:, ::2] << 4 | n[:, 1::2]).flatten())
        top = torch.cat(tops)
        mean = top.mean()
        apart = torch.nn.functional.pad(top - mean, (0, -self.blocks % SECOND)).view(-1, SECOND)
        scales = apart.abs().amax(1) / 127
        q = (apart / scales.clamp(min=1e-38)[:, None]).round().clamp(-127, 127).to(torch.int8).flatten()[: self.blocks]
        return torch.cat([torch.cat([scales, mean[None]]).view(torch.uint8), *numbers, q.view(torch.uint8)])

    def decode(self, stored: Tensor) -> Tensor:
        """The fp32 matrix that the bytes stand for; beside it lie its scales (a 64th) and a piece of indices."""
        wide, numbers, q = stored.split(self.sections)
        second, mean = wide.view(torch.float32).split([wide.numel() // 4 - 1, 1])
        scales = q.view(torch.int8).float().mul_(second[:, None].expand(-1, SECOND).reshape(-1)[: self.blocks]).add_(mean).clamp_(min=0)
        pairs = torch.empty(numbers.numel(), dtype=torch.int64, device=stored.device)
        table = PAIRS.to(stored.device)
        for part, out in zip(numbers.split(PIECE // 2), pairs.split(PIECE // 2), strict=True):
            torch.index_select(table, 0, part.int(), out=out)
        return pairs.view(torch.float32).view(self.blocks, BLOCK).mul_(scales[:, None]).view(self.outputs, self.inputs)
