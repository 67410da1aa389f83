"""Scheduler: which tokens of which sequences run in the next step (continuous batching, chunked prefill).

There is no prefill phase and no decode phase: a sequence has tokens that are known and tokens that are computed, and
each step hands out one budget of tokens, first to the running sequences, then to the waiting ones in the order of
their arrival (FCFS). A long prompt is cut into chunks that fill what the others leave, so it never stops their answers.

Admission takes all the blocks a sequence can ever need, so a running sequence never lacks memory; the price is that
the blocks of an answer that ends early were kept for nothing. One invariant follows from the order: only the last of
the running sequences can still be in its prompt, all before it need one token, so each of them moves in every step.

Plain integers, no tensors: tested over random loads without a model.
Yu et al. 2022 (Orca: iteration-level scheduling); Agrawal et al. 2023, arXiv 2308.16369 (chunked prefill).
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from lilliput.serve.blocks import BlockPool, blocks_for

SCORED = 256  # rows of logits in one step for a prompt that is scored: 50 MB with a vocabulary of 49,152


@dataclass
class Sequence:
    """What the scheduler knows of a request."""

    id: int
    known: int  # tokens whose ids are known: the prompt and what has been sampled
    reserve: int  # tokens of cache it can need at most
    prompt: int  # tokens of the prompt
    scores: bool = False  # every row of the prompt is asked for its logits
    computed: int = 0  # tokens whose keys and values are in the cache
    table: list[int] = field(default_factory=list)  # its blocks; empty while it waits


@dataclass(frozen=True)
class Chunk:
    """Tokens start..stop-1 of one sequence in one step. `samples`: its last row gives the next token."""

    id: int
    start: int
    stop: int
    samples: bool
    table: list[int]
    wants: int  # logits of so many rows, the last ones
    prompt: int = 0  # rows of them that are of the prompt


class Scheduler:
    """Waiting and running sequences over one block pool."""

    def __init__(self, pool: BlockPool, max_batch_tokens: int) -> None:
        """`max_batch_tokens`: tokens of one step over all sequences, at most."""
        self.pool, self.max_batch_tokens = pool, max_batch_tokens
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []

    def add(self, id: int, known: int, reserve: int, scores: bool = False) -> None:
        """Queue a sequence of `known` prompt tokens that needs `reserve` tokens of cache at most. scores: the logits of the whole prompt are
        wanted, which come in chunks of SCORED rows."""
        assert blocks_for(reserve) <= self.pool.total, f"sequence {id} can never fit: the engine refuses it before"
        self.waiting.append(Sequence(id, known, reserve, known, scores))

    def schedule(self) -> list[Chunk]:
        """The chunks of the next step: running sequences first, then admissions while budget and blocks last."""
        chunks: list[Chunk] = []
        budget = self.max_batch_tokens  # never 0 inside the first loop: see the invariant above
        for seq in self.running:
            budget -= self._take(seq, budget, chunks)
        while budget and self.waiting and self.pool.can_alloc(need := blocks_for(self.waiting[0].reserve)):
            seq = self.waiting.popleft()
            seq.table = self.pool.alloc(need)
            self.running.append(seq)
            budget -= self._take(seq, budget, chunks)
        return chunks

    def commit(self, chunk: Chunk, sampled: bool) -> None:
        """The chunk is in the cache; with `sampled` the sequence also has one more known token."""
        seq = self._find(chunk.id)
        seq.computed = chunk.stop
        seq.known += sampled

    def finish(self, id: int) -> None:
        """Forget a running or waiting sequence; its blocks are free at once."""
        seq = self._find(id)
        if seq.table:
            self.running.remove(seq)
            self.pool.free(seq.table)
        else:
            self.waiting.remove(seq)

    def _take(self, seq: Sequence, budget: int, chunks: list[Chunk]) -> int:
        asked = seq.scores and seq.computed < seq.prompt
        count = min(seq.known - seq.computed, budget, SCORED if asked else budget)
        stop = seq.computed + count
        samples = stop == seq.known
        prompt = max(0, min(stop, seq.prompt) - seq.computed)
        chunks.append(Chunk(seq.id, seq.computed, stop, samples, seq.table, count if asked else int(samples), prompt))
        return count

    def _find(self, id: int) -> Sequence:
        return next(seq for seq in (*self.running, *self.waiting) if seq.id == id)
