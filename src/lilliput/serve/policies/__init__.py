"""Which tokens stay in the cache. `Bounded` is what the policies share that hold a fixed number of tokens a sequence."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Literal

from lilliput.base.errors import UserError
from lilliput.serve.blocks import BLOCK


@dataclass(frozen=True)
class Bounded:
    """Sizes as words, "4+252"; `usual` where nothing is asked. Tokens leave in whole blocks."""

    argument: str = ""
    name: ClassVar[str]
    usual: ClassVar[str]
    wants_mass: ClassVar[bool] = False
    evicts: ClassVar[bool] = True
    positions: ClassVar[Literal["absolute", "in_cache"]] = "absolute"

    def __post_init__(self) -> None:
        """UserError unless there are as many numbers as usual, with a sum of whole blocks and two at least."""
        words, count = (self.argument or self.usual).split("+"), len(self.usual.split("+"))
        if len(words) != count or not all(word.isdigit() for word in words):
            why = f"it takes {count} number{'s' * (count > 1)}"
            raise UserError(f"policy={self.name}:{self.argument} names no sizes", why, f"policy={self.name}:{self.usual}")
        if self.size % BLOCK or self.size < 2 * BLOCK:
            whole = max(2 * BLOCK, -(-self.size // BLOCK) * BLOCK)
            fix = f"policy={self.name}:" + "+".join([*words[:-1], str(self.sizes[-1] + whole - self.size)])
            raise UserError(f"policy={self.name}:{self.argument} holds {self.size} tokens", f"tokens leave in blocks of {BLOCK}, and two must stay", fix)

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """The numbers."""
        return tuple(int(word) for word in (self.argument or self.usual).split("+"))

    @cached_property
    def size(self) -> int:
        """Tokens a sequence holds at most."""
        return sum(self.sizes)

    def budget(self, prompt: int, max_new: int) -> int:
        """Tokens of cache a request needs at most."""
        return min(prompt + max_new - 1, self.size)
