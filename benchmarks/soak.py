"""Soak: a server under a steady mix of requests for half an hour; what grows?

    make bench X=soak ARGS="--minutes 30 --picture soak.svg"      other KEY=VALUE words go to the server

Clients draw their requests at random: streams, several answers, schemas that no cache of grammars has seen, required tools, prompts with a
beginning that the cache of prefixes knows, scored prompts, requests that must be refused, clients that leave in the middle (half of
them by a reset). The cache is small, so that every block of it is written in the first minutes and answers are preempted. Every few seconds: resident
memory, blocks in use, threads, open files. Then nobody asks for a minute, and the process's CPU time is read.

It fails when an answer is not what was asked for, when a block, a thread or a file is left, when memory rises by more than 2 % an hour (a line
through all samples after the first third), or when idle takes 1 % of a core.
"""

from __future__ import annotations

import argparse
import http.client
import json
import random
import socket
import statistics
import struct
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil
from serve_load import start, stats, stop

from lilliput.base.show import Show
from lilliput.loops.bench import machine

RESET = struct.pack("ii", 1, 0)  # SO_LINGER: close with RST
BEGINNING = " ".join(f"Rule {number}: answer in so many words as the number says, and in no more." for number in range(20))
SCHEMA = {"type": "object", "properties": {"name": {"type": "string", "maxLength": 20}, "age": {"type": "integer", "minimum": 0, "maximum": 150}},
          "required": ["name", "age"], "additionalProperties": False}  # fmt: skip
COLUMNS = ("minute", "answers", "MiB", "blocks", "threads", "files")
Body = dict[str, Any]


class Client:
    """One thread that asks until it is told to stop; what came of it by kind."""

    def __init__(self, url: str, model: str, seed: int) -> None:
        """`seed`: of everything it draws."""
        self.place, self.model, self.draw = urlsplit(url), model, random.Random(seed)
        self.done: Counter[str] = Counter()
        self.faults: list[str] = []
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.kinds: tuple[Callable[[], None], ...] = (self.stream, self.answers, self.schema, self.tool, self.prefix, self.scored, self.refused, self.leave)

    def _run(self) -> None:
        while not self.ended.is_set():
            kind = self.draw.choice(self.kinds)
            try:
                kind()
                self.done[kind.__name__] += 1
            except Exception as fault:  # whatever it is, it is what this looks for
                self.faults.append(f"{kind.__name__}: {type(fault).__name__}: {fault}")
            self.ended.wait(0.05)

    def _chat(self, **more: Any) -> Body:
        text = "".join(self.draw.choice("etaoin shrdlu") for _ in range(self.draw.randrange(5, 200)))
        how = {"max_tokens": self.draw.randrange(1, 80), "seed": self.draw.randrange(1000), "temperature": self.draw.choice((0, 0.8))}
        return {"model": self.model, "messages": [{"role": "user", "content": text}], **how, **more}

    def _open(self, path: str, body: Body) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
        connection = http.client.HTTPConnection(self.place.hostname or "", self.place.port, timeout=600)
        connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
        return connection, connection.getresponse()

    def _ask(self, path: str, body: Body, status: int = 200) -> Any:
        connection, response = self._open(path, body)
        data = response.read()
        connection.close()
        assert response.status == status, f"{response.status} {data[:300]!r}"
        return json.loads(data) if data.startswith(b"{") else data

    def stream(self) -> None:
        """An answer as it comes, to its end."""
        events = self._ask("/v1/chat/completions", self._chat(stream=True))
        assert events.rstrip().endswith(b"data: [DONE]") and b'"error"' not in events, events[-300:]

    def answers(self) -> None:
        """Three answers to one question."""
        found = self._ask("/v1/chat/completions", self._chat(n=3, temperature=0.9))
        assert [choice["finish_reason"] in ("stop", "length") for choice in found["choices"]] == [True] * 3, found

    def schema(self) -> None:
        """JSON of a schema that is new each time."""
        shape = {"name": "x", "schema": SCHEMA | {"title": str(self.draw.random())}}
        found = self._ask("/v1/chat/completions", self._chat(response_format={"type": "json_schema", "json_schema": shape}))["choices"][0]
        if found["finish_reason"] == "stop":
            said = json.loads(found["message"]["content"])
            assert set(said) == {"name", "age"} and 0 <= said["age"] <= 150, said

    def tool(self) -> None:
        """A call of a tool."""
        tool = {"type": "function", "function": {"name": f"f{self.draw.randrange(1000)}", "parameters": SCHEMA}}
        found = self._ask("/v1/chat/completions", self._chat(tools=[tool], tool_choice="required"))["choices"][0]
        for call in found["message"].get("tool_calls") or () if found["finish_reason"] == "tool_calls" else ():
            assert set(json.loads(call["function"]["arguments"])) == {"name", "age"}, call

    def prefix(self) -> None:
        """A beginning that was computed before."""
        body = self._chat()
        body["messages"].insert(0, {"role": "system", "content": BEGINNING})
        self._ask("/v1/chat/completions", body)

    def scored(self) -> None:
        """Log probabilities of a text."""
        body = {"model": self.model, "prompt": BEGINNING[: self.draw.randrange(20, 400)], "max_tokens": 0, "echo": True, "logprobs": 1}
        found = self._ask("/v1/completions", body)["choices"][0]["logprobs"]["token_logprobs"]
        assert all(value <= 0 for value in found[1:]), found

    def refused(self) -> None:
        """What cannot be honoured is a 400."""
        self._ask("/v1/chat/completions", self._chat(temperture=1), status=400)

    def leave(self) -> None:
        """Go away after some events."""
        connection, response = self._open("/v1/chat/completions", self._chat(stream=True, max_tokens=500, ignore_eos=True))
        for _ in range(self.draw.randrange(0, 12)):
            response.readline()
        if self.draw.random() < 0.5 and connection.sock is not None:
            connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        response.close()
        connection.close()


def look(url: str, process: psutil.Process, minute: float, answers: int) -> Body:
    """One sample."""
    with process.oneshot():
        return {"minute": round(minute, 2), "answers": answers, "MiB": round(process.memory_info().rss / 2**20, 1), "blocks": stats(url)["blocks_used"],
                "threads": process.num_threads(), "files": process.num_fds()}  # fmt: skip


def draw(rows: list[Body], path: Path, title: str) -> None:
    """Memory and blocks over the minutes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (above, below) = pyplot.subplots(2, 1, sharex=True, figsize=(7, 4), layout="constrained")
    minutes = [row["minute"] for row in rows]
    above.plot(minutes, [row["MiB"] for row in rows], lw=1)
    above.set(ylabel="resident, MiB", ylim=(0, None), title=title)
    below.plot(minutes, [row["blocks"] for row in rows], lw=0.7, label="blocks in use")
    below.plot(minutes, [row["files"] for row in rows], lw=0.7, label="open files")
    below.plot(minutes, [row["threads"] for row in rows], lw=0.7, label="threads")
    below.set(xlabel="minutes", ylim=(0, None))
    below.legend(fontsize=8)
    figure.savefig(path)


def verdict(rows: list[Body], first: Body, last: Body, idle: float, faults: list[str]) -> tuple[Body, list[str]]:
    """What came out of it, and what is wrong with that."""
    kept = rows[len(rows) // 3 :]
    line = statistics.linear_regression([row["minute"] for row in kept], [row["MiB"] for row in kept])
    level = statistics.fmean(row["MiB"] for row in kept)
    found = {"MiB an hour": round(60 * line.slope, 2), "% an hour": round(6000 * line.slope / level, 2), "MiB": round(level, 1),
             "left: blocks, threads, files": [last["blocks"], last["threads"] - first["threads"], last["files"] - first["files"]],
             "idle CPU, %": round(idle, 2), "faults": len(faults)}  # fmt: skip
    wrong = [text for text, is_so in (
        ("memory rises", found["% an hour"] > 2), ("blocks are left", last["blocks"] > 0), ("threads are left", last["threads"] > first["threads"] + 1),
        ("files are left", last["files"] > first["files"] + 1), ("idle takes CPU", idle >= 1), (f"{len(faults)} faults: {faults[:3]}", bool(faults)),
    ) if is_so]  # fmt: skip
    return found, wrong


def main() -> int:
    """Run, print the table, write the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--clients", type=int, default=6)
    parser.add_argument("--every", type=float, default=5, help="seconds between samples; minutes are counted in samples")
    parser.add_argument("--idle", type=float, default=60, help="seconds without requests at the end")
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--json", action="store_true")
    arguments, overrides = parser.parse_known_args()
    show = Show(json=arguments.json)
    server, url, _ = start(arguments.model, ["serve.kv_tokens=1536", "serve.swap_tokens=1024", *overrides])
    try:
        process, clients = psutil.Process(server.pid), [Client(url, arguments.model, seed) for seed in range(arguments.clients)]
        warm = Client(url, arguments.model, 99)  # what is loaded at first use belongs to the first sample
        for kind in warm.kinds:
            kind()
        first, rows = look(url, process, 0, 0), []
        for client in clients:
            client.thread.start()
        for number in range(max(6, int(60 * arguments.minutes / arguments.every))):
            time.sleep(arguments.every)
            rows.append(look(url, process, (number + 1) * arguments.every / 60, sum(sum(client.done.values()) for client in clients)))
            if number % max(1, int(60 / arguments.every)) == 0:
                show.line(str(rows[-1]))
        for client in clients:
            client.ended.set()
        for client in clients:
            client.thread.join(600)
        time.sleep(2)
        before = sum(process.cpu_times()[:2])
        time.sleep(arguments.idle)
        idle = 100 * (sum(process.cpu_times()[:2]) - before) / arguments.idle
        last, told = look(url, process, rows[-1]["minute"], rows[-1]["answers"]), stats(url)
    finally:
        stop([server])
    found, wrong = verdict(rows, first, last, idle, [fault for client in clients for fault in client.faults])
    done = sum((client.done for client in clients), Counter())
    if arguments.picture:
        title = f"{arguments.model}, {arguments.clients} clients, {sum(done.values()):,} requests: {found['MiB an hour']:+.1f} MiB an hour"
        draw(rows, arguments.picture, title)
    ends = {key: told[key] for key in ("prompt", "generated", "prefix_queries", "prefix_hits", "preempted_swap", "preempted_recompute")}
    show.data({"verdict": found, "wrong": wrong, "requests": done, "engine": ends, "first": first, "last": last, "rows": rows})
    each = max(1, len(rows) // 10)
    show.table([first, *rows[each - 1 :: each], last], COLUMNS, f"{arguments.model}; {', '.join(f'{key} {value}' for key, value in machine().items())}")
    show.line(f"requests: {dict(done)}; engine: {ends}")
    show.line(f"{found}: {'; '.join(wrong) or 'flat, and nothing is left'}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
