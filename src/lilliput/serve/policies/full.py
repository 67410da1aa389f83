"""Full cache: every token stays. Exact, and the memory grows with each token: prompt + answer slots a request.

The last sampled token is never fed back, so a request of p prompt tokens and n new ones needs p + n - 1 slots.
Skip it for streams without end: there a policy that evicts keeps memory constant.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from lilliput.base.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Full:
    """The exact policy, and the reference of all others."""

    argument: str = ""
    wants_mass = False
    evicts = False
    positions: Literal["absolute"] = "absolute"
    size = 0

    def __post_init__(self) -> None:
        """UserError for an argument."""
        if self.argument:
            raise UserError(f"policy=full takes no argument, got `{self.argument}`", fix="policy=full")

    def budget(self, prompt: int, max_new: int) -> int:
        """Tokens of cache a request needs at most."""
        return prompt + max_new - 1

    def keep(self, count: int, mass_LGT: Tensor | None, positions_LGT: Tensor | None) -> Tensor:
        """Never asked."""
        raise AssertionError("a policy that keeps all is not asked what stays")
