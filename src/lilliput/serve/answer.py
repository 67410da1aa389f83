"""An answer while it runs: its tokens, the text they make, how its next token is drawn, and when it ends.

Text is given out as soon as it is certain, and not before: a token may end inside a UTF-8 character (the tokenizer's
stream holds it back), and the last characters may be the start of a stop string (StopText holds them back). So a stop
string that spans several tokens never shows, not even its first letter, and the text does not depend on how it was cut
into tokens.

Bans are biases of minus infinity: end tokens before min_tokens, and the last token of a bad word after all its others.
"""

from __future__ import annotations

import math
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from lilliput.base import seeds
from lilliput.ops import sampling as ops
from lilliput.serve.beams import Hypothesis, Search
from lilliput.serve.request import Delta, FinishReason, Guide, Sampling, Scored

if TYPE_CHECKING:
    from torch import Tensor

    from lilliput.data.tokenizer import TextStream, Tokenizer
    from lilliput.serve.adapters import Adapter


class StopText:
    """Finds stop strings in text that comes in pieces; holds back what may be the start of one."""

    def __init__(self, stops: tuple[str, ...], shown: bool = False) -> None:
        """`stops`: strings that end the text; none = everything passes. `shown`: the text ends with the one that ended it."""
        self.stops, self.shown, self.held = stops, shown, ""
        self.found: str | None = None

    def push(self, text: str) -> str:
        """The text that is certain now. After a stop string (the one that is complete first) `found` names it."""
        if not self.stops:
            return text
        self.held += text
        ends = [(at + len(stop), at, stop) for stop in self.stops if (at := self.held.find(stop)) >= 0]
        if ends:
            _, at, self.found = min(ends)
            sure, self.held = self.held[: at + len(self.found) * self.shown], ""
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
    """A request in the engine: what its answers share."""

    id: int
    prompt: list[int]
    sampling: Sampling
    limit: int  # new tokens at most, the model's context considered
    eos: frozenset[int]
    words: Callable[[], TextStream]  # a fresh one for each answer
    bad: tuple[tuple[int, ...], ...] = ()  # ids of the bad words
    answers: list[Answer] = field(default_factory=list)
    scored: list[Scored | None] | None = None  # of the prompt, where asked for
    cached: int = 0  # tokens of the prompt that were in the cache already
    unborn: list[Answer] = field(default_factory=list)  # those that begin when the prompt has been computed
    adapter: Adapter | None = None  # that its tokens are computed under; held until it ends
    search: Search | None = None  # a beam search; its answers are its live beams
    kept: dict[int, list[Delta]] = field(default_factory=dict)  # index -> deltas, while best_of has not chosen

    def __post_init__(self) -> None:
        """A fresh seed where none is asked for; what every answer's draws share."""
        how = self.sampling
        self.seed = secrets.randbits(64) if how.seed is None else how.seed
        self.scored = None if how.prompt_logprobs is None else [None]
        self.made, self.begun = time.perf_counter(), 0.0  # when it was asked for, and when its first step began
        self.ends = frozenset(how.stop_ids) | (frozenset() if how.ignore_eos else self.eos)
        self.penalised = how.repetition_penalty != 1 or how.presence_penalty != 0 or how.frequency_penalty != 0
        self.looks_back = bool(self.penalised or self.bad or how.guide or how.min_tokens)  # a draw depends on the tokens before it
        self.changes = bool(self.penalised or how.temperature or how.logit_bias or self.bad or how.guide or how.min_tokens)

    @property
    def queued(self) -> float:
        """Seconds that it waited before its first step."""
        return max(0.0, self.begun - self.made)

    def held(self, delta: Delta) -> list[Delta]:
        """What may be given out after this delta: itself, or with best_of nothing until all answers have ended, then the likeliest."""
        how = self.sampling
        if how.width == how.n or self.search is not None:
            return [delta]
        self.kept.setdefault(delta.index, []).append(delta)
        if delta.finish_reason is None or self.answers:
            return []
        broken = lambda deltas: deltas[-1].finish_reason in ("cancelled", "error")
        ranked = sorted(self.kept.values(), key=lambda deltas: (broken(deltas), -sum(one.logprob or 0 for one in deltas)))
        return [replace(one, index=index) for index, deltas in enumerate(ranked[: how.n]) for one in deltas]


class Answer:
    """One sequence of a request."""

    def __init__(self, id: int, request: Request, index: int) -> None:
        """`id`: of its sequence in the scheduler."""
        self.id, self.request, self.index = id, request, index
        self.tokens: list[int] = []
        self.logprob = 0.0  # of all its tokens
        how = request.sampling
        self.seed = request.seed if index == 0 else seeds.key("answer", request.seed, index)
        self._guide: Guide | None = None  # made when the first token is drawn
        self._words, self._stops, self._started = request.words(), StopText(how.stop, how.include_stop), False
        self._seen: dict[int, int] = dict.fromkeys(request.prompt, 0) if request.penalised else {}  # id -> times in the answer

    def draw(self, position: int, vocab: int) -> ops.Draw:
        """How the token at a position is drawn: the random number is of (seed, position). Raises what the guide raises."""
        request, how = self.request, self.request.sampling
        if not request.changes:
            return ops.GREEDY
        mask = None
        if how.guide is not None:
            self._guide = self._guide or how.guide()
            mask = self._guide.mask()
            words = -(-vocab // 32)
            if mask.numel() < words or mask.element_size() != 4 or not mask.is_contiguous() or mask.device.type != "cpu":
                raise ValueError(f"the guide's mask must be {words} or more contiguous words of 32 bits on the CPU, got {mask.numel()} of {mask.dtype}")
        u = ops.uniform(self.seed, position) if how.temperature else 0.0
        return ops.Draw(u, how.temperature, how.top_k, how.top_p, how.min_p, how.repetition_penalty, how.presence_penalty, how.frequency_penalty,
                        self._seen, self._bias(), mask)  # fmt: skip

    def append(self, token: int, logprob: float, top: tuple[tuple[int, float], ...] = ()) -> Delta:
        """Take a sampled token; the delta has the text it makes certain, and the reason when it is the last. Raises what the guide raises."""
        if self._guide is not None:
            self._guide.accept(token)
        self.tokens.append(token)
        self.logprob += logprob
        request = self.request
        if request.penalised:
            self._seen[token] = self._seen.get(token, 0) + 1
        count = len(self.tokens)
        if token in request.ends and count > request.sampling.min_tokens:
            eos = token in request.eos and not request.sampling.ignore_eos
            text = self._words.push(token) if request.sampling.include_stop else ""
            return self._end(token, "stop", logprob, top, text, reason=None if eos else token)
        text = self._words.push(token)
        if count > request.sampling.min_tokens:
            text = self._stops.push(text)
        if self._stops.found:
            return self._delta(token, text, "stop", self._stops.found, logprob, top)
        if self._guide is not None and self._guide.finished:
            return self._end(token, "stop", logprob, top, text)
        if count == request.limit:
            return self._end(token, "length", logprob, top, text)
        return self._delta(token, text, None, None, logprob, top)

    def broken(self, reason: FinishReason, message: str = "") -> Delta:
        """The last delta of an answer that ends without a token."""
        return Delta(self.request.id, self.index, None, "", reason, message=message)

    def _bias(self) -> Mapping[int, float]:
        request, how = self.request, self.request.sampling
        early = len(self.tokens) < how.min_tokens
        if not early and not request.bad:
            return how.logit_bias
        bias = dict(how.logit_bias)
        if early:
            bias |= dict.fromkeys(request.ends, -math.inf)
        for word in request.bad:
            before = len(word) - 1
            if before == 0 or (len(self.tokens) >= before and tuple(self.tokens[-before:]) == word[:-1]):
                bias[word[-1]] = -math.inf
        return bias

    def _end(self, token: int, how: FinishReason, logprob: float, top: tuple[tuple[int, float], ...], text: str = "", reason: int | None = None) -> Delta:
        text += self._stops.push(self._words.flush())
        if self._stops.found:
            return self._delta(token, text, "stop", self._stops.found, logprob, top)
        return self._delta(token, text + self._stops.flush(), how, reason, logprob, top)

    def _delta(self, token: int, text: str, how: FinishReason | None, reason: str | int | None, logprob: float, top: tuple[tuple[int, float], ...]) -> Delta:
        request = self.request
        if self._started:
            return Delta(request.id, self.index, token, text, how, reason, logprob, top)
        self._started = True
        scored = None if request.scored is None else tuple(request.scored)
        return Delta(request.id, self.index, token, text, how, reason, logprob, top, request.cached, scored, queued=request.queued)


def spoken(request: Request, found: Sequence[Hypothesis]) -> list[Delta]:
    """The deltas of a search's answers, the best first, as if each had been drawn token by token."""
    answers = [Answer(-1, request, index) for index in range(request.sampling.n)]
    return [answer.append(*pair) for answer, beam in zip(answers, found) for pair in zip(beam.tokens, beam.logprobs)]


def score_prompt(request: Request, start: int, logits_NV: Tensor) -> None:
    """Note the log probabilities of the prompt's tokens start + 1 ... from the logits of the rows before them; what is known stays."""
    assert request.scored is not None and request.sampling.prompt_logprobs is not None, "nobody asked for the prompt's probabilities"
    first = len(request.scored)  # of the tokens to score
    tokens = request.prompt[first : start + 1 + logits_NV.shape[0]]
    if not tokens:
        return
    rows_NV = logits_NV[first - start - 1 :][: len(tokens)]
    total_N = rows_NV.logsumexp(-1)
    logprobs = (rows_NV.gather(1, rows_NV.new_tensor(tokens).long()[:, None])[:, 0] - total_N).tolist()
    values_NK, ids_NK = rows_NV.topk(min(request.sampling.prompt_logprobs, rows_NV.shape[1]))
    tops = zip(ids_NK.tolist(), (values_NK - total_N[:, None]).tolist())
    request.scored += [Scored(token, logprob, tuple(zip(*top))) for token, logprob, top in zip(tokens, logprobs, tops)]


def bad_word_ids(words: tuple[str, ...], tokenizer: Tokenizer) -> tuple[tuple[int, ...], ...]:
    """The token sequences of bad words: each as it stands, and behind a space where that is a token of its own (as vLLM has it)."""
    found: list[tuple[int, ...]] = []
    for word in words:
        plain, spaced = (tuple(tokenizer.encode(before + word.lstrip(), special=False)) for before in ("", " "))
        found.append(plain)
        if spaced and plain and spaced[0] != plain[0] and len(spaced) == len(plain):
            found.append(spaced)
    return tuple(ids for ids in found if ids)
