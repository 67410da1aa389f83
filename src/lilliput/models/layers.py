"""The layers of a decoder. Linear is the only one: techniques set its slots, they never replace its class.

Precision rule, kept here and nowhere else: weights may be stored in fewer bits than the computation. Off CUDA the
embedding answers in fp32, and every Linear and norm computes in the dtype of its input, whatever its weight is stored in
(ops/linear.py says why). On CUDA the dtype of the embedding's weight is the dtype of the computation.

Constructors leave weights uninitialised (`torch.empty`), so a model is built on the meta device or in RAM at no cost;
Decoder.init_weights or a checkpoint fills them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lilliput.ops.chunked import linear_cross_entropy
from lilliput.ops.linear import linear
from lilliput.ops.norm import rms_norm


class Codec(Protocol):
    """How the bytes of one matrix [outputs, inputs] are read: a dataclass of both and of what else it has to know."""

    @property
    def bytes(self) -> int:
        """Of the matrix as it is stored."""
        ...

    def decode(self, stored: Tensor) -> Tensor:
        """The fp32 matrix that they stand for."""
        ...

    def part(self, stored: Tensor, number: int, count: int) -> Tensor:
        """The bytes of one of `count` equal pieces of the rows, which decode to the same weights."""
        ...


class Linear(nn.Module):
    """y = x W^T + b + sum of delta(x). weight [outputs, inputs].

    `product`: where one is set, it computes x W^T + b (models/products.py).
    `codec`: where one is set, `weight` is frozen bytes that it decodes into [outputs, inputs] for each product, forward and backward.
    `tiles`: where there are some, they have the rows of weight and bias between them, in order, and `weight` is None.
    `deltas`: name -> module with forward(x [..., inputs]) -> [..., outputs], added to the output. The names of weight
    and bias do not change when a delta is set; a delta's own parameters lie under `deltas.{name}.`.
    """

    def __init__(self, inputs: int, outputs: int, bias: bool = False) -> None:
        super().__init__()
        self.inputs, self.outputs = inputs, outputs
        self.weight = nn.Parameter(torch.empty(outputs, inputs))
        self.bias = nn.Parameter(torch.empty(outputs)) if bias else None
        self.codec: Codec | None = None
        self.product: nn.Module | None = None
        self.tiles = nn.ModuleList()
        self.deltas = nn.ModuleDict()

    def split(self, count: int) -> None:
        """Give the rows to `count` Linears of equal size, whose outputs one after the other are this one's. Their weights are new."""
        tiles = [Linear(self.inputs, self.outputs // count, self.bias is not None).requires_grad_(self.weight.requires_grad) for _ in range(count)]
        if self.codec is not None:
            codec: Codec = replace(self.codec, outputs=self.outputs // count)  # type: ignore[type-var]
            for tile in tiles:
                tile.codec = codec
                tile.weight = nn.Parameter(self.weight.new_empty(codec.bytes), requires_grad=False)
        self.tiles.extend(tiles)
        self.register_parameter("weight", None)
        self.bias = None

    def whole(self, leaf: str) -> Tensor:
        """W [outputs, inputs], decoded where it is stored as bytes, or the bias; tiles put together."""
        if self.tiles:
            return torch.cat([tile.whole(leaf) for tile in cast("Iterable[Linear]", self.tiles)])
        value: Tensor = getattr(self, leaf)
        return value if self.codec is None or leaf != "weight" else self.codec.decode(value)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., inputs] -> [..., outputs] in x's dtype."""
        compute = linear if self.product is None else self.product
        if self.tiles:
            y = torch.cat([tile(x) for tile in self.tiles], -1)
        else:
            y = compute(x, self.weight, self.bias, None if self.codec is None else self.codec.decode)
        for delta in self.deltas.values():
            y = y + delta(x)
        return y

    def extra_repr(self) -> str:
        """What print(model) shows."""
        return f"{self.inputs} -> {self.outputs}{', bias' if self.bias is not None else ''}"


class Embedding(nn.Module):
    """Rows of a table. weight [rows, dim]; answers in fp32 at least off CUDA."""

    def __init__(self, rows: int, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, dim))

    def forward(self, index_BT: Tensor) -> Tensor:
        """Integers [...] -> [..., dim]."""
        x = F.embedding(index_BT, self.weight)
        return x if x.is_cuda else x.to(torch.promote_types(x.dtype, torch.float32))


class RMSNorm(nn.Module):
    """x / rms(x) * weight."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(dim))

    def forward(self, x: Tensor) -> Tensor:
        """[..., dim] -> [..., dim]."""
        return rms_norm(x, self.weight, self.eps)


class LayerNorm(nn.Module):
    """(x - mean) / std * weight + bias."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(dim))
        self.bias = nn.Parameter(torch.empty(dim))

    def forward(self, x: Tensor) -> Tensor:
        """[..., dim] -> [..., dim]."""
        return F.layer_norm(x, self.weight.shape, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


class Head(nn.Module):
    """Logits in fp32. Untied: its own weight [vocab, dim]. Tied: the embedding's, read at each call, so it stays one tensor
    whatever is done to the embedding (materialise, sharding, deepcopy)."""

    def __init__(self, vocab: int, dim: int, tied_to: Embedding | None) -> None:
        super().__init__()
        self._tied_to = () if tied_to is None else (tied_to,)  # in a tuple, or nn.Module would register the embedding twice
        if tied_to is None:
            self.weight = nn.Parameter(torch.empty(vocab, dim))

    def forward(self, h_BTC: Tensor, targets_N: Tensor | None = None, chunk: int = 0) -> Tensor:
        """[..., dim] -> [..., vocab] fp32. With targets, whose N are the rows of h: their summed cross-entropy, `chunk` rows at a time."""
        weight = self._tied_to[0].weight if self._tied_to else self.weight
        return linear(h_BTC, weight).float() if targets_N is None else linear_cross_entropy(h_BTC, weight, targets_N, chunk)
