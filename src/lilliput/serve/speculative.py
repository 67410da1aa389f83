"""Speculation: guess several tokens cheaply, let the model judge them all in one pass, keep what it would have said itself.

A pass over a few rows costs little more than one over a single row, because the weights are read once. With an acceptance rate of
alpha, gamma guesses give (1 - alpha^(gamma + 1)) / (1 - alpha) tokens a pass.

Two ways to judge, both exact:
    guesses with a distribution q    accept x with probability min(1, p(x) / q(x)), else draw from norm(max(0, p - q)); `judge`
    certain guesses (q is one-hot)   draw from p as always, and keep the guesses as long as they are what was drawn; `matched`.
                                     It is the same rule (accepted with p(x), what is drawn else is p without x), and with the same
                                     random numbers it gives the very tokens that would have come without guesses.
p and q are after temperature, top-k, top-p and min-p. `Controller` picks gamma from what was accepted and what a step took.
When not: large batches, where rows cost what they cost; the controller then rests.

Leviathan, Kalman & Matias 2023, arXiv 2211.17192, sections 2.3, 3.1 to 3.5, appendix A.1.
"""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lilliput.base import registry
from lilliput.base.protocols import Drafter

if TYPE_CHECKING:
    from torch import Tensor

    from lilliput.ops.sampling import Choice, Draw
    from lilliput.serve.scheduler import Chunk, Group, Seq


def expected_tokens(alpha: float, gamma: int) -> float:
    """Tokens a pass gives on average (equation 1)."""
    return gamma + 1.0 if alpha == 1 else (1 - alpha ** (gamma + 1)) / (1 - alpha)


def speedup(alpha: float, gamma: int, cost: float) -> float:
    """How many times faster (theorem 3.8). cost: time of one guess over time of one pass."""
    return expected_tokens(alpha, gamma) / (gamma * cost + 1)


def operations(alpha: float, gamma: int, cost: float) -> float:
    """How many times more arithmetic (theorem 3.11). cost: operations of one guess over those of one token of the model."""
    return (gamma * cost + gamma + 1) / expected_tokens(alpha, gamma)


def best_gamma(alpha: float, cost: float, most: int = 64) -> int:
    """The number of guesses with the largest speedup; 0 when none pays."""
    return max(range(most + 1), key=lambda gamma: (speedup(alpha, gamma, cost), -gamma))


def matched(guesses: Sequence[int], drawn: Sequence[int]) -> int:
    """How many guesses are what was drawn at their places, from the first on."""
    return next((i for i, (guess, token) in enumerate(zip(guesses, drawn)) if guess != token), min(len(guesses), len(drawn)))


def judge(p_NGV: Tensor, q_NGV: Tensor, guesses_NG: Tensor, accept_NG: Tensor, draw_NG: Tensor) -> tuple[Tensor, Tensor]:
    """Accepted guesses of each of N sequences, and the token that follows them: (counts [N], tokens [N]).

    p [N, gamma + 1, V] and q [N, gamma, V]: standardised probabilities; guesses [N, gamma] drawn from q; accept [N, gamma] and
    draw [N, gamma + 1] (the one at the place of the last token is used): independent random numbers in [0, 1).
    """
    import torch

    count, gamma, vocab = q_NGV.shape
    at = guesses_NG.unsqueeze(-1)
    p, q = (x.gather(2, at).squeeze(-1) for x in (p_NGV[:, :gamma], q_NGV))
    accepted = (accept_NG * q <= p) & (q > 0)
    counts_N = accepted.long().cumprod(1).sum(1)
    row = counts_N[:, None, None].expand(count, 1, vocab)
    last_NV = p_NGV.gather(1, row).squeeze(1)
    guessed_NV = torch.cat([q_NGV, q_NGV.new_zeros(count, 1, vocab)], 1).gather(1, row).squeeze(1)
    rest_NV = (last_NV - guessed_NV).clamp(min=0)  # all of p where every guess was accepted
    empty = rest_NV.sum(1, keepdim=True) == 0  # p = q up to rounding: then nothing was rejected but by rounding
    rest_NV = torch.where(empty, last_NV, rest_NV)
    sums_NV = rest_NV.cumsum(1)
    tokens_N = torch.searchsorted(sums_NV, draw_NG.gather(1, counts_N[:, None]) * sums_NV[:, -1:], right=True).squeeze(1)
    return counts_N, tokens_N.clamp(max=vocab - 1)


class Controller:
    """How many tokens to guess next: the gamma with the most expected tokens a second; where none wins by `margin`, nothing but rare trials.

    What it knows is measured: the share of guesses that are accepted (of the last ones), the seconds of a step without guesses by its number of
    sequences, and the seconds that a guess adds to it, drafting included.

    What it may cost is bounded. A run of steps with guesses counts what it lost: its seconds, less those in which plain steps had given its tokens.
    It begins with trials of one guess, goes on while it loses nothing (at most LIMIT steps where the estimates say that it pays), and is followed by a
    rest in which `share` of the time pays for what was lost. A rest costs nothing: nobody guesses, reads ahead or looks anything up.
    """

    WINDOW = 24  # guesses that the acceptance is the mean of
    PRIOR = (0.6, 4.0)  # acceptance at the start, and how many guesses that is worth
    SEEN, HELD = 5, 9  # steps that what one takes is the median of, at least and at most: the first are slow, and a lost core is no news
    LIMIT, CREDIT = 4, 8  # plain steps that a run may lose, and that it may have won before
    FRESH = 32  # steps with guesses after which a plain one is measured again: contexts grow
    SPREAD = 64  # steps over which what a drafter had to read at first is paid

    def __init__(self, most: int = 8, margin: float = 1.05, share: float = 0.01, fixed: int | None = None) -> None:
        """`fixed`: so many guesses, whatever is known."""
        self.most, self.margin, self.share, self.fixed = most, margin, share, fixed
        self.proposed = self.accepted = 0  # over all
        self._good, self._tried = self.PRIOR[0] * self.PRIOR[1], self.PRIOR[1]
        self._plain: dict[int, deque[float]] = {}  # sequences -> seconds of the last steps without guesses
        self._guess: dict[int, deque[float]] = {}  # sequences -> seconds that each guess added to the last steps with some
        self._rest = self._lost = self._owed = self._part = 0.0  # seconds; owed: not counted as lost yet, a part of it at each step
        self._since = 0  # steps with guesses since the last without
        self._pays = False

    @property
    def alpha(self) -> float:
        """The recent probability that a guess is accepted when those before it were."""
        return self._good / self._tried

    @property
    def rests(self) -> bool:
        """Whether nothing is to be guessed now."""
        return self.fixed is None and self._rest > 0

    def observe(self, proposed: int, accepted: int) -> None:
        """Of one sequence in one step: guesses after the first wrong one say nothing."""
        judged = min(accepted + 1, proposed)
        kept = (1 - 1 / self.WINDOW) ** judged
        self.proposed, self.accepted = self.proposed + proposed, self.accepted + accepted
        self._good, self._tried = kept * self._good + accepted, kept * self._tried + judged

    def gamma(self, sequences: int) -> int:
        """Guesses for each of so many sequences that answer now."""
        if self.fixed is not None:
            return self.fixed
        seen = self._plain.get(sequences, ())
        if self.rests or len(seen) < self.SEEN or self._since >= self.FRESH:
            return 0
        price = self._price(sequences) / statistics.median(seen)
        best = max(range(1, self.most + 1), key=lambda g: expected_tokens(self.alpha, g) / (1 + price * g))
        self._pays = bool(self._guess) and expected_tokens(self.alpha, best) >= self.margin * (1 + price * best)
        return best if self._pays else 1

    def passed(self, seconds: float) -> None:
        """A step that says nothing of what guesses cost."""
        self._rest -= seconds

    def plain(self, sequences: int, seconds: float) -> None:
        """A step without guesses, nor a look for any."""
        self._rest -= seconds
        self._since = 0
        self._plain.setdefault(sequences, deque(maxlen=self.HELD)).append(seconds)

    def guessed(self, sequences: int, guesses: int, tokens: int, seconds: float, late: bool = False) -> None:
        """A step of so many sequences with so many guesses gave so many tokens. `seconds`: of the looking alone, where nothing was found to guess.
        `late`: the drafter had much to read before, which it will not read again."""
        self._since += 1
        if sequences not in self._plain:
            return
        plain = statistics.median(self._plain[sequences])
        if guesses and not late:
            seconds = min(seconds, 3 * (plain + self._price(sequences) * guesses / sequences)) if self._guess else seconds
            self._guess.setdefault(sequences, deque(maxlen=self.HELD)).append(max(0.0, seconds - plain) / guesses)
        lost = seconds - plain * tokens / sequences if guesses else seconds
        if late:
            self._owed, lost = self._owed + lost, 0.0
            self._part = self._owed / self.SPREAD
        part = min(self._part, self._owed)
        self._owed -= part
        self._lost = max(self._lost + lost + part, -self.CREDIT * plain if self._pays else 0.0)
        if self._lost > (self.LIMIT * plain if self._pays or self._owed else 0):
            self._rest, self._lost, self._owed = (self._lost + self._owed) / self.share, 0.0, 0.0

    def _price(self, sequences: int) -> float:
        """Seconds that a guess for each of so many sequences adds to a step, by what it was for as many, or nearly; 0 where it is not known."""
        if not self._guess:
            return 0.0
        return sequences * statistics.median(self._guess[min(self._guess, key=lambda n: abs(n - sequences))])


@dataclass(frozen=True)
class Place:
    """What a drafter may use: the model, its runner, the blocks of its cache, and how long a request may be."""

    model: Any
    runner: Any
    blocks: int
    kv: str
    context: int


class Speculation:
    """The engine's side: plan before a step is scheduled, fill before it runs, judge where guesses were drawn, then `took`."""

    def __init__(self, draft: Any, most: int, place: Place) -> None:
        """`draft`: a drafter's name, "name:argument", or a loaded model. `most`: guesses a sequence and step."""
        name, _, argument = draft.partition(":") if isinstance(draft, str) else ("draft_model", "", draft)
        self.drafter: Drafter = registry.find("drafter", name)(argument, place)
        self.control = Controller(most)
        self._q: dict[int, Tensor] = {}
        self._tries, self._looking = False, 0.0  # whether the step may have guesses, and the seconds that looking for them took

    def plan(self, running: Sequence[Group], waiting: bool, room: Callable[[Seq], int]) -> None:
        """Set the drafts of the sequences that answer now. `room`: tokens that one may have after its next; 0: it is not to be guessed for.
        Beside prompts nothing is guessed: rows cost there what they cost, and somebody waits."""
        self._tries, start = False, time.perf_counter()
        if self.control.rests:
            return
        seqs = [seq for group in running for seq in group.seqs if seq.missing and not seq.parked]
        if not seqs or (self.control.fixed is None and (waiting or any(seq.missing > 1 for seq in seqs))):
            return
        gamma = self.control.gamma(len(seqs))
        for seq in seqs if gamma else ():
            most = min(gamma, room(seq)) if seq.missing == 1 else 0
            seq.draft = self.drafter.plan(seq.id, seq.tokens, most) if most > 0 else []
        self._tries, self._looking = gamma > 0, time.perf_counter() - start

    def fill(self, chunks: Sequence[Chunk], draw: Callable[[int, int], Draw]) -> None:
        """Complete the guesses in the chunks."""
        self._q = self.drafter.fill(chunks, draw) if self._tries else {}

    def judge(self, chunk: Chunk, draws: Sequence[Draw], logits_NV: Tensor) -> list[Choice] | None:
        """What follows where the guesses were drawn from a distribution; None where they are certain. One draw and row a guess, and one more."""
        q_GV = self._q.get(chunk.id)
        if q_GV is None:
            return None
        import torch

        from lilliput.ops.sampling import Choice

        p_GV = torch.stack([standardised(row, how) for row, how in zip(logits_NV, draws)])
        guesses = torch.tensor(list(chunk.ids[-chunk.draft :]))
        accept = torch.tensor([another(how.u, "accept") for how in draws[:-1]], dtype=torch.float64)
        counts, token = judge(p_GV[None], q_GV[None], guesses[None], accept[None], accept.new_tensor([[how.u for how in draws]]))
        last = int(counts[0])
        totals = logits_NV.logsumexp(-1).tolist()
        tokens = [*guesses[:last].tolist(), int(token[0])]
        return [Choice(token, float(logits_NV[i, token]) - totals[i], totals[i]) for i, token in enumerate(tokens)]

    def took(self, chunks: Sequence[Chunk], new: Sequence[int], rows: int, seconds: float) -> None:
        """A step of so many rows has ended: how many tokens each chunk's sequence has got."""
        guesses = 0
        for chunk, count in zip(chunks, new) if self._tries else ():
            if chunk.draft:
                guesses += chunk.draft
                self.control.observe(chunk.draft, count - 1)
        if rows - guesses != len(chunks):  # it read prompts
            self.control.passed(seconds)
        elif not self._tries:
            self.control.plain(len(chunks), seconds)
        else:
            self.control.guessed(len(chunks), guesses, sum(new), seconds if guesses else self._looking, self.drafter.late)

    def forget(self, id: int) -> None:
        """The sequence has ended."""
        self.drafter.forget(id)


def standardised(logits_V: Tensor, how: Draw) -> Tensor:
    """Probabilities [vocab] float64 after temperature (above 0), top-k, top-p and min-p, biases before."""
    from lilliput.ops import sampling

    changed_V = logits_V
    if how.bias:
        changed_V = logits_V.clone()
        for token, value in how.bias.items():
            changed_V[token] += value
    ids_K, probs_K = sampling.candidates(changed_V, temperature=how.temperature, top_k=how.top_k, top_p=how.top_p, min_p=how.min_p)
    return probs_K.new_zeros(len(logits_V)).index_put((ids_K,), probs_K)


def another(u: float, word: str) -> float:
    """A random number in [0, 1) that belongs to u and is independent of it."""
    from lilliput.base import seeds

    return (seeds.key(word, u) >> 3) / 2**53
