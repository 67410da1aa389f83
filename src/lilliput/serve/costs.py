"""Swap or recompute? What a preempted group would cost either way, from what this machine has been measured to do.

    recompute   its tokens x seconds a token of a step with many rows (a running mean over such steps)
    swap        its blocks, out and back, x seconds a block (the first group's blocks are copied once to see)

Kwon et al. 2023, section 7.3: the two are close at blocks of 16 to 64 tokens; small blocks favour recomputation.
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
    """Chooses how groups are preempted."""

    def __init__(self, pool: BlockPool, runner: Runner, way: Literal["auto", "swap", "recompute"]) -> None:
        """`way`: auto, or what is done always (swap: while there is room)."""
        self.pool, self.runner, self.way = pool, runner, way
        self.token_seconds = self.block_seconds = 0.0  # 0: not measured yet

    def step(self, rows: int, seconds: float) -> None:
        """A step of so many rows took so long."""
        if rows >= MANY:
            each = seconds / rows
            self.token_seconds = each if not self.token_seconds else 0.8 * self.token_seconds + 0.2 * each

    def choose(self, group: Group) -> Way:
        """The cheaper way; recompute where nothing of it could be measured or there is no swap space."""
        if self.way != "auto" or not self.pool.swap_free:
            return "swap" if self.way == "swap" else "recompute"
        blocks = list(self.pool.committed(group.tables))
        if not self.block_seconds:
            self._probe(blocks[: min(PROBE, self.pool.swap_free)])
        tokens = group.prompt + sum(max(0, seq.table.length - group.prompt) for seq in group.seqs)
        return "swap" if 2 * len(blocks) * self.block_seconds < tokens * self.token_seconds else "recompute"

    def _probe(self, blocks: list[int]) -> None:
        pairs = list(zip(blocks, self.pool.swap_slots()))
        for _ in range(2):  # the first takes the memory
            start = time.perf_counter()
            self.runner.move(Moves(out=pairs))
            self.block_seconds = (time.perf_counter() - start) / len(pairs)
