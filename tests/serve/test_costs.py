"""The choice between swap and recomputation follows what was measured, and the settings that force it."""

from __future__ import annotations

import pytest
from served import engine_of, model_of, prompts_of

from lilliput.base.errors import UserError
from lilliput.serve import costs as module
from lilliput.serve.blocks import BlockPool
from lilliput.serve.costs import MANY, Costs
from lilliput.serve.request import Sampling
from lilliput.serve.scheduler import Group, Moves, Scheduler


class Clock:
    """Time that moves only when blocks do."""

    def __init__(self, seconds_per_block: float) -> None:
        self.now, self.each, self.moved = 0.0, seconds_per_block, 0

    def perf_counter(self) -> float:
        return self.now

    def move(self, moves: Moves) -> None:
        self.moved += len(moves.out)
        self.now += self.each * len(moves.out)


def group_of(pool: BlockPool, tokens: int) -> Group:
    scheduler = Scheduler(pool, 1000)
    group = scheduler.add(0, 0, [1] * tokens, 20)
    for chunk in scheduler.schedule():
        scheduler.commit(chunk, [2])
    scheduler.moves = Moves()
    return group


@pytest.mark.parametrize("way, swap", [("recompute", 9), ("swap", 9), ("auto", 0), ("auto", 9)])
def test_settings_and_what_is_unknown(way: str, swap: int) -> None:
    pool = BlockPool(20, swap=swap)
    costs = Costs(pool, Clock(1.0), way)  # type: ignore[arg-type]
    assert costs.choose(group_of(pool, 100)) == ("swap" if way == "swap" else "recompute")


def test_auto_takes_the_cheaper_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """100 tokens are 7 blocks, out and back: 14 block copies against 100 tokens."""
    pool = BlockPool(20, swap=9)
    group = group_of(pool, 100)
    for token_seconds, way in ((0.13, "recompute"), (0.15, "swap")):
        clock = Clock(1.0)
        monkeypatch.setattr(module, "time", clock)
        costs = Costs(pool, clock, "auto")  # type: ignore[arg-type]
        costs.step(MANY - 1, 1e9)  # too few rows to tell what a prompt costs
        for _ in range(3):
            costs.step(100, 100 * token_seconds)
        assert costs.token_seconds == pytest.approx(token_seconds)
        assert costs.choose(group) == way and costs.block_seconds == pytest.approx(1.0)
        moved = clock.moved
        costs.choose(group)
        assert clock.moved == moved, "blocks are copied once to see"


def test_a_step_has_prompts_for_the_time_that_is_wanted() -> None:
    costs = Costs(BlockPool(20), Clock(1.0), "auto", step=0.1)  # type: ignore[arg-type]
    assert costs.pace(5) == 2 * MANY, "nothing is known yet"
    costs.step(512, 0.512)
    assert costs.pace(5) == 95 and costs.pace(99) == MANY, "100 rows take 0.1 s"
    for _ in range(20):
        costs.step(100, 0.2)  # contexts have grown
    assert costs.pace(5) in (44, 45)
    costs.step(10, 1e9)
    assert costs.pace(5) in (44, 45), "a few rows say nothing of a token of many"


def test_an_engine_keeps_its_pace_only_beside_answers() -> None:
    model, rows = model_of("llama"), []
    engine = engine_of(model, step_ms=1e-6, sharing=False)
    step = engine.costs.step
    engine.costs.step = lambda count, seconds: (rows.append(count), step(count, seconds))  # type: ignore[func-returns-value, method-assign, assignment]
    engine.add([5] * 90, Sampling(40, ignore_eos=True))
    engine.step()
    assert rows == [90], "nobody waits"
    engine.add([6] * 100, Sampling(2, ignore_eos=True))
    while engine.busy:
        engine.step()
    assert rows[1:5] == [1 + MANY, 1 + MANY, 1 + MANY, 1 + 100 - 3 * MANY], "the answer goes on while the prompt is read"


def test_swap_without_space_is_refused() -> None:
    with pytest.raises(UserError, match="no swap space"):
        engine_of(model_of("llama"), preemption="swap")


def test_an_engine_that_measures_gives_the_same_tokens() -> None:
    model, prompts, how = model_of("llama"), prompts_of(6), Sampling(32, ignore_eos=True)
    expected = [done.tokens for done in engine_of(model).generate(prompts, how)]
    engine = engine_of(model, kv_tokens=160, swap_tokens=1024)
    assert [done.tokens for done in engine.generate(prompts, how)] == expected
    assert engine.costs.token_seconds > 0 and engine.costs.block_seconds > 0
    stats = engine.stats()
    assert stats.preempted_swap + stats.preempted_recompute > 0
