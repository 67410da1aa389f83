"""Blocks: WHERE the keys and values of sequences lie (PagedAttention's bookkeeping).

The cache is one array of slots, cut into blocks of 16. A sequence has a table of block numbers: its token t lies in slot
table[t // 16] * 16 + t % 16. Waste is at most 15 slots a sequence, and there is no external fragmentation.

    fork      another sequence with the same tokens: the blocks are shared, each counts its tables
    grow      room for more tokens; a shared block that would be written is copied first (copy on write)
    commit    so many tokens are now in the cache for good. Only this makes full blocks findable: what is grown and not
              committed (a draft that was wrong, a step that broke) is written again
    forget    what was computed under a salt is not found again
    free      blocks of which no table is left go to a free list and keep their contents until they are taken again

Prefix reuse: a full block is known by a digest of (the digest of the block before, its 16 tokens), the first by a salt (the
adapter). Free blocks leave in the order of their last use, the end of a sequence before its beginning, empty ones first.
Swap: a second row of slots; a group's blocks go there and come back, sharing included.

Plain integers, no tensors: what must be copied comes back as pairs, which the runner executes. All operations are O(blocks
of the call). Kwon et al. 2023, "Efficient Memory Management for Large Language Model Serving with PagedAttention", section 4.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from hashlib import blake2b
from heapq import heappop, heappush
from itertools import pairwise

BLOCK = 16  # tokens; the paper's default: small waste, and one block is a whole tile of a kernel

Pairs = list[tuple[int, int]]  # (from, to)


def blocks_for(tokens: int) -> int:
    """Blocks that hold so many tokens."""
    return -(-tokens // BLOCK)


def consecutive(table: Sequence[int]) -> bool:
    """Whether the blocks follow each other, so that the sequence is one slice of the cache."""
    return all(after == before + 1 for before, after in pairwise(table))


def slots(table: Sequence[int], start: int, stop: int) -> list[int]:
    """Slot numbers of the tokens start..stop-1 of a sequence."""
    return [table[t // BLOCK] * BLOCK + t % BLOCK for t in range(start, stop)]


def chain(before: bytes, tokens: Sequence[int]) -> bytes:
    """The digest of a full block: of the digest before it (the salt, for the first) and its tokens. 128 bits, the same on every machine."""
    return blake2b(array("i", tokens).tobytes(), digest_size=16, key=before).digest()


def salted(salt: str) -> bytes:
    """What stands before the first block: sequences share only under the same salt."""
    return blake2b(salt.encode(), digest_size=16).digest()


class Table:
    """The blocks of one sequence. `length`: committed tokens. Only the pool changes it."""

    __slots__ = ("blocks", "keys", "length", "salt", "swapped")

    def __init__(self, salt: bytes = b"") -> None:
        """Empty. `salt`: see `salted`."""
        self.blocks = array("i")  # while swapped: slots of the swap space
        self.length = 0
        self.keys: list[bytes] = []  # digests of its full blocks, as far as they were asked for
        self.salt = salt
        self.swapped = False


class BlockPool:
    """The blocks of one cache, and its swap space."""

    def __init__(self, total: int, *, sharing: bool = True, swap: int = 0) -> None:
        """`total` blocks, `swap` blocks of swap space, all free. `sharing`: whether full blocks can be found again by their tokens."""
        self.total, self.sharing, self.swap_total = total, sharing, swap
        self.refs = [0] * total  # tables that hold each block
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(total))  # next to be taken first
        self._key: list[bytes | None] = [None] * total
        self._index: dict[bytes, int] = {}
        self._salt = [b""] * total  # under which each block was made findable
        self._swap_free = list(range(swap))  # a heap: low slots are in memory, high ones may be in a file
        self._swap_refs = [0] * swap

    @property
    def free_count(self) -> int:
        """Blocks that no table holds."""
        return len(self._free)

    @property
    def swap_free(self) -> int:
        """Free blocks of swap space."""
        return len(self._swap_free)

    def swap_slots(self) -> list[int]:
        """The free ones."""
        return list(self._swap_free)

    def needs(self, writes: Iterable[tuple[Table, int]]) -> int:
        """Blocks that must be free before these tables can grow to so many tokens each, copies on write included."""
        new = 0
        shared: dict[int, int] = {}  # block -> tables that write to it
        for table, stop in writes:
            held, first = len(table.blocks), table.length // BLOCK
            if stop > held * BLOCK:
                new += blocks_for(stop) - held
            if stop > table.length and first < held and self.refs[block := table.blocks[first]] > 1:
                shared[block] = shared.get(block, 0) + 1
        return new + (sum(min(writers, self.refs[block] - 1) for block, writers in shared.items()) if shared else 0)

    def grow(self, table: Table, stop: int) -> Pairs:
        """Make room for the tokens length..stop-1, in blocks that this table alone holds; what to copy before they are written."""
        copies: Pairs = []
        first = table.length // BLOCK
        if stop > table.length and first < len(table.blocks) and self.refs[shared := table.blocks[first]] > 1:
            table.blocks[first] = self._take(shared)
            self.refs[shared] -= 1
            copies.append((shared, table.blocks[first]))
        while len(table.blocks) * BLOCK < stop:
            table.blocks.append(self._take(table.blocks[-1] if table.blocks else -1))
        return copies

    def commit(self, table: Table, tokens: Sequence[int], length: int) -> None:
        """The first `length` of the sequence's tokens are in the cache; full blocks become findable."""
        assert length <= len(table.blocks) * BLOCK, f"{length} tokens committed, room for {len(table.blocks) * BLOCK}"
        first, last = table.length // BLOCK, length // BLOCK
        table.length = length
        if not self.sharing or first == last:
            return
        for at, key in enumerate(self.keys(table, tokens, last)[first:], first):
            block = table.blocks[at]
            if key not in self._index:
                self._learn(block, key, table.salt)

    def cut(self, table: Table, at: int) -> None:
        """Take full block `at` out of a table; what lies after it moves up."""
        assert at < table.length // BLOCK, "only full blocks leave a table"
        self._drop(table.blocks.pop(at))
        table.length -= BLOCK

    def keys(self, table: Table, tokens: Sequence[int], count: int) -> list[bytes]:
        """Digests of the first `count` blocks of a sequence's tokens, all full; kept in the table."""
        for at in range(len(table.keys), count):
            table.keys.append(chain(table.keys[-1] if at else table.salt, tokens[at * BLOCK : at * BLOCK + BLOCK]))
        return table.keys[:count]

    def find(self, keys: Sequence[bytes]) -> list[int]:
        """Blocks that hold the longest findable beginning of these."""
        found: list[int] = []
        for key in keys:
            block = self._index.get(key)
            if block is None:
                break
            found.append(block)
        return found

    def forget(self, salt: bytes | None) -> None:
        """Nothing that was computed under this salt (None: any) can be found any more; its blocks that no table holds are the next to be taken."""
        for block, under in enumerate(self._salt):
            if (salt is not None and under != salt) or self._key[block] is None:
                continue
            del self._index[self._key[block]]  # type: ignore[arg-type]
            self._key[block] = None
            if self.refs[block] == 0:
                self._free.move_to_end(block, last=False)

    def unheld(self, blocks: Iterable[int]) -> int:
        """How many of these blocks are on the free list: adopting them takes them off it."""
        return sum(self.refs[block] == 0 for block in blocks)

    def adopt(self, table: Table, blocks: Sequence[int]) -> None:
        """An empty table begins with these full blocks, which `find` has found."""
        assert not table.blocks and not table.swapped, "only an empty table adopts"
        for block in blocks:
            self._hold(block)
        table.blocks.extend(blocks)
        table.length = len(blocks) * BLOCK

    def fork(self, table: Table, length: int | None = None) -> Table:
        """A table with the same committed tokens (the first `length`; None: all) in the same blocks."""
        other = Table(table.salt)
        other.length = table.length if length is None else length
        other.blocks, other.keys = table.blocks[: blocks_for(other.length)], table.keys[: other.length // BLOCK]
        for block in other.blocks:
            self.refs[block] += 1
        return other

    def free(self, table: Table) -> None:
        """Empty the table, wherever its blocks lie."""
        for place in reversed(table.blocks):  # the end is taken again before the beginning
            (self._swap_drop if table.swapped else self._drop)(place)
        table.blocks, table.length, table.swapped = array("i"), 0, False

    def committed(self, tables: Iterable[Table]) -> set[int]:
        """The blocks (slots, when swapped) that hold these tables' committed tokens: what swapping moves."""
        return {block for table in tables for block in table.blocks[: blocks_for(table.length)]}

    def swap_out(self, tables: Sequence[Table]) -> Pairs:
        """Move the committed blocks of a group to the swap space: (block, slot). The blocks are free at once, so these copies come first."""
        moved = dict.fromkeys(block for table in tables for block in table.blocks[: blocks_for(table.length)])
        assert len(moved) <= self.swap_free, f"{len(moved)} blocks to swap, {self.swap_free} are free: swap_free comes first"
        pairs = [(block, heappop(self._swap_free)) for block in moved]
        place = dict(pairs)
        for table in tables:
            slots = array("i", [place[block] for block in table.blocks[: blocks_for(table.length)]])
            for slot in slots:
                self._swap_refs[slot] += 1
            for block in reversed(table.blocks):
                self._drop(block)
            table.blocks, table.swapped = slots, True
        return pairs

    def swap_in(self, tables: Sequence[Table]) -> Pairs:
        """Bring a swapped group back: (slot, block) of what must be copied. A block that can be found in the pool is shared, not copied.
        At most len(committed(tables)) blocks must be free."""
        back: dict[int, int] = {}
        pairs: Pairs = []
        for table in tables:
            blocks = array("i")
            for at, slot in enumerate(table.blocks):
                if slot in back:
                    self._hold(back[slot])
                else:
                    full = self.sharing and at < min(len(table.keys), table.length // BLOCK)
                    found = self._index.get(table.keys[at]) if full else None
                    if found is None:
                        back[slot] = block = self._take(blocks[-1] if blocks else -1)
                        pairs.append((slot, block))
                        if full:  # it can be found again: the copy comes before anything reads
                            self._learn(block, table.keys[at], table.salt)
                    else:
                        back[slot] = found
                        self._hold(found)
                blocks.append(back[slot])
                self._swap_drop(slot)
            table.blocks, table.swapped = blocks, False
        return pairs

    def _take(self, after: int) -> int:
        """A free block, now held once: the one behind `after` where that is free and empty (then a sequence stays one slice), else the first."""
        assert self._free, "no block is free: needs() comes first"
        block = after + 1
        if block in self._free and self._key[block] is None:
            del self._free[block]
        else:
            block = self._free.popitem(last=False)[0]
            key = self._key[block]
            if key is not None:
                del self._index[key]
                self._key[block] = None
        self.refs[block] = 1
        return block

    def _learn(self, block: int, key: bytes, salt: bytes) -> None:
        """A full block can be found."""
        self._key[block], self._index[key], self._salt[block] = key, block, salt

    def _hold(self, block: int) -> None:
        if self.refs[block] == 0:
            del self._free[block]
        self.refs[block] += 1

    def _swap_drop(self, slot: int) -> None:
        self._swap_refs[slot] -= 1
        if self._swap_refs[slot] == 0:
            heappush(self._swap_free, slot)

    def _drop(self, block: int) -> None:
        assert self.refs[block] > 0, f"block {block} is already free"
        self.refs[block] -= 1
        if self.refs[block] == 0:
            self._free[block] = None
            if self._key[block] is None:
                self._free.move_to_end(block, last=False)
