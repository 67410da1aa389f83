"""What the engine counts: `Counts` lives in the engine and grows, `Stats` is a snapshot that any thread may keep.

Counters never fall, so two snapshots give a rate: (b.generated - a.generated) / (time between them).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lilliput.serve.scheduler import Chunk


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

    def step(self, chunks: Sequence[Chunk], new: Sequence[int], seconds: float) -> None:
        """A step of these chunks has ended, which gave each sequence so many new tokens."""
        self.steps += 1
        self.step_seconds += seconds
        self.last_step_seconds = seconds
        self.drafted += sum(chunk.draft for chunk in chunks)
        self.accepted += sum(count - 1 for chunk, count in zip(chunks, new) if chunk.draft and count)
        self.prompt += sum(chunk.prompt for chunk in chunks)

    def snapshot(self, running: int, waiting: int, blocks_used: int, blocks_total: int) -> Stats:
        """These counters beside what the engine holds now."""
        return Stats(running, waiting, blocks_used, blocks_total, **asdict(self))
