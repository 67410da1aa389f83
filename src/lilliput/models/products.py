"""Products: how a Linear multiplies where that is not in the dtype of its input. What stands in its `product` slot."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from lilliput.models.layers import Linear
from lilliput.ops.fp8 import FORMATS, Coded, Scaling, linear


class Reads:
    """The codes of one tensor that several Linears read (q, k and v): made by the first reader, let go by the last.

    So the tensor is rounded once and kept once. Holds nothing between forward passes.
    """

    def __init__(self, readers: int) -> None:
        self.readers, self.left = readers, 0
        self.x: Tensor | None = None
        self.held: Coded | None = None

    def codes(self, x: Tensor, scaling: Scaling) -> Coded:
        """The codes of x for its next reader."""
        if self.held is None or self.x is not x:
            self.x, self.held, self.left = x, scaling.coded("activations", x.detach()), self.readers
        held, self.left = self.held, self.left - 1
        if self.left == 0:
            self.x = self.held = None
        return held


class Fp8(nn.Module):
    """x W^T on codes of both. `codes`, `unscale`: of the weight, made by `refresh`; None where the weight is stored as bytes of a codec.

    Both are buffers that no file keeps: the weight itself, in its own dtype, is what learns.
    """

    codes: Tensor | None
    unscale: Tensor | None

    def __init__(self, scaling: Scaling, reads: Reads) -> None:
        super().__init__()
        self.scaling, self.reads = scaling, reads
        self.stamp: tuple[int, int] | None = None
        self.register_buffer("codes", None, persistent=False)
        self.register_buffer("unscale", None, persistent=False)

    def room(self, weight: Tensor, device: torch.device) -> None:
        """Bytes for the codes of a weight of this shape; `refresh` fills them."""
        self.codes = torch.empty(weight.shape, dtype=FORMATS[self.scaling.forward], device=device)
        self.unscale = torch.empty((), device=device)

    @torch.no_grad()
    def refresh(self, weight: Tensor) -> bool:
        """Make the codes again if the weight has changed since; whether it had."""
        stamp = (weight.data_ptr(), weight._version)
        if self.codes is None or self.unscale is None or self.stamp == stamp:
            return False
        for old, new in zip((self.codes, self.unscale), self.scaling.coded("weights", weight), strict=True):
            old.copy_(new)
        self.stamp = stamp
        return True

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None, decode: Callable[[Tensor], Tensor] | None) -> Tensor:
        """x [..., inputs] -> [..., outputs]."""
        w8 = None if self.codes is None or self.unscale is None else Coded(self.codes, self.unscale)
        return linear(x, weight, bias, self.reads.codes(x, self.scaling), w8, self.scaling, decode)


def refresh(model: nn.Module) -> int:
    """Bring all codes of weights up to date; how many were made. Once an optimizer step, before anything reads them."""
    found = ((m.weight, m.product) for m in model.modules() if isinstance(m, Linear))
    return sum(product.refresh(weight) for weight, product in found if isinstance(product, Fp8))
