"""Beam search: the `width` likeliest beginnings of an answer are kept, each step widens all of them and keeps the best again.

A request's beams are one group of sequences that share their blocks as a tree (fork, copy on write) and are scheduled as a
gang: a step of the search waits until every beam has its next probabilities, whatever preemption did to some of them. At
most one block is copied per fork; blocks of beams that lost are free at once (Kwon et al. 2023, section 4.4).

Rules and scores are transformers': of the best 2 x width continuations those that end go to the finished ones (only from
among the first `width`), the others go on; a finished one counts logprob / length ** length_penalty; the search ends when
no beam can still beat the worst finished one. Cost: width sequences, and their answers come at the end.

Deterministic. Not for open-ended text: the likeliest answer is dull (Holtzman et al. 2020, arXiv 1904.09751).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from lilliput.base.errors import UserError
from lilliput.serve.request import Sampling

Top = Sequence[tuple[int, float]]


@dataclass(frozen=True)
class Beam:
    """What is asked of a beam search."""

    width: int = 4
    max_tokens: int = 64
    n: int = 0  # answers that are given, the best first; 0 = all of them
    length_penalty: float = 1.0  # above 0 favours long answers
    early_stopping: bool = False  # end as soon as `width` answers have ended
    ignore_eos: bool = False
    stop_ids: tuple[int, ...] = ()  # also end an answer
    adapter: str = ""  # name of a loaded LoRA adapter; empty = the model's own weights

    def __post_init__(self) -> None:
        """UserError for a value out of range."""
        if not 1 <= self.width <= 128:
            raise UserError(f"width={self.width} is out of range", "a beam has 1 to 128 answers", "width=4")
        if self.max_tokens < 1:
            raise UserError(f"max_tokens={self.max_tokens} is out of range", "max_tokens is at least 1", "max_tokens=64")
        if not 0 <= self.n <= self.width:
            raise UserError(f"n={self.n} is out of range", f"a search of width {self.width} has so many answers", f"n={self.width}")

    @property
    def sampling(self) -> Sampling:
        """The limits and ends of this search as those of any request."""
        n = self.n or self.width
        return Sampling(self.max_tokens, ignore_eos=self.ignore_eos, stop_ids=self.stop_ids, n=n, best_of=self.width, adapter=self.adapter)


@dataclass(frozen=True)
class Hypothesis:
    """Tokens, the log probability of each, and what they count once they have ended."""

    tokens: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    score: float = 0.0
    ended: bool = False  # by an end token, not by the limit

    def longer(self, token: int, logprob: float) -> Hypothesis:
        """With one token more."""
        return Hypothesis((*self.tokens, token), (*self.logprobs, logprob))


@dataclass
class Step:
    """What a step of the search does to sequences: first every fork, then every token, then the ends."""

    fork: list[tuple[int, int]] = field(default_factory=list)  # (sequence, token): another sequence goes on from it with this token
    extend: list[tuple[int, int]] = field(default_factory=list)  # (sequence, token): it goes on itself
    finish: list[int] = field(default_factory=list)


class Search:
    """The state of one search. `begin` with the first sequence, `offer` each sequence's likeliest tokens, then do what `step` says."""

    def __init__(self, how: Beam, limit: int, ends: Iterable[int], vocab: int) -> None:
        """`limit`: new tokens at most; `ends`: tokens that end an answer; `vocab`: tokens that there are. UserError where the beam is wider."""
        self.how, self.limit, self.ends = how, limit, frozenset(ends)
        self.candidates = max(2, 1 + len(self.ends)) * how.width  # looked at in each step
        if self.candidates > vocab:
            raise UserError(f"width={how.width} is too wide", f"a step looks at {self.candidates} tokens, the vocabulary has {vocab}", "width=1")
        self.live: dict[int, Hypothesis] = {}
        self.finished: list[Hypothesis] = []  # best first
        self._offers: dict[int, Top] = {}
        self._born: list[Hypothesis] = []  # of the last step's forks, in their order

    def begin(self, seq: int) -> None:
        """The sequence that holds the prompt."""
        self.live[seq] = Hypothesis()

    def offer(self, seq: int, top: Top) -> bool:
        """The likeliest `candidates` tokens after a sequence; whether all sequences have theirs."""
        self._offers[seq] = top
        return len(self._offers) == len(self.live)

    def born(self, seqs: Sequence[int]) -> None:
        """The sequences that the last step's forks made, in its order."""
        self.live |= dict(zip(seqs, self._born, strict=True))

    @property
    def done(self) -> bool:
        """Whether the search has ended: `finished` holds its answers."""
        return not self.live

    def step(self) -> Step:
        """Widen all beams by one token and keep the best."""
        totals = {seq: sum(beam.logprobs) for seq, beam in self.live.items()}
        every = [(totals[seq] + logprob, seq, token, logprob) for seq, top in self._offers.items() for token, logprob in top]
        best = sorted(every, key=lambda one: -one[0])[: self.candidates]  # stable: equals in the order of the beams
        self._offers = {}
        length = len(next(iter(self.live.values())).tokens) + 1
        going: list[tuple[int, int, float]] = []
        for rank, (_, seq, token, logprob) in enumerate(best):
            ends = token in self.ends
            if (ends or length == self.limit) and rank < self.how.width:
                self._finish(self.live[seq].longer(token, logprob), ends)
            elif not ends and len(going) < self.how.width:
                going.append((seq, token, logprob))
        if length == self.limit or not going or self._over(totals[going[0][0]] + going[0][2], length):
            going = []
        return self._apply(going)

    def _apply(self, going: list[tuple[int, int, float]]) -> Step:
        step, before, self._born = Step(), self.live, []
        self.live = {}
        for seq, token, logprob in going:
            beam = before[seq].longer(token, logprob)
            if seq in self.live:
                step.fork.append((seq, token))
                self._born.append(beam)
            else:
                step.extend.append((seq, token))
                self.live[seq] = beam
        step.finish = [seq for seq in before if seq not in self.live]
        return step

    def _finish(self, beam: Hypothesis, ended: bool) -> None:
        score = sum(beam.logprobs) / len(beam.tokens) ** self.how.length_penalty
        self.finished.append(Hypothesis(beam.tokens, beam.logprobs, score, ended))
        self.finished = sorted(self.finished, key=lambda one: -one.score)[: self.how.width]

    def _over(self, best: float, length: int) -> bool:
        """Whether no beam can still become one of the best: its sum only falls."""
        if len(self.finished) < self.how.width:
            return False
        return self.how.early_stopping or best / length**self.how.length_penalty <= self.finished[-1].score
