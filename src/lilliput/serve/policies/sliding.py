"""Sliding window: the last W tokens stay, at their positions in the text. The baseline of the other policies.

"sliding:256" holds between 240 and 256 tokens. Models that were trained with a window lose nothing by it where W is theirs; others do badly
as soon as the first tokens leave (see sinks). The context still ends where positions do.

Beltagy et al. 2020 (Longformer), arXiv 2004.05150, section 3.1.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lilliput.serve.policies import Bounded

if TYPE_CHECKING:
    from torch import Tensor


class Sliding(Bounded):
    """W tokens."""

    name, usual = "sliding", "256"

    def keep(self, count: int, mass_LGT: Tensor | None, positions_LGT: Tensor | None) -> Tensor:
        """The last places."""
        import torch

        return torch.arange(self.size - count, self.size)
