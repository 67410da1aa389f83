"""The asyncio facade: the sync engine's deltas, cancellation that leaves no block, failures that end only themselves, a stop that drains."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections.abc import AsyncIterator, Coroutine
from typing import Any

import pytest
import torch
from served import GREEDY, Dice, engine_of, model_of, prompts_of

from lilliput.base.errors import DoesNotFit, UserError
from lilliput.serve.async_engine import AsyncEngine
from lilliput.serve.request import Delta, Sampling

LONG = Sampling(60, ignore_eos=True)


def run(coroutine: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(asyncio.wait_for(coroutine, 60))


def made(runner: object = None, **settings: object) -> AsyncEngine:
    engine = engine_of(model_of("llama"), **settings)
    if runner is not None:
        engine.runner = runner  # type: ignore[assignment]
    return AsyncEngine(engine)


async def read(stream: AsyncIterator[Delta]) -> list[Delta]:
    return [delta async for delta in stream]


def test_streams_give_what_the_engine_gives_alone() -> None:
    prompts = prompts_of(6)
    expected = [done.tokens for done in engine_of(model_of("llama")).generate(prompts, GREEDY)]

    async def main() -> None:
        served = made()
        served.start()
        found = await asyncio.gather(*(read(served.stream(prompt, GREEDY)) for prompt in prompts))
        assert [tuple(delta.token for delta in deltas) for deltas in found] == expected
        assert all(deltas[-1].finish_reason == "length" and deltas[0].cached is not None for deltas in found)
        stats = served.stats()
        assert (stats.running, stats.waiting, stats.blocks_used) == (0, 0, 0)
        assert stats.prompt == sum(map(len, prompts)) and stats.generated == 6 * GREEDY.max_tokens and stats.steps > 0
        await served.stop()

    run(main())


def test_requests_that_can_never_run_are_refused_at_once() -> None:
    async def main() -> None:
        served = made(kv_tokens=64)
        served.start()
        with pytest.raises(DoesNotFit):
            await read(served.stream([1] * 60, Sampling(50)))
        await served.stop()
        with pytest.raises(UserError, match="stopping"):
            await read(served.stream([1], GREEDY))

    run(main())


async def until(condition: Any) -> None:
    while not condition():
        await asyncio.sleep(0.001)


def test_one_call_crosses_threads_a_step() -> None:
    async def main() -> None:
        served = made(Dice())
        served.start()
        calls = []
        hand_out = served._hand_out
        served._hand_out = lambda deltas: (calls.append(len(deltas)), hand_out(deltas))  # type: ignore[assignment,func-returns-value]
        await asyncio.gather(*(read(served.stream([i + 1], Sampling(8, ignore_eos=True))) for i in range(5)))
        await served.stop()
        assert sum(calls) == 40 and len(calls) <= served.stats().steps < 40

    run(main())


def test_closing_an_iterator_or_its_task_frees_the_blocks() -> None:
    """200 random disconnects: nothing is left, and what stays is answered as it would be alone."""

    async def main() -> None:
        served = made(Dice(), kv_tokens=4096)
        served.start()
        draw = random.Random(0)

        async def leave(after: int) -> None:
            stream = served.stream([1] * draw.randrange(1, 60), LONG)
            async for _ in stream:
                after -= 1
                if after <= 0:
                    break
            await stream.aclose()  # type: ignore[attr-defined]

        tasks = []
        for i in range(200):
            if i % 2:
                tasks.append(asyncio.create_task(leave(draw.randrange(0, 6))))
            else:
                task = asyncio.create_task(read(served.stream([2] * draw.randrange(1, 60), LONG)))
                asyncio.get_running_loop().call_later(draw.random() / 20, task.cancel)
                tasks.append(task)
            if i % 7 == 0:
                await asyncio.sleep(0.002)
        await asyncio.gather(*tasks, return_exceptions=True)
        await until(lambda: not served.engine.busy)
        pool = served.engine.pool
        assert pool.free_count == pool.total and not served._readers and not served.engine._answers
        assert (await read(served.stream([3], GREEDY)))[-1].finish_reason == "length"
        await served.stop()

    run(main())


class Gate(Dice):
    """Steps wait until they are let through; one may break."""

    def __init__(self) -> None:
        self.open, self.breaks, self.entered = threading.Event(), False, threading.Event()

    def forward(self, chunks: list, mass: object = None) -> torch.Tensor:
        self.entered.set()
        assert self.open.wait(20), "the test never opened the gate"
        if self.breaks:
            self.breaks = False
            raise RuntimeError("a cosmic ray")
        return super().forward(chunks)


def test_a_cancelled_request_has_no_blocks_after_the_step_it_was_in() -> None:
    async def main() -> None:
        gate = Gate()
        served = made(gate)
        served.start()
        task = asyncio.create_task(read(served.stream([1] * 40, LONG)))
        await until(gate.entered.is_set)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        gate.open.set()
        await until(lambda: not served.engine.busy)
        assert served.engine.counts.steps == 1 and served.engine.pool.free_count == served.engine.pool.total
        await served.stop()

    run(main())


def test_a_step_that_breaks_ends_the_answers_in_it_and_no_more() -> None:
    async def main() -> None:
        gate = Gate()
        gate.breaks = True
        served = made(gate)
        served.start()
        task = asyncio.create_task(read(served.stream([1] * 40, LONG)))
        await until(gate.entered.is_set)
        later = asyncio.create_task(read(served.stream([2] * 4, Sampling(5, ignore_eos=True))))
        await asyncio.sleep(0)
        gate.open.set()
        (last,) = await task
        assert last.finish_reason == "error" and "a cosmic ray" in last.message
        assert [delta.finish_reason for delta in await later] == [None] * 4 + ["length"]
        assert served.engine.pool.free_count == served.engine.pool.total
        await served.stop()

    run(main())


@pytest.mark.parametrize("drain, timeout, reason", [(True, None, "length"), (True, 0.05, "cancelled"), (False, None, "cancelled")])
def test_stop_drains_or_cancels(drain: bool, timeout: float | None, reason: str) -> None:
    async def main() -> None:
        gate = Gate()
        served = made(gate)
        served.start()
        task = asyncio.create_task(read(served.stream([1], Sampling(6, ignore_eos=True))))
        await until(gate.entered.is_set)
        stop = asyncio.create_task(served.stop(drain, timeout))
        await asyncio.sleep(0.1)
        assert served.ending
        gate.open.set()
        await stop
        deltas = await task
        assert deltas[-1].finish_reason == reason and served.engine.pool.free_count == served.engine.pool.total
        assert not any(thread.name == "engine" for thread in threading.enumerate())

    run(main())


def test_idle_costs_nothing() -> None:
    async def main() -> None:
        served = made(Dice())
        served.start()
        await read(served.stream([1], Sampling(2, ignore_eos=True)))
        steps = served.engine.counts.steps
        waited = threading.Condition.wait
        calls = []
        served._wake.wait = lambda *a: (calls.append(1), waited(served._wake, *a))  # type: ignore[assignment,func-returns-value]
        time.sleep(0.2)
        assert served.engine.counts.steps == steps and len(calls) <= 1
        await served.stop()

    run(main())
