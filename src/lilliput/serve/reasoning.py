"""Models that think aloud: `<think>...</think>` before the answer is reasoning, and what follows is the answer.

Which models do is read in their chat template, and how the answer begins in the prompt it made: behind `<think>` the answer starts inside
(DeepSeek-R1), behind `</think>` it has none (Qwen3 with enable_thinking false), otherwise the model may open one by its first word (Qwen3).
Blanks around the tags belong to neither part.

`Thinking` cuts text that comes in pieces, so that any cut of it gives the same parts. `Afterwards` lets a grammar begin behind the thought,
as vLLM does: a thought is free, but it must end before the answer may.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal

from lilliput.serve.request import Guide
from lilliput.serve.structured import allowing

if TYPE_CHECKING:
    from torch import Tensor

    from lilliput.data.tokenizer import Tokenizer

OPEN, CLOSE = "<think>", "</think>"
Begin = Literal["inside", "before", "after"]  # of the answer: in a thought, where one may be opened, behind it


def begin(template: str, prompt: str) -> Begin:
    """Where the answer to this prompt begins."""
    if CLOSE not in template:
        return "after"
    end = prompt.rstrip()
    return "inside" if end.endswith(OPEN) else "after" if end.endswith(CLOSE) else "before"


class Thinking:
    """Text in pieces -> (thought, answer)."""

    def __init__(self, at: Begin) -> None:
        """`at`: where the text begins."""
        self.at, self._held, self._lead = at, "", at == "inside"  # _lead: blanks at a part's beginning are dropped

    def push(self, text: str) -> tuple[str, str]:
        """What this piece makes certain."""
        if self.at == "after" and not self._lead:
            return "", text
        self._held += text
        thought = ""
        if self.at == "before":
            word = self._held.lstrip()
            if OPEN.startswith(word):
                return "", ""
            self.at, self._lead = ("inside", True) if word.startswith(OPEN) else ("after", False)
            if self._lead:
                self._held = word[len(OPEN) :]
        if self.at == "inside":
            thought = self._inside()
        if self.at == "inside":
            return thought, ""
        said = self._held.lstrip() if self._lead else self._held
        self._lead, self._held = self._lead and not said, ""
        return thought, said

    def flush(self) -> tuple[str, str]:
        """The end of the text: what was held back."""
        rest, self._held = self._held, ""
        return (rest.rstrip(), "") if self.at == "inside" else ("", rest)

    def _inside(self) -> str:
        held = self._held.lstrip() if self._lead else self._held
        at = held.find(CLOSE)
        if at >= 0:
            self.at, self._lead, self._held = "after", True, held[at + len(CLOSE) :]
            return held[:at].rstrip()
        keep = next((n for n in range(len(CLOSE) - 1, 0, -1) if held.endswith(CLOSE[:n])), 0)
        sure = held[: len(held) - keep].rstrip()  # blanks may be the last before the tag
        self._lead, self._held = self._lead and not held, held[len(sure) :]
        return sure


class Afterwards:
    """A guide that begins behind the thought."""

    def __init__(self, guide: Guide, tokenizer: Tokenizer, vocab: int, ends: Sequence[int], at: Begin) -> None:
        """`ends`: tokens that may not come in a thought. A thought that the model may open itself needs `<think>` as one token."""
        opening = tokenizer.encode(OPEN)
        self._guide, self._tokenizer, self._vocab = guide, tokenizer, vocab
        self._inside, self._tail = at == "inside", b""
        self._opens = opening[0] if at == "before" and len(opening) == 1 else None
        self._free_W = ~allowing(ends, vocab)

    def mask(self) -> Tensor:
        """See Guide."""
        if self._inside:
            return self._free_W
        return self._guide.mask() if self._opens is None else self._guide.mask() | allowing([self._opens], self._vocab)

    def accept(self, token: int) -> None:
        """See Guide."""
        opens, self._opens = self._opens, None
        if self._inside:
            self._tail += self._tokenizer.token_bytes(token)
            self._inside = CLOSE.encode() not in self._tail
            self._tail = self._tail[-len(CLOSE) :]
        elif token == opens:
            self._inside = True
        else:
            self._guide.accept(token)

    @property
    def finished(self) -> bool:
        """See Guide."""
        return not self._inside and self._guide.finished


def afterwards(make: Callable[[], Guide], tokenizer: Tokenizer, vocab: int, ends: Sequence[int], at: Begin) -> Callable[[], Guide]:
    """The maker of a guide, behind the thought where there may be one."""
    return make if at == "after" else lambda: Afterwards(make(), tokenizer, vocab, ends, at)
