"""Blocks: WHERE the keys and values of a sequence lie (PagedAttention's bookkeeping, without sharing).

The cache is one array of slots, cut into blocks of 16. A sequence owns a table of block numbers: its token t lies in
slot table[t // 16] * 16 + t % 16. Waste is at most 15 slots a sequence, and there is no external fragmentation, since
any free block serves. Consecutive blocks are preferred: then the cache of a sequence is a plain slice, and a decode
step reads it without a copy.

Plain integers, no tensors: fuzzed without a model. Cost: O(blocks) for one allocation, at admission only.
Kwon et al. 2023, "Efficient Memory Management for Large Language Model Serving with PagedAttention", section 4.2.
"""

from __future__ import annotations

from itertools import pairwise

BLOCK = 16  # tokens; the paper's default: small waste, and one block is a whole tile of a kernel


def blocks_for(tokens: int) -> int:
    """Blocks that hold so many tokens."""
    return -(-tokens // BLOCK)


def consecutive(table: list[int]) -> bool:
    """Whether the blocks follow each other, so that the sequence is one slice of the cache."""
    return all(after == before + 1 for before, after in pairwise(table))


def slots(table: list[int], start: int, stop: int) -> list[int]:
    """Slot numbers of the tokens start..stop-1 of a sequence."""
    return [table[t // BLOCK] * BLOCK + t % BLOCK for t in range(start, stop)]


class BlockPool:
    """The free and the owned blocks of one cache."""

    def __init__(self, total: int) -> None:
        """A pool of `total` blocks, all free."""
        self.total = total
        self._free = [True] * total
        self.free_count = total

    def can_alloc(self, count: int) -> bool:
        """Whether so many blocks are free."""
        return count <= self.free_count

    def alloc(self, count: int) -> list[int]:
        """A table of `count` blocks: the first consecutive run that is long enough, else the lowest free ones."""
        assert self.can_alloc(count), f"asked for {count} blocks, {self.free_count} are free: can_alloc comes first"
        table = self._run(count) or [b for b, free in enumerate(self._free) if free][:count]
        for block in table:
            self._free[block] = False
        self.free_count -= count
        return table

    def free(self, table: list[int]) -> None:
        """Take the blocks back; each must be owned."""
        for block in table:
            assert not self._free[block], f"block {block} is already free"
            self._free[block] = True
        self.free_count += len(table)

    def _run(self, count: int) -> list[int]:
        length = 0
        for block, free in enumerate(self._free):
            length = length + 1 if free else 0
            if length == count:
                return list(range(block - count + 1, block + 1))
        return []
