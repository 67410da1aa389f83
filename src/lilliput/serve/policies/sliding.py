"""Sliding window: the last W tokens stay, at their positions in the text. The baseline of the other policies.

"sliding:256" holds between 240 and 256 tokens. Models that were trained with a window lose nothing by it where W is theirs; others do badly
as soon as the first tokens leave (see sinks). The context still ends where positions do.

Beltagy et al. 2020 (Longformer), arXiv 2004.05150, section 3.1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from lilliput.serve.policies import sizes

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Sliding:
    """W tokens."""

    argument: str = ""
    wants_mass = False
    evicts = True
    positions: Literal["absolute"] = "absolute"

    def __post_init__(self) -> None:
        """UserError for a size that is no whole blocks."""
        sizes(self.argument, "sliding", "256", 1)

    @property
    def size(self) -> int:
        """W."""
        return sizes(self.argument, "sliding", "256", 1)[0]

    def budget(self, prompt: int, max_new: int) -> int:
        """Tokens of cache a request needs at most."""
        return min(prompt + max_new - 1, self.size)

    def keep(self, count: int, mass_LGT: Tensor | None, positions_LGT: Tensor | None) -> Tensor:
        """The last places."""
        import torch

        return torch.arange(self.size - count, self.size)
