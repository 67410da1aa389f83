"""What the engine counts: `Counts` lives in the engine and grows, `Stats` is a snapshot that any thread may keep.

Counters never fall, so two snapshots give a rate: (b.generated - a.generated) / (time between them).
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lilliput.serve.scheduler import Chunk

STEP_TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)  # a step's tokens are counted in these classes, and one above


@dataclass(frozen=True)
class Stats:
    """The engine at one moment (running to blocks_total), and what it has done since it was made."""

    running: int  # sequences that have blocks
    waiting: int  # sequences that have none yet, or lost them
    blocks_used: int
    blocks_total: int
    steps: int
    step_seconds: float  # of all steps together
    last_step_seconds: float
    prompt: int  # tokens of prompts that were computed
    generated: int  # tokens that were sampled
    prefix_queries: int  # tokens of prompts that were looked for in the cache
    prefix_hits: int  # ... and found
    preempted_swap: int  # sequences that lost their blocks, which were copied aside
    preempted_recompute: int  # ... and whose tokens are computed again
    drafted: int  # tokens that speculation proposed
    accepted: int  # ... and the model agreed with
    drafts: int = 0  # steps of a sequence with guesses
    accepted_at: tuple[int, ...] = ()  # ... of which the first, the second, ... guess was accepted
    step_tokens: tuple[int, ...] = ()  # steps by their tokens: STEP_TOKENS
    computed: int = 0  # tokens of all steps together, guesses included
    running_adapters: tuple[str, ...] = ()  # of sequences that have blocks
    waiting_adapters: tuple[str, ...] = ()


@dataclass
class Counts:
    """The counters of Stats."""

    steps: int = 0
    step_seconds: float = 0.0
    last_step_seconds: float = 0.0
    prompt: int = 0
    generated: int = 0
    prefix_queries: int = 0
    prefix_hits: int = 0
    preempted_swap: int = 0
    preempted_recompute: int = 0
    drafted: int = 0
    accepted: int = 0
    drafts: int = 0
    accepted_at: tuple[int, ...] = ()
    step_tokens: list[int] = field(default_factory=lambda: [0] * (len(STEP_TOKENS) + 1))
    computed: int = 0

    def step(self, chunks: Sequence[Chunk], new: Sequence[int], seconds: float) -> None:
        """A step of these chunks has ended, which gave each sequence so many new tokens."""
        self.steps += 1
        self.step_seconds += seconds
        self.last_step_seconds = seconds
        rows, guessed = 0, []
        for chunk, count in zip(chunks, new):
            rows += chunk.stop - chunk.start
            self.prompt += chunk.prompt
            if chunk.draft:
                self.drafted += chunk.draft
                if count:
                    guessed.append(count - 1)
        self.computed += rows
        self.step_tokens[bisect_left(STEP_TOKENS, rows)] += 1
        if guessed:
            self.drafts += len(guessed)
            self.accepted += sum(guessed)
            longest = max(len(self.accepted_at), *guessed)
            old = self.accepted_at + (0,) * (longest - len(self.accepted_at))
            self.accepted_at = tuple(count + sum(right > at for right in guessed) for at, count in enumerate(old))

    def snapshot(self, running: int, waiting: int, blocks_used: int, blocks_total: int, adapters: Sequence[tuple[str, ...]] = ((), ())) -> Stats:
        """These counters beside what the engine holds now; `adapters`: of running and of waiting sequences."""
        counts = vars(self) | {"step_tokens": tuple(self.step_tokens)}
        return Stats(running, waiting, blocks_used, blocks_total, **counts, running_adapters=adapters[0], waiting_adapters=adapters[1])
