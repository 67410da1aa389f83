"""Facts: what every model states once about itself, and everything else reads (planner, rooms, loops, tests).

No torch here: facts follow from a config or a file header, so `plan` answers before any weight is read. Facts may be
partial; a room that misses one refuses and names it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cached_property


@dataclass(frozen=True)
class KVShape:
    """Keys and values of one token: 2 x layers x kv_heads x head_dim elements."""

    layers: int
    kv_heads: int
    head_dim: int

    def bytes_per_token(self, element: float = 4) -> int:
        """Bytes of one token's keys and values at `element` bytes each."""
        return round(2 * self.layers * self.kv_heads * self.head_dim * element)


@dataclass(frozen=True)
class Activation:
    """One closed-form activation term of a micro-batch, in bytes, with the mesh axes that divide it.

    `per`: "block" terms exist once in each block (and vanish where it is recomputed), "model" terms once.
    `saved`: kept from forward to backward; False = a transient alive only at the peak moment of its owner.
    `inputs_of`: kept for nothing but the weight gradients of these Linears (q_proj, ...); gone where all of them are frozen.
    `early`: saved, but free by the time the backward pass reaches the blocks (what the loss and the head keep).
    """

    name: str
    size: int
    per: str = "block"
    saved: bool = True
    early: bool = False
    inputs_of: tuple[str, ...] = ()
    divided_by: tuple[str, ...] = ()


@dataclass(frozen=True)
class Facts:
    """See the field comments; units are elements unless a name says bytes."""

    family: str
    shapes: Mapping[str, tuple[int, ...]]  # every parameter by module path -> shape; tied names appear once, under the first
    chain: tuple[str, ...]  # execution order: ("embed", "layers.*", "norm", "head")
    layers: int
    vocab: int
    context: int  # longest position the model was made for
    tied: tuple[tuple[str, ...], ...] = ()  # groups of parameter names that are one tensor
    layout: Mapping[str, str] = field(default_factory=dict)  # pattern -> "col" | "row" | "vocab" | "rows"
    feeds: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # norm -> ALL consumers of its output
    linears: tuple[str, ...] = ()  # patterns of the Linear modules inside blocks ("layers.*.attn.q_proj", ...)
    kv: KVShape | None = None
    flops: Callable[[int, int], float] | None = None  # (tokens, context) -> forward flops of that many tokens
    activations: Callable[[int, int, int], list[Activation]] | None = None  # (sequences, tokens each, element bytes)

    @cached_property
    def counts(self) -> Mapping[str, int]:
        """Numbers of each parameter."""
        return {name: math.prod(shape) for name, shape in self.shapes.items()}

    @cached_property
    def parameters(self) -> int:
        """Number of parameters, tied ones once."""
        return sum(self.counts.values())

    @cached_property
    def matrices(self) -> frozenset[str]:
        """Names of the Linears' weights inside blocks."""
        return frozenset(name for name in self.shapes if any(fnmatchcase(name, f"{pattern}.weight") for pattern in self.linears))
