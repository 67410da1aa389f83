"""A request: what is asked (Sampling), what is known while it runs (Request), what comes out (Delta, Completion).

Text is given out as soon as it is certain, and not before: a token may end inside a UTF-8 character (the tokenizer's
stream holds it back), and the last characters may be the start of a stop string (StopText holds them back). So a stop
string that spans several tokens never shows, not even its first letter, and the text does not depend on how it was cut
into tokens.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from lilliput.base.errors import UserError

if TYPE_CHECKING:
    from lilliput.data.tokenizer import TextStream

FinishReason = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. temperature 0 = greedy; 0, 1, 0, 1 switch top_k, top_p, min_p and repetition_penalty off."""

    max_tokens: int = 256  # new tokens at most; fewer where the model's context ends before
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None  # None = a fresh one for each request
    stop: tuple[str, ...] = ()  # the answer ends before the first of these strings
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        """UserError for a value out of range."""
        limits = {
            "max_tokens": (self.max_tokens >= 1, "at least 1", "max_tokens=256"),
            "temperature": (0 <= self.temperature < float("inf"), "0 (greedy) or above", "temperature=0.7"),
            "top_k": (self.top_k >= 0, "0 (off) or above", "top_k=50"),
            "top_p": (0 < self.top_p <= 1, "above 0, at most 1 (off)", "top_p=0.9"),
            "min_p": (0 <= self.min_p <= 1, "0 (off) to 1", "min_p=0.05"),
            "repetition_penalty": (0 < self.repetition_penalty < float("inf"), "above 0; 1 is off", "repetition_penalty=1.1"),
            "stop": (not isinstance(self.stop, str) and all(self.stop), "a tuple of strings, none of them empty", 'stop=("\\n",)'),
        }
        for name, (good, rule, fix) in limits.items():
            if not good:
                raise UserError(f"{name}={getattr(self, name)!r} is out of range", why=f"{name} is {rule}", fix=fix)


@dataclass(frozen=True)
class Delta:
    """One step of one request. `token` and `logprob` are None in the note that it was cancelled."""

    id: int
    token: int | None
    text: str  # what is certain since the last delta; may be empty
    finish_reason: FinishReason | None  # set on the last delta only
    logprob: float | None  # natural log of the token's probability under the model, before penalty, temperature and filters


@dataclass(frozen=True)
class Completion:
    """A finished request. `tokens` ends with the end-of-text token where that ended it; `text` has no stop string."""

    tokens: tuple[int, ...]
    text: str
    finish_reason: FinishReason
    logprobs: tuple[float, ...]


class StopText:
    """Finds stop strings in text that comes in pieces; holds back what may be the start of one."""

    def __init__(self, stops: tuple[str, ...]) -> None:
        """`stops`: strings that end the text; none = everything passes."""
        self.stops, self.held, self.found = stops, "", False

    def push(self, text: str) -> str:
        """The text that is certain now. After a stop string (the one that is complete first) `found` is true."""
        self.held += text
        ends = [(at + len(stop), at) for stop in self.stops if (at := self.held.find(stop)) >= 0]
        if ends:
            self.found = True
            sure, self.held = self.held[: min(ends)[1]], ""
            return sure
        keep = max((n for stop in self.stops for n in range(1, len(stop)) if self.held.endswith(stop[:n])), default=0)
        cut = len(self.held) - keep
        sure, self.held = self.held[:cut], self.held[cut:]
        return sure

    def flush(self) -> str:
        """What was held back, when nothing more comes."""
        rest, self.held = self.held, ""
        return rest


@dataclass
class Request:
    """One request in the engine: its tokens so far, and the text they make."""

    id: int
    prompt: list[int]
    sampling: Sampling
    limit: int  # new tokens at most, the model's context considered
    eos: frozenset[int]
    words: TextStream
    tokens: list[int] = field(default_factory=list)
    seed: int = 0

    def __post_init__(self) -> None:
        """A fresh seed where none is asked for."""
        self.stops = StopText(self.sampling.stop)
        self.seed = secrets.randbits(64) if self.sampling.seed is None else self.sampling.seed

    def known(self, start: int, stop: int) -> list[int]:
        """Ids of the tokens start..stop-1 of prompt and answer."""
        at = len(self.prompt)
        return self.prompt[start:stop] + self.tokens[max(start - at, 0) : max(stop - at, 0)]

    def append(self, token: int, logprob: float) -> Delta:
        """Take a sampled token; the delta has the text it makes certain, and the reason when it is the last."""
        self.tokens.append(token)
        if token in self.eos and not self.sampling.ignore_eos:
            return self._end(token, "stop", logprob)
        text = self.stops.push(self.words.push(token))
        if self.stops.found:
            return Delta(self.id, token, text, "stop", logprob)
        if len(self.tokens) == self.limit:
            return self._end(token, "length", logprob, text)
        return Delta(self.id, token, text, None, logprob)

    def _end(self, token: int, reason: FinishReason, logprob: float, text: str = "") -> Delta:
        text += self.stops.push(self.words.flush())
        if self.stops.found:
            return Delta(self.id, token, text, "stop", logprob)
        return Delta(self.id, token, text + self.stops.flush(), reason, logprob)
