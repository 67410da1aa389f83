"""Scheduler without a model: by example, and over random loads whose every read is checked against what was written."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from served import forget

from lilliput.serve.blocks import BLOCK, BlockPool, Pairs, salted
from lilliput.serve.scheduler import SCORED, Chunk, Group, Moves, Scheduler


def made(blocks: int, budget: int, swap: int = 0, **options: object) -> Scheduler:
    return Scheduler(BlockPool(blocks, swap=swap), budget, **options)  # type: ignore[arg-type]


def add(scheduler: Scheduler, id: int, prompt: int, new: int, token: int | None = None, **options: object) -> Group:
    tokens = [id if token is None else token] * prompt
    most = scheduler.most(prompt, prompt + new - 1, int(options.get("width", 1)))  # type: ignore[call-overload]
    return scheduler.add(id, id, tokens, most, **options)  # type: ignore[arg-type]


def step(scheduler: Scheduler, token: int = 9) -> list[tuple[int, int, int, bool]]:
    """One step in which every chunk that samples gets a token."""
    chunks = scheduler.schedule()
    scheduler.moves = Moves()
    for chunk in chunks:
        scheduler.commit(chunk, [token] if chunk.samples else ())
    return [(chunk.id, chunk.start, chunk.stop, chunk.samples) for chunk in chunks]


def test_a_long_prompt_is_cut_into_chunks_beside_a_running_answer() -> None:
    scheduler = made(10, 8)
    add(scheduler, 1, 3, 18)
    assert step(scheduler) == [(1, 0, 3, True)]
    add(scheduler, 2, 20, 11)
    assert [step(scheduler) for _ in range(3)] == [
        [(1, 3, 4, True), (2, 0, 7, False)],
        [(1, 4, 5, True), (2, 7, 14, False)],
        [(1, 5, 6, True), (2, 14, 20, True)],
    ]


def test_prompts_take_what_the_pace_allows_while_somebody_answers() -> None:
    asked: list[int] = []
    scheduler = made(10, 50, pace=lambda rows: (asked.append(rows), 6)[1])  # type: ignore[func-returns-value]
    add(scheduler, 1, 20, 18)
    add(scheduler, 2, 20, 9)
    assert [(c[0], c[2]) for c in step(scheduler)] == [(1, 20), (2, 20)] and not asked, "nobody answers yet"
    add(scheduler, 3, 10, 9)
    add(scheduler, 4, 10, 9)
    assert [(c[0], c[2]) for c in step(scheduler)] == [(1, 21), (2, 21), (3, 6)]
    assert [(c[0], c[2]) for c in step(scheduler)] == [(1, 22), (2, 22), (3, 10), (4, 2)], "a prompt that runs, then one that waits"
    assert asked == [2, 2]


def test_admission_waits_in_the_order_of_arrival() -> None:
    scheduler = made(4, 100)
    add(scheduler, 1, 3 * BLOCK, 10)
    add(scheduler, 2, 2 * BLOCK, 1)  # does not fit beside 1
    add(scheduler, 3, 5, 1)  # would fit, but does not overtake 2
    assert [c[0] for c in step(scheduler)] == [1]
    scheduler.finish(1)
    assert [c[0] for c in step(scheduler)] == [2, 3]


def test_the_latest_gives_way_and_goes_on_where_it_was() -> None:
    for way, swap in (("recompute", 0), ("swap", 4)):
        scheduler = made(4, 100, swap, choose=lambda group: way)  # noqa: B023
        for id in (1, 2):
            add(scheduler, id, 31, 34)
        step(scheduler)  # two blocks each: the pool is full
        step(scheduler)  # both end their second block
        assert [c[0] for c in step(scheduler)] == [1] and scheduler.preempted[way] == 1  # type: ignore[index]
        assert scheduler.pool.free_count == 1
        scheduler.finish(1)
        if way == "swap":
            chunks = scheduler.schedule()
            assert chunks == [] and len(scheduler.moves.back) == 1, "one of its two blocks was still in the pool"
            scheduler.moves = Moves()
        assert step(scheduler) == [(2, 32 if way == "swap" else 16, 33, True)], "group 1 has taken its second block"


def test_prompts_with_the_same_beginning_compute_it_once() -> None:
    scheduler = made(20, 100)
    add(scheduler, 1, 40, 5, token=7)
    step(scheduler)
    for id, options, start in ((2, {}, 32), (3, dict(salt=salted("adapter")), 0), (4, dict(shares=False), 0), (5, dict(scores=True), 0)):
        group = add(scheduler, id, 40, 5, token=7, **options)
        assert (id, start, 40, True) in step(scheduler) and group.cached == start
        scheduler.finish(id)
    assert (scheduler.hits, scheduler.queries) == (32, 200)
    add(scheduler, 6, 32, 5, token=7)
    assert (6, 16, 32, True) in step(scheduler), "the last token is computed: its logits are needed"


def test_a_forked_group_shares_its_prompt_and_comes_back_from_either_preemption() -> None:
    for way in ("recompute", "swap"):
        scheduler = made(11, 100, 8, choose=lambda group: way)  # noqa: B023
        add(scheduler, 1, 40, 30, width=3)
        step(scheduler)
        for id in (11, 12):
            scheduler.fork(1, id, id)
        assert scheduler.pool.free_count == 8
        assert step(scheduler) == [(i, 40, 41, True) for i in (1, 11, 12)] and scheduler.pool.free_count == 6
        forget(scheduler.pool)
        scheduler._preempt(scheduler.running[0])
        assert scheduler.pool.free_count == 11
        scheduler.moves = Moves()
        seen = [step(scheduler) for _ in range(2)]
        assert scheduler.pool.free_count == 6
        tail = [(i, 41, 42, True) for i in (1, 11, 12)]
        if way == "swap":
            assert seen == [[], tail]
        else:
            assert seen == [[(1, 0, 42, True)], [(1, 42, 43, True), (11, 32, 42, True), (12, 32, 42, True)]]


def test_a_draft_is_tried_and_commit_takes_the_accepted() -> None:
    scheduler = made(10, 20)
    add(scheduler, 1, 10, 50)
    step(scheduler)
    scheduler.find(1).draft = [5, 6, 7, 8]
    (chunk,) = scheduler.schedule()
    assert (chunk.start, chunk.stop, chunk.draft, chunk.wants, list(chunk.ids)) == (10, 15, 4, 5, [9, 5, 6, 7, 8])
    scheduler.moves = Moves()
    scheduler.commit(chunk, [5, 6, 3])  # two right, one of its own
    seq = scheduler.find(1)
    assert seq.table.length == 13 and seq.tokens[-4:] == [9, 5, 6, 3] and seq.missing == 1
    assert step(scheduler) == [(1, 13, 14, True)]


def test_urgent_groups_take_the_place_of_others() -> None:
    scheduler = made(4, 100)
    add(scheduler, 1, 3 * BLOCK, 10, priority=5)
    assert [c[0] for c in step(scheduler)] == [1]
    add(scheduler, 2, 3 * BLOCK, 10, priority=5)
    assert [c[0] for c in step(scheduler)] == [1], "equals wait"
    add(scheduler, 3, 3 * BLOCK, 10, priority=1)
    step(scheduler)
    assert [c[0] for c in step(scheduler)] == [3] and [group.id for group in scheduler.waiting] == [1, 2]


def test_static_batches_end_before_the_next_begins() -> None:
    scheduler = made(20, 100, batching="static")
    for id in (1, 2):
        add(scheduler, id, 4, 5)
    step(scheduler)
    add(scheduler, 3, 4, 5)
    scheduler.finish(1)
    assert [c[0] for c in step(scheduler)] == [2]
    scheduler.finish(2)
    assert [c[0] for c in step(scheduler)] == [3]


def test_reserved_blocks_are_taken_at_admission() -> None:
    scheduler = made(20, 100, reserve=100)
    add(scheduler, 1, 4, 5)
    step(scheduler)
    assert scheduler.pool.free_count == 13
    assert scheduler.most(4, 8, 1) == 7


def test_a_scored_prompt_comes_in_small_chunks_with_all_its_rows() -> None:
    scheduler = made(100, 1000)
    add(scheduler, 1, SCORED + 10, 5, scores=True)
    wants = []
    for _ in range(3):
        (chunk,) = scheduler.schedule()
        wants.append(chunk.wants)
        scheduler.commit(chunk, [1] if chunk.samples else ())
    assert wants == [SCORED, 10, 1]


class Cells:
    """A runner that writes, into each slot, a number of the whole history up to its token, and checks what it would read."""

    def __init__(self, scheduler: Scheduler) -> None:
        pool = self.pool = scheduler.pool
        self.scheduler = scheduler
        self.cells: list[list[object]] = [[None] * BLOCK for _ in range(pool.total)]
        self.aside: list[list[object]] = [[None] * BLOCK for _ in range(pool.swap_total)]

    def move(self, moves: Moves) -> None:
        for pairs, source, target in ((moves.out, self.cells, self.aside), (moves.copies, self.cells, self.cells), (moves.back, self.aside, self.cells)):
            self.copy(pairs, source, target)

    def copy(self, pairs: Pairs, source: list[list[object]], target: list[list[object]]) -> None:
        assert len({to for _, to in pairs}) == len(pairs), "two copies into one block"
        for to, cell in [(to, list(source[at])) for at, to in pairs]:
            target[to] = cell

    def run(self, chunk: Chunk, salt: bytes, tokens: list[int]) -> None:
        history = hash(salt)
        for t, token in enumerate(tokens[: chunk.start] + list(chunk.ids)):
            history = hash((history, token))
            block = chunk.table[t // BLOCK]
            if t < chunk.start:
                assert self.cells[block][t % BLOCK] == history, f"sequence {chunk.id} reads token {t}, which was not written, or by another"
            else:
                assert self.pool.refs[block] == 1, "a shared block is written"
                self.cells[block][t % BLOCK] = history


def drive(seed: int, requests: int) -> Counter[str]:
    """A random load on a random scheduler to its end; what happened."""
    draw = random.Random(seed)
    blocks, budget, swap = draw.randrange(8, 24), draw.choice([4, 7, 20, 64]), draw.choice([0, 6, 40])
    ways = draw.choice([["swap"], ["recompute"], ["swap", "recompute"]])
    scheduler = made(blocks, budget, swap, choose=lambda group: draw.choice(ways), batching=draw.choice(["continuous"] * 4 + ["static"]))
    scheduler.pool.sharing = draw.random() < 0.8
    runner, left, said, seen = Cells(scheduler), {}, Counter[str](), []
    plans = []
    for id in range(requests):
        while True:
            prompt, new, width = draw.randrange(1, 70), draw.randrange(1, 40), draw.choice([1, 1, 1, 2, 4])
            if scheduler.most(prompt, prompt + new - 1, width) <= blocks and width <= budget:
                break
        plans.append((id, prompt, new, width, draw.randrange(40), draw.choice([0, 0, 0, 2]), draw.random() < 0.1))
    priorities = draw.random() < 0.3
    names, steps, idle = iter(range(1000, 10**9)), 0, 0
    while plans or left:
        for plan in [p for p in plans if p[4] <= steps]:
            plans.remove(plan)
            id, prompt, new, width, _, priority, scores = plan
            most = scheduler.most(prompt, prompt + new - 1, width)
            tokens, salt = [draw.choice([0, 0, 0, 0, 1]) for _ in range(prompt)], draw.choice([b"", b"", b"a"])
            scheduler.add(id, id, tokens, most, width=width, priority=priority * priorities, scores=scores, salt=salt, shares=draw.random() < 0.9)
            left[id] = new
        if left and draw.random() < 0.02:
            group = scheduler.find(draw.choice(list(left))).group
            for seq in list(group.seqs):
                scheduler.finish(seq.id)
                del left[seq.id]
            said["cancelled"] += 1
        for id in left:
            if draw.random() < 0.2 and left[id] > 4 and scheduler.find(id).missing == 1:
                scheduler.find(id).draft = [draw.choice([0, 1]) for _ in range(3)]
        answering = {seq.id for group in scheduler.running for seq in group.seqs if seq.missing == 1 and not seq.parked}
        chunks = scheduler.schedule()
        moves = scheduler.moves
        said["copies"] += len(moves.copies)
        said["out"] += len(moves.out)
        said["back"] += len(moves.back)
        runner.move(moves)
        scheduler.moves = Moves()
        assert sum(chunk.stop - chunk.start for chunk in chunks) <= budget
        assert sum(len(group.seqs) for group in scheduler.running) <= budget
        running = [seq for group in scheduler.running for seq in group.seqs]
        assert answering & {seq.id for seq in running} <= {chunk.id for chunk in chunks}, "who answers moves in every step"
        tables = [seq.table for seq in running]
        held = Counter(block for table in tables for block in table.blocks)
        assert [held[b] for b in range(blocks)] == scheduler.pool.refs
        if draw.random() < 0.05:
            said["broken"] += 1  # the step breaks off: nothing of it counts
            continue
        for chunk in chunks:
            seq = scheduler.find(chunk.id)
            runner.run(chunk, seq.table.salt, seq.tokens)
        for chunk in chunks:
            commit(scheduler, chunk, left, names, draw, said, seen)
        steps += 1
        idle = 0 if chunks else idle + 1
        assert idle < 50 and steps < 20_000, "no progress"
    assert scheduler.pool.free_count == blocks and scheduler.pool.swap_free == swap and not scheduler._seqs and scheduler._seats == 0
    assert not (scheduler.running or scheduler.waiting or scheduler.swapped)
    said |= Counter({way: count for way, count in scheduler.preempted.items()})
    said["hits"] = scheduler.hits
    return said


def commit(scheduler: Scheduler, chunk: Chunk, left: dict[int, int], names: object, draw: random.Random, said: Counter[str], seen: list[int]) -> None:
    seq = scheduler.find(chunk.id)
    group = seq.group
    assert chunk.prompt == max(0, min(chunk.stop, group.prompt) - chunk.start)
    assert chunk.wants == (chunk.stop - chunk.start if group.scores and chunk.start < group.prompt else chunk.samples * (1 + chunk.draft))
    assert chunk.samples == (chunk.stop >= len(seq.tokens)) and chunk.draft == max(0, chunk.stop - len(seq.tokens))
    first = len(seq.tokens) == group.prompt
    accepted = draw.randrange(chunk.draft + 1)
    new = [*seq.draft[:accepted], draw.choice([0, 0, 1])] if chunk.samples else []
    said["accepted"] += accepted
    scheduler.commit(chunk, new)
    if not chunk.samples:
        return
    left[chunk.id] -= len(new)
    if first and len(group.seqs) == 1:
        for _ in range(group.width - 1):
            other = next(names)  # type: ignore[call-overload]
            scheduler.fork(chunk.id, other, 2)
            left[other] = left[chunk.id]
            said["forks"] += 1
    for id in [seq.id for seq in group.seqs] if first else [chunk.id]:
        if left[id] <= 0:
            scheduler.finish(id)
            del left[id]


@settings(deadline=None, max_examples=150)
@given(seed=st.integers(0, 2**32))
def test_random_loads(seed: int) -> None:
    drive(seed, 12)


def test_random_loads_meet_everything() -> None:
    """Sixty loads together see every kind of event: a fuzz that misses one proves nothing about it."""
    said = sum((drive(seed, 12) for seed in range(60)), Counter[str]())
    assert all(said[what] >= 20 for what in ("copies", "out", "back", "swap", "recompute", "forks", "cancelled", "accepted", "hits", "broken")), said


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_many_random_loads() -> None:
    for seed in range(20_000):
        drive(seed, 12)
