"""Speculation: guess several tokens cheaply, let the model judge them all in one pass, keep what it would have said itself.

A pass over a few rows costs little more than one over a single row, because the weights are read once. With an acceptance rate of
alpha, gamma guesses give (1 - alpha^(gamma + 1)) / (1 - alpha) tokens a pass.

Two ways to judge, both exact:
    guesses with a distribution q    accept x with probability min(1, p(x) / q(x)), else draw from norm(max(0, p - q)); `judge`
    certain guesses (q is one-hot)   draw from p as always, and keep the guesses as long as they are what was drawn; `matched`.
                                     It is the same rule (accepted with p(x), what is drawn else is p without x), and with the same
                                     random numbers it gives the very tokens that would have come without guesses.
p and q are after temperature, top-k, top-p and min-p. `Controller` picks gamma from what was accepted and what a step took.
When not: large batches, where rows cost what they cost; the controller then stops guessing.

Leviathan, Kalman & Matias 2023, arXiv 2211.17192, sections 2.3, 3.1 to 3.5, appendix A.1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lilliput.base import registry
from lilliput.base.protocols import Drafter

if TYPE_CHECKING:
    from torch import Tensor

    from lilliput.ops.sampling import Choice, Draw
    from lilliput.serve.runners.mover import Swap
    from lilliput.serve.scheduler import Chunk, Moves, Seq


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
    """How many tokens to guess next: the gamma with the most expected tokens a second, 0 when none wins by `margin`.

    What it knows is measured: the share of guesses that are accepted (recent ones count more) and the seconds of a step by its
    number of rows. While it guesses nothing it tries again after `patience` steps, then after twice as many and so on, and not at all
    where even perfect guesses would not pay. While it guesses it takes one plain step in `patience`, since contexts grow.
    """

    FORGET = 0.97  # weight of the past at each observation
    PRIOR = (0.6, 4.0)  # acceptance at the start, and how many guesses that is worth
    TRY = 2

    def __init__(self, most: int = 8, margin: float = 1.05, patience: int = 128) -> None:
        self.most, self.margin, self.patience = most, margin, patience
        self.proposed = self.accepted = 0  # over all
        self._good, self._tried = self.PRIOR[0] * self.PRIOR[1], self.PRIOR[1]
        self._seconds: dict[int, float] = {}
        self._since, self._wait = 0, patience  # steps since the last change between guessing and not, and until the next trial

    @property
    def alpha(self) -> float:
        """The recent probability that a guess is accepted when those before it were."""
        return self._good / self._tried

    def observe(self, proposed: int, accepted: int) -> None:
        """Of one sequence in one step: guesses after the first wrong one say nothing."""
        if not proposed:
            return
        self.proposed, self.accepted = self.proposed + proposed, self.accepted + accepted
        self._good = self.FORGET * self._good + accepted
        self._tried = self.FORGET * self._tried + min(accepted + 1, proposed)

    def took(self, rows: int, seconds: float) -> None:
        """A step of so many rows, guesses included, took so long."""
        known = self._seconds.get(rows)
        self._seconds[rows] = seconds if known is None else 0.8 * known + 0.2 * min(seconds, 3 * known)  # a lost core is no news

    def seconds(self, rows: int) -> float | None:
        """What a step of so many rows takes: measured, or on the line through the two nearest that were; None where neither is there."""
        if rows in self._seconds:
            return self._seconds[rows]
        if len(self._seconds) < 2:
            return None
        low, high = sorted(sorted(self._seconds, key=lambda n: abs(n - rows))[:2])
        slope = max(0.0, (self._seconds[high] - self._seconds[low]) / (high - low))
        return max(1e-9, self._seconds[low] + slope * (rows - low))

    def gamma(self, sequences: int) -> int:
        """Guesses for each of so many sequences that answer now."""
        if self.most == 0:
            return 0
        self._since += 1
        plain, trial = self.seconds(sequences), min(self.TRY, self.most)
        if plain is None:
            return 0
        if self.seconds(sequences * (1 + trial)) is None:
            return trial
        times = {g: self.seconds(sequences * (1 + g)) or plain for g in range(1, self.most + 1)}
        best = max(times, key=lambda g: expected_tokens(self.alpha, g) / times[g])
        if expected_tokens(self.alpha, best) / times[best] * plain >= self.margin:
            self._wait = self.patience
            if self._since >= self.patience:
                self._since = 0
                return 0
            return best
        if self._since < self._wait or all((g + 1) / times[g] * plain < self.margin for g in times):
            return 0
        self._since, self._wait = 0, 2 * self._wait
        return trial


@dataclass(frozen=True)
class Place:
    """What a drafter may use: the model, its runner, the blocks of its cache and its swap space, and how long a request may be."""

    model: Any
    runner: Any
    blocks: int
    swap: Swap
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

    def plan(self, answering: Sequence[tuple[Seq, int]]) -> None:
        """Set the drafts of the sequences that answer now; each beside the tokens that it may have after the next."""
        gamma = self.control.gamma(len(answering)) if answering else 0
        for seq, room in answering:
            seq.draft = self.drafter.plan(seq.id, seq.tokens, min(gamma, room)) if gamma and room > 0 else []

    def fill(self, chunks: Sequence[Chunk], draw: Callable[[int, int], Draw]) -> None:
        """Complete the guesses in the chunks."""
        self._q = self.drafter.fill(chunks, draw)

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

    def took(self, chunks: Sequence[Chunk], accepted: Sequence[int], seconds: float) -> None:
        """A step has ended: how many guesses of each chunk were accepted. Steps with prompts say nothing of what a guess costs."""
        for chunk, count in zip(chunks, accepted):
            self.control.observe(chunk.draft, count)
        if not any(chunk.prompt for chunk in chunks):
            self.control.took(sum(chunk.stop - chunk.start for chunk in chunks), seconds)

    def move(self, moves: Moves) -> None:
        """What happens to blocks happens to the drafter's."""
        self.drafter.move(moves)

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
