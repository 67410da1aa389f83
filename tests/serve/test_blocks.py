"""Blocks: reference counts, contents and the free list against a brute-force oracle over random operations; each rule by example."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from served import forget

from lilliput.serve.blocks import BLOCK, BlockPool, Pairs, Table, blocks_for, consecutive, salted, slots


def test_blocks_for_rounds_up() -> None:
    assert [blocks_for(n) for n in (0, 1, BLOCK, BLOCK + 1, 10 * BLOCK)] == [0, 1, 1, 2, 10]


def test_slots_follow_the_table() -> None:
    assert slots([7, 2], 14, 18) == [7 * BLOCK + 14, 7 * BLOCK + 15, 2 * BLOCK, 2 * BLOCK + 1]


def filled(pool: BlockPool, tokens: list[int], salt: bytes = b"") -> Table:
    table = Table(salt)
    pool.grow(table, len(tokens))
    pool.commit(table, tokens, len(tokens))
    return table


def test_a_sequence_stays_one_slice_while_the_next_block_is_free() -> None:
    pool = BlockPool(8, sharing=False)
    first, second = filled(pool, [1] * 20), filled(pool, [2] * 20)
    assert list(first.blocks) == [0, 1] and list(second.blocks) == [2, 3]
    pool.free(first)
    pool.grow(second, 6 * BLOCK)
    assert list(second.blocks) == [2, 3, 4, 5, 6, 7] and consecutive(second.blocks)
    assert list(filled(pool, [3] * 20).blocks) == [0, 1]


def test_a_fork_shares_and_the_first_to_write_copies() -> None:
    pool = BlockPool(8)
    parent = filled(pool, [1] * 20)
    child = pool.fork(parent)
    assert list(child.blocks) == list(parent.blocks) and pool.free_count == 6
    assert pool.needs([(parent, 21), (child, 21)]) == 1, "the last owner writes in place"
    assert pool.grow(child, 21) == [(1, 2)] and list(child.blocks) == [0, 2]
    assert pool.needs([(parent, 21)]) == 0 and pool.grow(parent, 21) == []
    pool.free(parent)
    assert pool.refs[:3] == [1, 0, 1]
    pool.free(child)
    assert pool.free_count == 8


def test_a_full_block_is_shared_for_good() -> None:
    pool = BlockPool(8)
    parent = filled(pool, [1] * 32)
    child = pool.fork(parent)
    assert pool.needs([(parent, 33), (child, 33)]) == 2 and pool.grow(parent, 33) == pool.grow(child, 33) == []


def test_only_what_is_committed_is_found() -> None:
    pool = BlockPool(8)
    table = Table()
    pool.grow(table, 40)
    assert pool.find(pool.keys(Table(), [5] * 40, 2)) == []
    pool.commit(table, [5] * 40, 31)
    keys = pool.keys(Table(), [5] * 40, 2)
    assert pool.find(keys) == [table.blocks[0]]
    pool.commit(table, [5] * 40, 40)
    assert pool.find(keys) == list(table.blocks[:2])
    assert pool.find(pool.keys(Table(salted("adapter")), [5] * 40, 2)) == [], "another salt, another cache"
    other = [5] * 16 + [6] + [5] * 15
    assert pool.find(pool.keys(Table(), other, 2)) == [table.blocks[0]]


def test_free_blocks_leave_in_the_order_of_their_use_and_ends_before_beginnings() -> None:
    pool = BlockPool(5)
    first, second = filled(pool, [1] * 32), filled(pool, [2] * 32)
    keys = [pool.keys(Table(), [n] * 32, 2) for n in (1, 2)]
    pool.free(first)
    pool.free(second)
    pool.adopt(table := Table(), pool.find(keys[0]))
    assert pool.free_count == 3
    pool.free(table)  # the first was used last
    taken = filled(pool, [3] * 32)  # the empty block, then the end of the second
    assert len(taken.blocks) == 2 and [len(pool.find(k)) for k in keys] == [2, 1]
    filled(pool, [4] * 16)
    assert [len(pool.find(k)) for k in keys] == [2, 0]
    filled(pool, [6] * 16)
    assert [len(pool.find(k)) for k in keys] == [1, 0]


def test_without_sharing_nothing_is_found() -> None:
    pool = BlockPool(5, sharing=False)
    filled(pool, [1] * 32)
    assert pool.find(pool.keys(Table(), [1] * 32, 2)) == []


def test_swap_keeps_the_sharing_of_a_group() -> None:
    pool = BlockPool(8, swap=4)
    parent = filled(pool, [1] * 40)
    child = pool.fork(parent)
    pool.grow(child, 41)
    pool.commit(child, [1] * 41, 41)
    assert len(pool.swap_out([parent, child])) == 4 and pool.free_count == 8 and pool.swap_free == 0
    forget(pool)
    assert len(pool.committed([parent, child])) == 4
    assert len(pool.swap_in([parent, child])) == 4 and pool.swap_free == 4 and pool.free_count == 4
    assert parent.blocks[:2] == child.blocks[:2] and parent.blocks[2] != child.blocks[2]
    assert pool.find(pool.keys(Table(), [1] * 40, 2)) == list(parent.blocks[:2]), "and can be found again"


def test_what_can_be_found_is_not_copied_back() -> None:
    pool = BlockPool(8, swap=4)
    table = filled(pool, [1] * 40)
    pool.swap_out([table])
    assert [to for _, to in pool.swap_in([table])] == [table.blocks[2]], "the two full blocks were still there"


def test_misuse_is_our_fault() -> None:
    pool = BlockPool(2)
    table = filled(pool, [1] * 32)
    with pytest.raises(AssertionError, match="no block is free"):
        pool.grow(table, 33)
    with pytest.raises(AssertionError, match="33 tokens committed, room for 32"):
        pool.commit(table, [1] * 33, 33)
    with pytest.raises(AssertionError, match="0 are free"):
        pool.swap_out([table])
    with pytest.raises(AssertionError, match="only an empty table"):
        pool.adopt(table, [0])


class World:
    """The oracle: what lies in each slot (a number of the whole history up to its token), and for each sequence what it must read there."""

    def __init__(self, seed: int, total: int = 40, swap: int = 30) -> None:
        self.draw, self.pool = random.Random(seed), BlockPool(total, swap=swap)
        self.cells: list[list[object]] = [[None] * BLOCK for _ in range(total)]
        self.aside: list[list[object]] = [[None] * BLOCK for _ in range(swap)]
        self.groups: list[list[tuple[Table, list[int]]]] = []  # sequences that are forks of one another
        self.preempted: list[tuple[bytes, list[int]]] = []
        self.done = Counter[str]()
        self.beginnings = [[self.draw.choice([0, 1]) for _ in range(70)] for _ in range(4)]

    def copy(self, pairs: Pairs, source: list[list[object]], target: list[list[object]]) -> None:
        assert len({to for _, to in pairs}) == len(pairs)
        for to, cell in [(to, list(source[at])) for at, to in pairs]:
            target[to] = cell

    def read(self, table: Table, tokens: list[int]) -> None:
        cells, history = self.aside if table.swapped else self.cells, hash(table.salt)
        for t in range(table.length):
            history = hash((history, tokens[t]))
            assert cells[table.blocks[t // BLOCK]][t % BLOCK] == history, f"token {t} was not written, or by another"

    def counts(self) -> None:
        tables = [table for group in self.groups for table, _ in group]
        held = Counter(block for table in tables if not table.swapped for block in table.blocks)
        assert [held[block] for block in range(self.pool.total)] == self.pool.refs
        assert self.pool.free_count == self.pool.total - len(held)
        slots = {slot for table in tables if table.swapped for slot in table.blocks}
        assert self.pool.swap_free == self.pool.swap_total - len(slots)

    def here(self) -> list[list[tuple[Table, list[int]]]]:
        return [group for group in self.groups if not group[0][0].swapped]

    def write(self, table: Table, tokens: list[int], stop: int, commit: int) -> bool:
        """Grow to `stop`, write every slot from the committed ones on, commit fewer."""
        if self.pool.needs([(table, stop)]) > self.pool.free_count:
            return False
        self.copy(self.pool.grow(table, stop), self.cells, self.cells)
        history = hash(table.salt)
        for t in range(stop):
            history = hash((history, tokens[t] if t < len(tokens) else -1))
            if t >= table.length:
                assert self.pool.refs[table.blocks[t // BLOCK]] == 1, "a shared block is written"
                self.cells[table.blocks[t // BLOCK]][t % BLOCK] = history
        self.pool.commit(table, tokens, commit)
        return True

    def begin(self, salt: bytes, tokens: list[int]) -> None:
        table = Table(salt)
        found = self.pool.find(self.pool.keys(table, tokens, (len(tokens) - 1) // BLOCK))
        if blocks_for(len(tokens)) - len(found) + self.pool.unheld(found) > self.pool.free_count:
            return
        self.pool.adopt(table, found)
        self.done["found"] += len(found)
        self.read(table, tokens)
        assert self.write(table, tokens, len(tokens), len(tokens))
        self.groups.append([(table, tokens)])

    def act(self) -> None:
        draw = self.draw
        what = draw.choice(["new", "append", "append", "append", "append", "fork", "free", "swap", "return", "recompute", "again"])
        here = self.here()
        group = draw.choice(here) if here else []
        table, tokens = draw.choice(group) if group else (Table(), [])
        if what == "new":
            tokens = draw.choice(self.beginnings)[: draw.randrange(1, 70)] + [draw.choice([0, 1]) for _ in range(draw.randrange(20))]
            self.begin(draw.choice([b"", b"lora"]), tokens)
        elif what == "append" and group:
            new = [draw.choice([0, 0, 0, 1]) for _ in range(draw.choice([1, 1, 1, 5, 20]))]
            guessed = draw.choice([0, 0, 3])
            if self.write(table, tokens + new, table.length + len(new) + guessed, table.length + len(new)):
                tokens += new
                self.read(table, tokens)
        elif what == "fork" and group and len(group) < 4:
            group.append((self.pool.fork(table), list(tokens)))
        elif what == "free" and group:
            group.remove((table, tokens))
            self.pool.free(table)
        elif what == "swap" and group and len(self.pool.committed([t for t, _ in group])) <= self.pool.swap_free:
            self.copy(self.pool.swap_out([t for t, _ in group]), self.cells, self.aside)
        elif what == "return" and len(self.groups) > len(here):
            group = draw.choice([g for g in self.groups if g[0][0].swapped])
            tables = [t for t, _ in group]
            if draw.random() < 0.1:
                gone = group.pop()
                self.pool.free(gone[0])
            elif len(self.pool.committed(tables)) <= self.pool.free_count:
                self.copy(self.pool.swap_in(tables), self.aside, self.cells)
                for t, all_tokens in group:
                    self.read(t, all_tokens)
        elif what == "recompute" and group:
            for t, all_tokens in group:
                self.preempted.append((t.salt, all_tokens))
                self.pool.free(t)
            group.clear()
        elif what == "again" and self.preempted:
            self.begin(*self.preempted.pop(draw.randrange(len(self.preempted))))
        else:
            return
        self.done[what] += 1
        self.groups = [g for g in self.groups if g]


def fuzz(seed: int, operations: int, every: int) -> None:
    world = World(seed)
    for at in range(operations):
        world.act()
        if at % every == 0:
            world.counts()
            for group in world.groups:
                for table, tokens in group:
                    world.read(table, tokens)
    least = operations // 500
    assert all(world.done[what] > least for what in ("new", "append", "fork", "free", "swap", "return", "recompute", "again", "found")), world.done
    for group in world.groups:
        for table, _ in group:
            world.pool.free(table)
    world.groups = []
    world.counts()
    assert world.pool.free_count == world.pool.total and world.pool.swap_free == world.pool.swap_total


@pytest.mark.parametrize("seed", range(4))
def test_random_operations_against_the_oracle(seed: int) -> None:
    fuzz(seed, 5_000, 1)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_million_random_operations_against_the_oracle() -> None:
    fuzz(0, 1_000_000, 10)
