"""Full cache: every token stays. Exact, and the memory grows with each token: prompt + answer slots a request.

The last sampled token is never fed back, so a request of p prompt tokens and n new ones needs p + n - 1 slots.
Skip it for streams without end: there a policy that evicts keeps memory constant.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Full:
    """The exact policy, and the reference of all others."""

    wants_mass = False
    evicts = False

    def budget(self, prompt: int, max_new: int) -> int:
        """Tokens of cache a request needs at most."""
        return prompt + max_new - 1

    def keep(self, mass_LHT: Tensor | None, positions_LHT: Tensor) -> None:
        """None: all tokens stay."""
        return None
