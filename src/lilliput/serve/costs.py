"""What steps and copies take on this machine, as measured, and what follows from it.

Swap or recompute? What a preempted group would cost either way:

    recompute   its tokens x seconds a token of a step with many rows (a running mean over such steps)
    swap        its blocks, out and back, x seconds a block (the first group's blocks are copied once to see, for memory and for the file)

Kwon et al. 2023, section 7.3: the two are close at blocks of 16 to 64 tokens; small blocks favour recomputation.

How much of a prompt beside answers? What a step of the wanted length has time for, by the same seconds a token. It corrects itself: steps that
turn out longer (contexts grow, a core is lost) make the next ones smaller.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Literal

from lilliput.serve.scheduler import Group, Moves, Way

if TYPE_CHECKING:
    from lilliput.base.protocols import Runner
    from lilliput.serve.blocks import BlockPool

MANY = 32  # rows from which a step's time a row is that of a prompt
PROBE = 8  # blocks copied to see what one costs


class Costs:
    """Chooses how groups are preempted, and how many tokens of prompts stand beside answers."""

    def __init__(self, pool: BlockPool, runner: Runner, way: Literal["auto", "swap", "recompute"], host: int | None = None, step: float = 0.0) -> None:
        """`way`: auto, or what is done always (swap: while there is room). `host`: slots of swap space in memory, the first; None: all.
        `step`: seconds that a step should take at most."""
        self.pool, self.runner, self.way, self.wanted = pool, runner, way, step
        self.host = pool.swap_total if host is None else host
        self.token_seconds = self.block_seconds = self.file_seconds = 0.0  # 0: not measured yet

    def step(self, rows: int, seconds: float) -> None:
        """A step of so many rows took so long."""
        if rows >= MANY:
            each = seconds / rows
            self.token_seconds = each if not self.token_seconds else 0.8 * self.token_seconds + 0.2 * each

    def pace(self, rows: int) -> int:
        """Tokens of prompts for which a step has time beside so many rows of answers: so many at least that it says again what one takes."""
        return max(MANY, int(self.wanted / self.token_seconds) - rows) if self.token_seconds else 2 * MANY

    def choose(self, group: Group) -> Way:
        """The cheaper way; recompute where nothing of it could be measured or there is no swap space."""
        if self.way != "auto" or not self.pool.swap_free:
            return "swap" if self.way == "swap" else "recompute"
        blocks, free = list(self.pool.committed(group.tables)), self.pool.swap_slots()
        near, far = ([slot for slot in free if (slot < self.host) == inside] for inside in (True, False))
        aside = min(len(blocks), len(near))
        if aside and not self.block_seconds:
            self.block_seconds = self._probe(blocks, near)
        if aside < len(blocks) and far and not self.file_seconds:
            self.file_seconds = self._probe(blocks, far)
        tokens = group.prompt + sum(max(0, seq.table.length - group.prompt) for seq in group.seqs)
        seconds = aside * self.block_seconds + (len(blocks) - aside) * self.file_seconds
        return "swap" if 2 * seconds < tokens * self.token_seconds else "recompute"

    def _probe(self, blocks: list[int], slots: list[int]) -> float:
        """Seconds of a block that goes to one of these free slots."""
        pairs, seconds = list(zip(blocks[:PROBE], slots)), 0.0
        for _ in range(2):  # the first takes the memory
            start = time.perf_counter()
            self.runner.move(Moves(out=pairs))
            seconds = (time.perf_counter() - start) / len(pairs)
        return seconds
