"""Load on a server that speaks OpenAI's API, ours or another: tokens a second, time to the first token, time per token.

    make bench X=serve_load ARGS="--serve smollm2-135m"                         starts ours, also measures start and idle CPU
    make bench X=serve_load ARGS="--serve smollm2-135m --starts 5"              only from the command to the first token, so many times
    make bench X=serve_load ARGS="--url http://127.0.0.1:8080 --model NAME"     any other server

Closed loop: 1, 4 and 16 clients, each asks again when its answer is complete; prompts differ from their first word on, so that no cache
of prefixes helps. Open loop: --trace FILE replays arrivals and lengths of a trace (Azure's csv or Mooncake's jsonl), --speed times faster,
lengths cut to --longest. Every answer is forced to its length (ignore_eos), so all servers write the same number of tokens.

Mooncake's requests name the blocks of 512 tokens that their prompts consist of. Here a block is 512 / --scale tokens, the same ones wherever its number
comes, and lengths are divided alike: prompts share what they share in the trace. Beside the server's own count of tokens found in its cache stands
what a cache without end would have found, and one of `serve.kv_tokens` that forgets what was used longest ago.

TTFT = request to first token, TPOT = (last - first) / (tokens - 1). The client is raw asyncio and takes about 30 us a token.
"""

from __future__ import annotations

import argparse
import asyncio
import csv
import itertools
import json
import math
import random
import subprocess
import sys
import time
import urllib.request
from collections import OrderedDict
from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil

from lilliput.base.show import Show

WORDS = ("the", "of", "and", "to", "in", "is", "that", "it", "was", "for", "on", "are", "as", "with", "his", "they", "at", "be", "this", "from", "have", "or",
         "by", "one", "had", "not", "but", "what", "all", "were", "when", "we", "there", "can", "an", "your")  # fmt: skip
COLUMNS = ("load", "requests", "failed", "out tok/s", "all tok/s", "TTFT p50", "TTFT p99", "TPOT p50", "TPOT p99", "CPU s/1k tok")


@dataclass(frozen=True)
class Ask:
    """One request: when it starts (seconds, 0 = at once), how long its prompt is in words, how many tokens it wants."""

    at: float
    words: int
    tokens: int
    seed: int
    ids: tuple[int, ...] = ()  # the prompt itself, as tokens


@dataclass
class Result:
    """What came back; times in seconds since the request was sent."""

    first: float = 0.0
    last: float = 0.0
    tokens: int = 0
    prompt: int = 0
    pause: float = 0.0  # the longest between two pieces of its text
    fault: str = ""


@dataclass(frozen=True)
class Target:
    """A server."""

    url: str
    model: str
    key: str
    pid: int | None = None

    def cpu(self) -> float:
        """CPU seconds of its process and its children so far; 0 where it is not ours to see."""
        if self.pid is None:
            return 0.0
        process = psutil.Process(self.pid)
        return sum(sum(one.cpu_times()[:2]) for one in (process, *process.children(recursive=True)))


def prompt_of(ask: Ask) -> str:
    """Words drawn by the request's seed: about one token each."""
    draw = random.Random(ask.seed)
    return " ".join(draw.choice(WORDS) for _ in range(ask.words))


async def lines(reader: asyncio.StreamReader, chunked: bool) -> AsyncIterator[bytes]:
    """The lines of a body."""
    held = b""
    while True:
        if chunked:
            size = int((await reader.readline()).strip() or b"0", 16)
            data = await reader.readexactly(size)
            await reader.readline()
        else:
            data = await reader.read(65536)
        if not data:
            break
        *whole, held = (held + data).split(b"\n")
        for line in whole:
            yield line


async def send(target: Target, ask: Ask, wanted: int = 0) -> Result:
    """One streamed completion. `wanted`: its last token is this one, though more are asked for (0: the last that comes)."""
    body: dict[str, Any] = {"model": target.model, "prompt": list(ask.ids) or prompt_of(ask), "max_tokens": ask.tokens, "stream": True, "temperature": 0}
    body |= {"ignore_eos": True, **({"return_token_ids": True} if wanted else {})}
    data = json.dumps(body | {"stream_options": {"include_usage": True}}).encode()
    place, result = urlsplit(target.url), Result()
    head = [f"POST {place.path.rstrip('/')}/v1/completions HTTP/1.1", f"Host: {place.netloc}", "Content-Type: application/json", f"Content-Length: {len(data)}"]
    head += ["Connection: close", *([f"Authorization: Bearer {target.key}"] if target.key else [])]
    start, seen = time.perf_counter(), 0
    try:
        reader, writer = await asyncio.open_connection(place.hostname, place.port or 80)
        writer.write("\r\n".join(head).encode() + b"\r\n\r\n" + data)
        status = (await reader.readline()).split()[1]
        headers = [line.strip().lower() async for line in _headers(reader)]
        async for line in lines(reader, b"transfer-encoding: chunked" in headers):
            now = time.perf_counter() - start
            if status != b"200":
                result.fault += line.decode("utf-8", "replace")
            elif line.startswith(b"data: {"):
                event = json.loads(line[6:])
                if event.get("usage"):
                    result.tokens, result.prompt = event["usage"]["completion_tokens"], event["usage"]["prompt_tokens"]
                if event.get("error"):
                    result.fault = str(event["error"])
                seen += sum(len(choice.get("token_ids") or ()) for choice in event.get("choices", ()))
                if any(choice.get("text") for choice in event.get("choices", ())) and not 0 < wanted < seen:
                    result.pause = max(result.pause, now - result.last if result.first else 0.0)
                    result.first, result.last = result.first or now, now
        writer.close()
        result.fault = result.fault or ("" if result.tokens else f"status {status.decode()}, no tokens")
    except (OSError, ValueError, IndexError, asyncio.IncompleteReadError) as error:
        result.fault = f"{type(error).__name__}: {error}"
    return result


async def _headers(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    while (line := await reader.readline()).strip():
        yield line


async def closed(target: Target, asks: list[Ask], clients: int) -> tuple[list[Result], float]:
    """So many clients work through the requests; results and seconds."""
    waiting, results, start = list(reversed(asks)), [], time.perf_counter()

    async def client() -> None:
        while waiting:
            results.append(await send(target, waiting.pop()))

    await asyncio.gather(*(client() for _ in range(clients)))
    return results, time.perf_counter() - start


async def opened(target: Target, asks: list[Ask]) -> tuple[list[Result], float]:
    """Each request at its time, whatever the server does."""
    start = time.perf_counter()

    async def later(ask: Ask) -> Result:
        await asyncio.sleep(max(0.0, ask.at - (time.perf_counter() - start)))
        return await send(target, ask)

    return list(await asyncio.gather(*map(later, asks))), time.perf_counter() - start


def read_trace(path: Path, count: int, speed: float, longest: int, scale: int = 32) -> list[Ask]:
    """The first requests of a trace; lengths cut to `longest`, arrivals `speed` times closer. `scale`: of Mooncake's."""
    if path.suffix == ".jsonl":
        asks, size = [], 512 // scale
        for number, one in enumerate(map(json.loads, path.read_text().splitlines()[:count])):
            length = max(1, min(longest, one["input_length"] // scale))
            ids = [token for block in one["hash_ids"] for token in random.Random(block).choices(range(1000, 5000), k=size)][:length]
            asks.append(Ask(one["timestamp"] / 1000 / speed, length, max(2, min(longest, one["output_length"] // scale)), number, tuple(ids)))
        return asks
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))[:count]
    when = [datetime.fromisoformat(row["TIMESTAMP"][:26]).timestamp() for row in rows]
    found = [(at - when[0], int(row["ContextTokens"]), int(row["GeneratedTokens"])) for at, row in zip(when, rows)]
    return [Ask(at / speed, max(1, min(longest, prompt)), max(2, min(longest, answer)), seed) for seed, (at, prompt, answer) in enumerate(found)]


def findable(asks: list[Ask], blocks: float = math.inf, block: int = 16) -> int:
    """Tokens of the prompts that a cache of so many blocks finds which has all earlier prompts, one after another, and forgets the longest unused."""
    kept: OrderedDict[tuple[int, ...], None] = OrderedDict()
    hits = 0
    for ask in asks:
        whole = [ask.ids[: end + block] for end in range(0, len(ask.ids) - block + 1, block)]
        usable = itertools.takewhile(kept.__contains__, whole[: (len(ask.ids) - 1) // block])  # the last token is computed in any case
        hits += block * sum(1 for _ in usable)
        for key in reversed(whole):  # the end of a prompt is forgotten first
            kept.pop(key, None)
            kept[key] = None
        while len(kept) > blocks:
            kept.popitem(last=False)
    return hits


def row(load: str, results: list[Result], seconds: float, cpu: float) -> dict[str, Any]:
    """One line of the table; times in milliseconds."""
    good = [result for result in results if not result.fault]
    out, everything = sum(r.tokens for r in good), sum(r.tokens + r.prompt for r in good)
    first = sorted(1000 * r.first for r in good)
    per = sorted(1000 * (r.last - r.first) / (r.tokens - 1) for r in good if r.tokens > 1)
    at = lambda values, share: f"{values[min(len(values) - 1, int(share * len(values)))]:.1f}" if values else ""
    spent = f"{1000 * cpu / out:.2f}" if cpu and out else ""
    counts = {"load": load, "requests": len(results), "failed": len(results) - len(good), "out tok/s": f"{out / seconds:.1f}"}
    times = {"TTFT p50": at(first, 0.5), "TTFT p99": at(first, 0.99), "TPOT p50": at(per, 0.5), "TPOT p99": at(per, 0.99)}
    return counts | {"all tok/s": f"{everything / seconds:.1f}"} | times | {"CPU s/1k tok": spent}


def stats(url: str) -> dict[str, Any]:
    """Our server's own figures."""
    with urllib.request.urlopen(f"{url}/stats", timeout=60) as answer:
        found: dict[str, Any] = json.load(answer)
    return found


def start(model: str, overrides: list[str], command: list[str] | None = None) -> tuple[subprocess.Popen[str], str, float]:
    """Our server: the process, its address, and the moment it was started."""
    began = time.perf_counter()
    command = command or [sys.executable, "-m", "lilliput", "serve", "--json"]
    process = subprocess.Popen([*command, model, "http.port=0", *overrides], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None, "its stdout was asked for"
    told = ""
    while not told.endswith("\n}\n"):
        line = process.stdout.readline()
        if not line:
            raise SystemExit(f"the server did not start: {told}")
        told += line
    return process, json.loads(told)["url"], began


def begin(model: str, overrides: list[str]) -> tuple[Target, subprocess.Popen[str], float]:
    """Our server, and the seconds from its start to the first token of a first request."""
    process, url, began = start(model, overrides)
    target = Target(url, model, "", process.pid)
    first = asyncio.run(send(target, Ask(0, 8, 2, 1)))
    return target, process, round(time.perf_counter() - began - (first.last - first.first), 2)


def stop(processes: list[subprocess.Popen[str]]) -> None:
    """End servers that `start` has started: open answers first."""
    for process in processes:
        process.terminate()
    for process in processes:
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()


def measure(target: Target, arguments: argparse.Namespace, show: Show) -> list[dict[str, Any]]:
    """Every load in turn."""
    rows = []
    if arguments.trace:
        asks = read_trace(arguments.trace, arguments.requests or 50, arguments.speed, arguments.longest, arguments.scale)
        before, held = target.cpu(), stats(target.url) if target.pid else {}
        results, seconds = asyncio.run(opened(target, asks))
        rows.append(row(f"{arguments.trace.stem[:24]} x{arguments.speed:g}", results, seconds, target.cpu() - before))
        if target.pid and asks[0].ids:
            now, total = stats(target.url), sum(len(ask.ids) for ask in asks)
            found, looked = (now[key] - held[key] for key in ("prefix_hits", "prefix_queries"))
            rows[-1] |= {"found %": f"{100 * found / looked:.2f}", "findable %": f"{100 * findable(asks) / total:.2f}",
                         "findable in its blocks %": f"{100 * findable(asks, now['blocks_total']) / total:.2f}"}  # fmt: skip
            show.line(f"of {looked:,} tokens of prompts: {', '.join(f'{key} {value}' for key, value in list(rows[-1].items())[-3:])}")
    for clients in arguments.clients if not arguments.trace else ():
        count = arguments.requests or max(4, 3 * clients)
        asks = [Ask(0, arguments.prompt, arguments.tokens, 1000 * clients + number) for number in range(count)]
        before = target.cpu()
        results, seconds = asyncio.run(closed(target, asks, clients))
        rows.append(row(f"{clients} at once", results, seconds, target.cpu() - before))
        for fault in {result.fault for result in results if result.fault}:
            show.line(f"failed: {fault[:200]}")
    return rows


def main() -> int:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--serve", metavar="MODEL", help="start `lilliput serve MODEL`")
    parser.add_argument("--url", help="a server that runs")
    parser.add_argument("--model", default="", help="its name for the model")
    parser.add_argument("--key", default="")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--requests", type=int, default=0, help="of each load; 0 = three a client")
    parser.add_argument("--prompt", type=int, default=128, help="words of a prompt")
    parser.add_argument("--tokens", type=int, default=128, help="tokens of an answer")
    parser.add_argument("--trace", type=Path)
    parser.add_argument("--speed", type=float, default=1.0)
    parser.add_argument("--longest", type=int, default=1024)
    parser.add_argument("--scale", type=int, default=32, help="of Mooncake's lengths: 512 / scale tokens a block")
    parser.add_argument("--starts", type=int, default=0, help="with --serve: only start it so many times")
    parser.add_argument("--json", action="store_true")
    arguments, overrides = parser.parse_known_args()
    show, process = Show(json=arguments.json), None
    if bool(arguments.serve) == bool(arguments.url):
        parser.error("either --serve MODEL or --url URL")
    document: dict[str, Any] = {}
    if arguments.starts:
        times = []
        for _ in range(arguments.starts):
            target, process, seconds = begin(arguments.serve, overrides)
            times.append(seconds)
            show.line(f"from the command to the first token: {seconds} s, of CPU {target.cpu():.1f} s")
            stop([process])
        show.data({"start to first token, s": times})
        return 0
    if arguments.serve:
        target, process, document["start to first token, s"] = begin(arguments.serve, overrides)
        show.line(f"from the command to the first token: {document['start to first token, s']} s")
    else:
        target = Target(arguments.url, arguments.model, arguments.key)
    try:
        asyncio.run(send(target, Ask(0, arguments.prompt, 8, 7)))  # warm up
        rows = measure(target, arguments, show)
        if process is not None:
            before, seconds = target.cpu(), 10.0
            time.sleep(seconds)
            document["idle CPU, %"] = round(100 * (target.cpu() - before) / seconds, 2)
            show.line(f"idle: {document['idle CPU, %']} % of a core")
    finally:
        if process is not None:
            stop([process])
    show.data(document | {"rows": rows})
    show.table(rows, COLUMNS + tuple(rows[0])[len(COLUMNS) :], f"{target.url} {target.model}: {arguments.prompt} words in, {arguments.tokens} tokens out; ms")
    return 1 if any(one["failed"] for one in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
