"""Attention sinks: the first S tokens and the last W stay; a key's position is its place among them.

Softmax must sum to one, and a trained model puts what is left over on the first tokens. A plain window loses them, and its
perplexity jumps; four of them are enough to keep it flat over any length. Memory and time a token are constant, and positions never leave
what was trained, so a stream may be longer than the context. It is no longer memory: what has left the window is gone.

"sinks:4+252" holds at most 256 tokens (whole blocks of 16; between 240 and 256 at any time). "sinks:0+256" is the plain window.
Needs keys before RoPE, which the native runner rotates when it reads them. When not: where every token counts.

Xiao et al. 2024 (StreamingLLM), arXiv 2309.17453, section 3.2.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lilliput.serve.policies import Bounded

if TYPE_CHECKING:
    from torch import Tensor


class Sinks(Bounded):
    """S + W tokens."""

    name, usual = "sinks", "4+252"
    positions = "in_cache"

    def keep(self, count: int, mass_LGT: Tensor | None, positions_LGT: Tensor | None) -> Tensor:
        """The first S places and the last ones."""
        import torch

        first = min(self.sizes[0], count)
        return torch.cat([torch.arange(first), torch.arange(self.size - count + first, self.size)])
