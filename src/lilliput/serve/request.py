"""What is asked of the engine (Sampling) and what comes out of it (Delta, Completion): the contract of serve/.

A request has one prompt and `n` answers; `index` tells them apart. Every answer ends with exactly one delta that has a
finish_reason. Options mean what they mean in vLLM and OpenAI's API; the defaults are greedy and switch everything off.
Order of application: penalties, bias and bans, guide, temperature, top-k, top-p, min-p (ops/sampling.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol

from lilliput.base.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

FinishReason = Literal["stop", "length", "cancelled", "error"]
MOST = 128  # answers of one request


class Guide(Protocol):
    """Structured output: what may come next. The engine asks for the mask before each token of an answer and reports the token after."""

    def mask(self) -> Tensor:
        """int32 words [vocab / 32 rounded up], bit i of word i // 32: token i may come. The engine reads it before the next call."""
        ...

    def accept(self, token: int) -> None:
        """The token that was chosen."""
        ...

    @property
    def finished(self) -> bool:
        """Whether the answer is complete, so that it ends here."""
        ...


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. temperature 0 = greedy; 0, 1, 0, 1, 0, 0 switch top_k, top_p, min_p and the penalties off."""

    max_tokens: int = 256  # new tokens at most; fewer where the model's context ends before
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0  # of tokens of the prompt and the answer
    seed: int | None = None  # None = a fresh one for each request
    stop: tuple[str, ...] = ()  # the answer ends before the first of these strings
    ignore_eos: bool = False
    min_tokens: int = 0  # before so many, no end token, stop id or stop string ends the answer
    presence_penalty: float = 0.0  # of tokens of the answer
    frequency_penalty: float = 0.0  # ... times how often each occurred
    stop_ids: tuple[int, ...] = ()  # the answer ends with the first of these tokens, which shows no text
    bad_words: tuple[str, ...] = ()  # strings whose tokens never come in this order
    logit_bias: Mapping[int, float] = field(default_factory=dict)  # added to logits
    logprobs: int | None = None  # alternatives named with each token
    prompt_logprobs: int | None = None  # ... with each token of the prompt, in the first delta; 0: its own probability only
    n: int = 1  # answers
    best_of: int | None = None  # so many are made, the n likeliest are given, all at the end
    priority: int = 0  # lower runs first where the engine schedules by priority
    guide: Callable[[], Guide] | None = None  # makes a fresh guide for each answer
    adapter: str = ""  # name of a loaded LoRA adapter; empty = the model's own weights
    include_stop: bool = False  # the text has the stop string or stop token that ended it
    skip_special: bool = True  # control tokens show no text

    def __post_init__(self) -> None:
        """UserError for a value out of range."""
        finite = math.isfinite
        counts = lambda number: number is None or number >= 0
        strings = lambda texts: not isinstance(texts, str) and all(isinstance(text, str) and text for text in texts)
        limits = {
            "max_tokens": (self.max_tokens >= 1, "at least 1", "max_tokens=256"),
            "temperature": (0 <= self.temperature < math.inf, "0 (greedy) or above", "temperature=0.7"),
            "top_k": (self.top_k >= 0, "0 (off) or above", "top_k=50"),
            "top_p": (0 < self.top_p <= 1, "above 0, at most 1 (off)", "top_p=0.9"),
            "min_p": (0 <= self.min_p <= 1, "0 (off) to 1", "min_p=0.05"),
            "repetition_penalty": (0 < self.repetition_penalty < math.inf, "above 0; 1 is off", "repetition_penalty=1.1"),
            "presence_penalty": (finite(self.presence_penalty), "a finite number; 0 is off", "presence_penalty=0.5"),
            "frequency_penalty": (finite(self.frequency_penalty), "a finite number; 0 is off", "frequency_penalty=0.5"),
            "stop": (strings(self.stop), "a tuple of strings, none of them empty", 'stop=("\\n",)'),
            "bad_words": (strings(self.bad_words), "a tuple of strings, none of them empty", 'bad_words=("darn",)'),
            "min_tokens": (0 <= self.min_tokens <= self.max_tokens, f"0 to max_tokens, which is {self.max_tokens}", "min_tokens=0"),
            "logit_bias": (all(value < math.inf for value in self.logit_bias.values()), "numbers, or -inf for never", "logit_bias={}"),
            "logprobs": (counts(self.logprobs), "None or 0 and above", "logprobs=5"),
            "prompt_logprobs": (counts(self.prompt_logprobs), "None or 0 and above", "prompt_logprobs=5"),
            "n": (1 <= self.n <= MOST, f"1 to {MOST}", "n=1"),
            "best_of": (self.best_of is None or self.n <= self.best_of <= MOST, f"None or n to {MOST}, and n is {self.n}", f"best_of={self.n}"),
        }
        for name, (good, rule, fix) in limits.items():
            if not good:
                raise UserError(f"{name}={getattr(self, name)!r} is out of range", why=f"{name} is {rule}", fix=fix)

    @property
    def width(self) -> int:
        """Answers that are made."""
        return self.best_of or self.n


@dataclass(frozen=True)
class Scored:
    """How likely a token of the prompt was: natural log, under the model, and the likeliest tokens there where asked for."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Delta:
    """One step of one answer. `token` and `logprob` are None where it ended without one: cancelled, or an error."""

    id: int  # of the request
    index: int  # which of its answers
    token: int | None
    text: str  # what is certain since the last delta; may be empty
    finish_reason: FinishReason | None = None  # set on the last delta only
    stop_reason: str | int | None = None  # the stop string or stop id that ended it
    logprob: float | None = None  # natural log of the token's probability under the model, before penalties, temperature and filters
    top: tuple[tuple[int, float], ...] = ()  # (token, logprob) of the likeliest, where asked for
    cached: int | None = None  # on the first delta of an answer: tokens of the prompt that were in the cache already
    prompt_logprobs: tuple[Scored | None, ...] | None = None  # on the first delta, where asked for; None for the first token
    message: str = ""  # what went wrong, with finish_reason "error"
    queued: float | None = None  # on the first delta of an answer: seconds from the request to the first step that computed something of it


@dataclass(frozen=True)
class Completion:
    """A finished answer. `tokens` ends with the end token where that ended it; `text` has no stop string."""

    tokens: tuple[int, ...]
    text: str
    finish_reason: FinishReason
    logprobs: tuple[float, ...]
    index: int = 0
    stop_reason: str | int | None = None
    tops: tuple[tuple[tuple[int, float], ...], ...] = ()
    cached: int = 0
    prompt_logprobs: tuple[Scored | None, ...] | None = None


def collect(deltas: list[Delta]) -> Completion:
    """The whole of one answer's deltas. UserError when it ended with an error."""
    first, last = deltas[0], deltas[-1]
    assert last.finish_reason is not None, "an answer ends with a reason"
    if last.finish_reason == "error":
        raise UserError("the answer broke off", last.message, "see the reason")
    said = [delta for delta in deltas if delta.token is not None]
    tokens, logprobs = tuple(d.token for d in said if d.token is not None), tuple(d.logprob for d in said if d.logprob is not None)
    text = "".join(delta.text for delta in deltas)
    return Completion(tokens, text, last.finish_reason, logprobs, last.index, last.stop_reason, tuple(d.top for d in said), first.cached or 0,
                      first.prompt_logprobs)  # fmt: skip
