"""Prompt lookup: the longest ending of the text (4 to 2 tokens) that has come before, and what followed it then.

Costs microseconds a token and needs no model. It pays where text repeats itself: code, tables, answers that quote their question.

Saxena 2023 (prompt lookup decoding); Leviathan et al. 2023, arXiv 2211.17192, appendix A.1 (n-gram models as drafters).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from lilliput.base.errors import UserError

if TYPE_CHECKING:
    from lilliput.ops.sampling import Draw
    from lilliput.serve.scheduler import Chunk
    from lilliput.serve.speculative import Place


class NGram:
    """One index a sequence, grown as its text grows."""

    longest, shortest = 4, 2  # tokens of the ending that must have come before
    late = False

    def __init__(self, argument: str, place: Place | None) -> None:
        """`argument`: none is taken. UserError for one."""
        if argument:
            raise UserError(f"draft=ngram takes no argument, got `{argument}`", fix="draft=ngram")
        self._after: dict[int, dict[tuple[int, ...], int]] = {}  # sequence -> ending -> where its continuation began, the latest time
        self._upto: dict[int, int] = {}

    def plan(self, id: int, tokens: Sequence[int], gamma: int) -> list[int]:
        """At most gamma tokens that may follow; none when the ending is new. `tokens`: all that is known of sequence `id`; they only grow."""
        index = self._after.setdefault(id, {})
        for end in range(self._upto.get(id, self.shortest), len(tokens)):  # endings that have a continuation
            for n in range(self.shortest, min(self.longest, end) + 1):
                index[tuple(tokens[end - n : end])] = end
        self._upto[id] = max(len(tokens), self.shortest)
        for n in range(min(self.longest, len(tokens)), self.shortest - 1, -1):
            at = index.get(tuple(tokens[len(tokens) - n :]))
            if at is not None:
                return self._unrolled(tokens, at, gamma)
        return []

    def fill(self, chunks: Sequence[Chunk], draw: Callable[[int, int], Draw]) -> dict[int, object]:
        """Nothing is left to guess, and what was guessed is certain."""
        return {}

    def forget(self, id: int) -> None:
        """The sequence has ended."""
        self._after.pop(id, None)
        self._upto.pop(id, None)

    @staticmethod
    def _unrolled(tokens: Sequence[int], at: int, gamma: int) -> list[int]:
        """What followed, going round when the text repeats itself without a break."""
        period = len(tokens) - at
        return [tokens[at + i % period] for i in range(gamma)]
