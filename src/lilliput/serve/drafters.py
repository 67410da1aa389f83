"""Drafters: where guesses come from. `plan` says how many tokens are guessed for a sequence, before blocks are given out; `fill` writes them
into the chunks, after that, since a model that guesses needs blocks too.

    ngram   prompt lookup: the longest ending of the text (4 to 2 tokens) that has come before, and what followed it then. Costs
            microseconds; pays where text repeats itself: code, tables, answers that quote their question.

Saxena 2023 (prompt lookup decoding); Leviathan et al. 2023, appendix A.1 (n-gram models).
"""

from __future__ import annotations

from collections.abc import Sequence


class NGram:
    """Prompt lookup. One index a sequence, grown as its text grows."""

    def __init__(self, longest: int = 4, shortest: int = 2) -> None:
        """Tokens of the ending that must have come before, longest first."""
        self.longest, self.shortest = longest, shortest
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

    def forget(self, id: int) -> None:
        """The sequence has ended."""
        self._after.pop(id, None)
        self._upto.pop(id, None)

    @staticmethod
    def _unrolled(tokens: Sequence[int], at: int, gamma: int) -> list[int]:
        """What followed, going round when the text repeats itself without a break."""
        period = len(tokens) - at
        return [tokens[at + i % period] for i in range(gamma)]
