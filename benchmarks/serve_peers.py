"""Servers beside each other: ours and any others that speak OpenAI's API, loaded in turn by the same client.

    make bench X=serve_peers ARGS="--ours smollm2-135m smollm2-135m,serve.weights=fp32 --peer vLLM=http://127.0.0.1:8001,NAME"

Start the peers first, for instance (2 threads each):
    OMP_NUM_THREADS=2 VLLM_CPU_KVCACHE_SPACE=2 vllm serve FOLDER --dtype float32 --max-model-len 4096 --no-enable-prefix-caching --port 8001
    llama-server -m Q4_0.gguf -t 2 -tb 2 -np 16 -c 16384 --port 8002
All servers live through the whole run, one is loaded at a time; rounds go over all sides before the next begins. Figures are medians of the rounds,
ratios medians of the rounds' ratios to the first of --ours. Prompts and lengths: see serve_load.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
from typing import Any

from serve_load import Ask, Target, closed, send, start, stop

from lilliput.base.show import Show
from lilliput.loops.bench import machine

COLUMNS = ("clients", "side", "out tok/s", "TTFT p50", "TTFT p99", "TPOT p50", "TPOT p99", "first of ours / this")


def load(target: Target, clients: int, round_: int, words: int, tokens: int) -> dict[str, float]:
    """One closed loop: tokens a second; milliseconds to the first token and per token."""
    count = max(4, 2 * clients)
    results, seconds = asyncio.run(closed(target, [Ask(0, words, tokens, 100_000 * round_ + 1000 * clients + number) for number in range(count)], clients))
    faults = [result.fault for result in results if result.fault]
    if faults:
        raise SystemExit(f"{target.url}: {len(faults)} of {count} failed: {faults[0][:300]}")
    first, each = sorted(1000 * r.first for r in results), sorted(1000 * (r.last - r.first) / (r.tokens - 1) for r in results)
    high = lambda values: values[min(len(values) - 1, int(0.99 * len(values)))]
    return {"out tok/s": sum(r.tokens for r in results) / seconds, "TTFT p50": statistics.median(first), "TTFT p99": high(first),
            "TPOT p50": statistics.median(each), "TPOT p99": high(each)}  # fmt: skip


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ours", nargs="+", required=True, metavar="MODEL[,KEY=VALUE...]")
    parser.add_argument("--peer", action="append", default=[], metavar="TITLE=URL,MODEL")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--prompt", type=int, default=128, help="words of a prompt")
    parser.add_argument("--tokens", type=int, default=64, help="tokens of an answer")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    show, processes, sides = Show(), [], {}
    try:
        for text in arguments.ours:
            model, *overrides = text.split(",")
            process, url, _ = start(model, overrides)
            processes.append(process)
            sides[f"ours {' '.join(overrides) or 'as the file is'}"] = Target(url, model, "", process.pid)
        for text in arguments.peer:
            title, _, rest = text.partition("=")
            url, _, model = rest.rpartition(",")
            sides[title] = Target(url, model, "")
        for target in sides.values():
            asyncio.run(send(target, Ask(0, arguments.prompt, 8, 7)))
        rows: list[dict[str, Any]] = []
        for clients in arguments.clients:
            taken: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
            for number in range(arguments.rounds):
                for side, target in sides.items():
                    taken[side].append(load(target, clients, number, arguments.prompt, arguments.tokens))
            base = [one["out tok/s"] for one in next(iter(taken.values()))]
            for side, all_ in taken.items():
                medians = {key: round(statistics.median(one[key] for one in all_), 1) for key in all_[0]}
                times = statistics.median(a / one["out tok/s"] for a, one in zip(base, all_))
                rows.append({"clients": clients, "side": side, **medians, "first of ours / this": round(times, 2)})
                show.line(str(rows[-1]))
    finally:
        stop(processes)
    where = ", ".join(f"{key} {value}" for key, value in machine().items())
    show.table(rows, COLUMNS, f"{arguments.prompt} words in, {arguments.tokens} tokens out; ms; {where}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
