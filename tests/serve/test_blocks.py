"""Blocks: nothing leaks, nothing is owned twice, runs are consecutive where the pool has one."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lilliput.serve.blocks import BLOCK, BlockPool, blocks_for, consecutive, slots


def test_blocks_for_rounds_up() -> None:
    assert [blocks_for(n) for n in (1, BLOCK, BLOCK + 1, 10 * BLOCK)] == [1, 1, 2, 10]


def test_slots_follow_the_table() -> None:
    assert slots([7, 2], 14, 18) == [7 * BLOCK + 14, 7 * BLOCK + 15, 2 * BLOCK, 2 * BLOCK + 1]


def test_a_run_is_preferred_over_scattered_blocks() -> None:
    pool = BlockPool(8)
    first, second, third = pool.alloc(2), pool.alloc(1), pool.alloc(2)
    pool.free(first)
    pool.free(third)
    assert second == [2]
    run = pool.alloc(3)  # free: 0 1 . 3 4 5 6 7
    assert run == [3, 4, 5] and consecutive(run)
    scattered = pool.alloc(4)
    assert scattered == [0, 1, 6, 7] and not consecutive(scattered)
    assert pool.free_count == 0 and not pool.can_alloc(1)


def test_freeing_twice_and_taking_too_much_are_our_faults() -> None:
    pool = BlockPool(2)
    table = pool.alloc(2)
    pool.free(table)
    with pytest.raises(AssertionError, match="block 0 is already free"):
        pool.free(table)
    with pytest.raises(AssertionError, match="asked for 3 blocks, 2 are free"):
        BlockPool(2).alloc(3)


@settings(deadline=None, max_examples=200)
@given(total=st.integers(1, 40), operations=st.lists(st.tuples(st.booleans(), st.integers(0, 40)), max_size=120))
def test_random_operations_against_a_set(total: int, operations: list[tuple[bool, int]]) -> None:
    pool, tables = BlockPool(total), []
    free = set(range(total))
    for give_back, number in operations:
        if give_back and tables:
            table = tables.pop(number % len(tables))
            pool.free(table)
            free |= set(table)
        elif number and pool.can_alloc(number):
            table = pool.alloc(number)
            assert len(set(table)) == number and set(table) <= free
            free -= set(table)
            tables.append(table)
        assert pool.free_count == len(free)
        assert pool.can_alloc(len(free)) and not pool.can_alloc(len(free) + 1)
