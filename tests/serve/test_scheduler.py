"""Scheduler over random loads, without a model: every request finishes, no step is over budget, no block leaks."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from lilliput.serve.blocks import BLOCK, BlockPool, blocks_for
from lilliput.serve.scheduler import Scheduler


def test_a_long_prompt_is_cut_into_chunks_beside_a_running_answer() -> None:
    scheduler = Scheduler(BlockPool(10), max_batch_tokens=8)
    scheduler.add(1, known=3, reserve=20)
    (chunk,) = scheduler.schedule()
    assert (chunk.start, chunk.stop, chunk.samples) == (0, 3, True)
    scheduler.commit(chunk, sampled=True)
    scheduler.add(2, known=20, reserve=30)
    spans = []
    for _ in range(3):
        chunks = scheduler.schedule()
        spans.append([(c.id, c.start, c.stop, c.samples) for c in chunks])
        for c in chunks:
            scheduler.commit(c, c.samples)
    assert spans == [
        [(1, 3, 4, True), (2, 0, 7, False)],
        [(1, 4, 5, True), (2, 7, 14, False)],
        [(1, 5, 6, True), (2, 14, 20, True)],
    ]


def test_admission_waits_for_blocks_in_the_order_of_arrival() -> None:
    scheduler = Scheduler(BlockPool(4), max_batch_tokens=100)
    scheduler.add(1, known=5, reserve=3 * BLOCK)
    scheduler.add(2, known=5, reserve=2 * BLOCK)  # does not fit beside 1
    scheduler.add(3, known=5, reserve=1)  # would fit, but does not overtake 2
    assert [c.id for c in scheduler.schedule()] == [1]
    scheduler.finish(1)
    assert [c.id for c in scheduler.schedule()] == [2, 3]


def test_finish_frees_running_and_waiting_sequences() -> None:
    pool = BlockPool(3)
    scheduler = Scheduler(pool, max_batch_tokens=4)
    scheduler.add(1, known=4, reserve=2 * BLOCK)
    scheduler.add(2, known=4, reserve=2 * BLOCK)
    scheduler.schedule()
    assert pool.free_count == 1
    scheduler.finish(2)
    assert not scheduler.waiting and pool.free_count == 1
    scheduler.finish(1)
    assert not scheduler.running and pool.free_count == 3


requests = st.lists(st.tuples(st.integers(1, 70), st.integers(1, 25), st.integers(0, 12), st.booleans()), min_size=1, max_size=14)


@settings(deadline=None, max_examples=200)
@given(load=requests, budget=st.integers(1, 40), blocks=st.integers(6, 20))
def test_random_loads(load: list[tuple[int, int, int, bool]], budget: int, blocks: int) -> None:
    """load: (prompt, new tokens, step of arrival, cancelled half-way)."""
    pool = BlockPool(blocks)
    scheduler = Scheduler(pool, budget)
    left = {i: new for i, (_, new, _, _) in enumerate(load)}
    progress = {i: 0 for i in left}
    admitted: list[int] = []
    step = 0
    while left:
        for i, (prompt, new, at, _) in enumerate(load):
            if at == step:
                scheduler.add(i, prompt, prompt + new - 1)
        before = {seq.id for seq in scheduler.running}
        chunks = scheduler.schedule()
        assert sum(c.stop - c.start for c in chunks) <= budget
        assert before <= {c.id for c in chunks}, "each running sequence moves in every step"
        admitted += [c.id for c in chunks if c.id not in admitted]
        tables = [b for seq in scheduler.running for b in seq.table]
        assert len(set(tables)) == len(tables) == blocks - pool.free_count
        for c in chunks:
            prompt, new, _, cancelled = load[c.id]
            assert c.start == progress[c.id] and c.start < c.stop <= prompt + new - 1
            assert len(c.table) == blocks_for(prompt + new - 1)
            assert c.samples == (c.stop >= prompt)
            progress[c.id] = c.stop
            scheduler.commit(c, c.samples)
            left[c.id] -= c.samples
            if left[c.id] == 0 or (cancelled and left[c.id] <= new // 2):
                scheduler.finish(c.id)
                del left[c.id]
        step += 1
        assert step < 12 + sum(prompt + new for prompt, new, _, _ in load), "no progress"
    arrivals = sorted(range(len(load)), key=lambda i: (load[i][2], i))
    assert admitted == arrivals
    assert pool.free_count == blocks and not scheduler.running and not scheduler.waiting
