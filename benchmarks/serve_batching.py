"""Continuous against static batching: a trace replayed through HTTP, faster and faster, tokens a second at equal 95th percentile of time per token.

    make bench X=serve_batching ARGS="--trace ../shared/data/traces/AzureLLMInferenceTrace_conv.csv"

    continuous   `lilliput serve` as it is
    static       the scheduler's own baseline, on the same engine: requests are admitted only when the batch before has ended, and all that wait then
                 are (its steps take --static-tokens, so that no batch is cut short). An answer that ends costs nothing from then on, nothing is padded
    padded       batches as generate() of transformers or FasterTransformer run them: all that wait, prompts padded to the longest, all run to the
                 longest answer. The client forms them and asks a continuous server, so kernels and HTTP are the same. An answer counts as complete when
                 its own last token has come, and the padding is computed but not counted

Servers live at the same time and are loaded in turn; each replay has prompts of its own, so that no cache of prefixes helps. Time per token of a
request = from its arrival to its last token, divided by its tokens (vLLM's normalised latency, section 6.1): waiting for admission counts. Beside
it: ms to the first token, ms a token after the first, and the longest pause in the answer, each the 95th percentile over the requests. Arrivals and
lengths are the trace's, arrivals `speed` times closer, lengths cut to --longest. `--server MODEL` is the static server itself.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from serve_load import Ask, Result, Target, opened, read_trace, send, start, stop

from lilliput.base.show import Show
from lilliput.loops.bench import machine

COLUMNS = ("speed", "batching", "requests", "failed", "seconds", "out tok/s", "p50 ms/token", "p95 ms/token", "p95 first", "p95 after", "p95 pause")
SIDES = ("continuous", "static", "padded")
LIMITS = (25, 50, 75, 100, 150, 200, 400)


def static_server(words: list[str]) -> None:
    """`lilliput serve` with static batching."""
    from lilliput.base.job import Job
    from lilliput.cli.serve import open_house
    from lilliput.serve import http

    house, _ = open_house([Job.load(None, [f"model={words[0]}", *words[1:]])])
    house.first.generator.engine.scheduler.batching = "static"
    http.serve(http.application(house), house.first.options, house.stop, lambda port: Show(json=True).data({"url": f"http://127.0.0.1:{port}"}))


async def padded(target: Target, asks: list[Ask]) -> tuple[list[Result], float]:
    """Each batch: what has arrived while the one before ran, all of it as long as its longest prompt and its longest answer."""
    start, waiting, results = time.perf_counter(), list(asks), []
    while waiting:
        await asyncio.sleep(max(0.0, waiting[0].at - (time.perf_counter() - start)))
        now = time.perf_counter() - start
        batch = [ask for ask in waiting if ask.at <= now]
        waiting = waiting[len(batch) :]
        words, tokens = max(ask.words for ask in batch), max(ask.tokens for ask in batch)
        done = await asyncio.gather(*(send(target, replace(ask, words=words, tokens=tokens), ask.tokens) for ask in batch))
        results += [replace(result, last=now - ask.at + result.last, tokens=ask.tokens) for ask, result in zip(batch, done)]
    return results, time.perf_counter() - start


def measure(side: str, target: Target, trace: Path, count: int, speed: float, longest: int, number: int) -> dict[str, Any]:
    """One replay; `number`: which."""
    asks = [replace(ask, seed=ask.seed + 100_000 * (number + 1)) for ask in read_trace(trace, count, speed, longest)]
    results, seconds = asyncio.run((padded if side == "padded" else opened)(target, asks))
    good = [result for result in results if not result.fault]
    at = lambda values, share: round(1000 * sorted(values)[min(len(good) - 1, int(share * len(good)))], 1)
    each, after = [r.last / r.tokens for r in good], [(r.last - r.first) / (r.tokens - 1) for r in good]
    out = round(sum(result.tokens for result in good) / seconds, 1)
    return {"requests": len(results), "failed": len(results) - len(good), "seconds": round(seconds, 1), "out tok/s": out, "p50 ms/token": at(each, 0.5),
            "p95 ms/token": at(each, 0.95), "p95 first": at([r.first for r in good], 0.95), "p95 after": at(after, 0.95),
            "p95 pause": at([r.pause for r in good], 0.95)}  # fmt: skip


def at_equal(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each limit of the 95th percentile the most tokens a second of either side that kept it."""
    found = []
    for limit in LIMITS:
        best = {side: max((row["out tok/s"] for row in rows if row["batching"] == side and row["p95 ms/token"] <= limit), default=0.0) for side in SIDES}
        ratios = {f"x {side}": round(best["continuous"] / best[side], 2) if best[side] else None for side in SIDES[1:]}
        found.append({"p95 at most, ms/token": limit, **best, **ratios})
    return found


def main() -> int:
    """Measure and print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--server", nargs="+", metavar="MODEL", help="be the static server")
    parser.add_argument("--trace", type=Path)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--requests", type=int, default=60)
    parser.add_argument("--longest", type=int, default=256)
    for side, speeds in zip(SIDES, ((0.8, 1.2, 1.6, 2.0), (0.4, 0.6, 0.8, 1.0), (0.3, 0.5, 0.8))):
        parser.add_argument(f"--{side}", type=float, nargs="*", default=list(speeds), metavar="SPEED", help=f"default: {' '.join(map(str, speeds))}")
    parser.add_argument("--static-tokens", type=int, default=8192, help="tokens of a step of the static server")
    arguments, overrides = parser.parse_known_args()
    if arguments.server:
        static_server(arguments.server + overrides)
        return 0
    show, rows, servers = Show(), [], {}
    speeds = {side: getattr(arguments, side) for side in SIDES}
    try:
        if speeds["static"]:
            command = [sys.executable, str(Path(__file__).resolve()), "--server"]
            servers["static"] = start(arguments.model, [f"serve.max_batch_tokens={arguments.static_tokens}", *overrides], command)
        if speeds["continuous"] or speeds["padded"]:
            servers["continuous"] = start(arguments.model, [*overrides])
        targets = {side: Target(url, arguments.model, "", process.pid) for side, (process, url, _) in servers.items()}
        for target in targets.values():
            asyncio.run(send(target, Ask(0, 64, 8, 7)))
        for number in range(max(map(len, speeds.values()))):
            for at, side in enumerate(SIDES):
                for speed in speeds[side][number : number + 1]:
                    target = targets["static" if side == "static" else "continuous"]
                    row = measure(side, target, arguments.trace, arguments.requests, speed, arguments.longest, len(SIDES) * number + at)
                    rows.append({"speed": speed, "batching": side, **row})
                    show.line(str(rows[-1]))
    finally:
        stop([process for process, _, _ in servers.values()])
    where = ", ".join(f"{key} {value}" for key, value in machine().items())
    show.table(rows, COLUMNS, f"{arguments.trace.name}, lengths to {arguments.longest}; {where}")
    best = at_equal(rows)
    show.table(best, tuple(best[0]), "most tokens a second at equal 95th percentile")
    return 1 if any(row["failed"] for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
