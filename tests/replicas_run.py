"""Replicas of the tiny model through Ray Serve: run by tests/serve/test_replicas.py inside a network of its own.

    python tests/replicas_run.py PART FOLDER      FOLDER holds the model; prints what was seen as JSON

PART is `kill` (two replicas, one is killed in the middle of answers), `scale` (one becomes two under load and one again when it is idle) or
`nodes` (a cluster of two nodes, a replica on each, and then one node is gone).
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import psutil

BASE = "Tell me a long story about the king and his daughters. " * 6


class Server:
    """`lilliput serve --replicas N` as a process of its own."""

    def __init__(self, folder: str, count: int, *settings: str) -> None:
        command = [sys.executable, "-m", "lilliput", "serve", folder, "--replicas", str(count), "--json", "http.port=0", "http.name=tiny", "http.drain=5",
                   "threads=1", *settings]  # fmt: skip
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        document = ""
        while not document.endswith("\n}\n"):
            line = self.process.stdout.readline()
            assert line, "the server ended before it was ready"
            document += line
        self.url = json.loads(document)["url"]

    def get(self, path: str) -> str:
        with urllib.request.urlopen(self.url + path, timeout=60) as answer:
            return answer.read().decode()

    def complete(self, prompt: str, tokens: int, **more: Any) -> tuple[int, str]:
        body = json.dumps({"prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True, **more}).encode()
        request = urllib.request.Request(self.url + "/v1/completions", body, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def replicas(self) -> list[psutil.Process]:
        found = [one for one in psutil.Process(self.process.pid).children(recursive=True) if "ServeReplica" in " ".join(one.cmdline())]
        return sorted(found, key=lambda one: one.pid)

    def there(self) -> int:
        """How many replicas answer."""
        return int(json.loads(self.get("/stats"))["models"][0]["replicas"])

    def becomes(self, count: int, seconds: float) -> float:
        """Wait for so many replicas: after how many seconds they were there, -1 if not in time."""
        start = time.monotonic()
        while time.monotonic() - start < seconds:
            if self.there() == count:
                return round(time.monotonic() - start, 1)
            time.sleep(0.5)
        return -1.0

    def figure(self, name: str) -> dict[str, float]:
        """Of a metric: engine -> value."""
        lines = [line for line in self.get("/metrics").splitlines() if line.startswith(name + "{")]
        return {line.partition('engine="')[2].partition('"')[0]: float(line.rpartition(" ")[2]) for line in lines}


def text(answer: tuple[int, str]) -> str:
    return json.loads(answer[1])["choices"][0]["text"] if answer[0] == 200 else f"{answer[0]}: {answer[1]}"


def talk(server: Server, seen: dict[str, Any]) -> None:
    """Eight conversations of three turns each: every one stays on one replica, whose cache knows it."""
    prompts = [f"{at} {BASE}" for at in range(8)]
    said = []
    for _ in range(3):
        with ThreadPoolExecutor(4) as pool:
            answers = list(pool.map(lambda prompt: server.complete(prompt, 8), prompts))
        said += [answer[0] for answer in answers]
        prompts = [prompt + text(answer) for prompt, answer in zip(prompts, answers)]
    alone = {text(server.complete("The king", 12)) for _ in range(6)}
    seen |= {"statuses": said, "greedy answers": len(alone), "hits": server.figure("vllm:prefix_cache_hits_total"),
             "looked for": server.figure("vllm:prefix_cache_queries_total"), "answered": server.figure("vllm:generation_tokens_total")}  # fmt: skip


def kill(server: Server, seen: dict[str, Any]) -> None:
    """Streams and whole answers are on their way when a replica is killed."""
    before = server.replicas()
    with ThreadPoolExecutor(12) as pool:
        streams = [pool.submit(server.complete, f"{at} {BASE}", 700, stream=True) for at in range(6)]
        wholes = [pool.submit(server.complete, f"{at} whole {BASE}", 120) for at in range(6)]
        time.sleep(0.8)
        before[0].kill()
        time.sleep(0.3)
        later = [pool.submit(server.complete, f"{at} later {BASE}", 8) for at in range(6)]
        ends = []
        for stream in streams:
            status, found = stream.result()
            ends.append("error" if "has died" in found else "whole" if status == 200 and '"finish_reason":"length"' in found else f"{status} {found[-200:]}")
        seen |= {"replicas": len(before), "streams": ends, "wholes": [one.result()[0] for one in wholes], "later": [one.result()[0] for one in later]}
    server.becomes(2, 90)
    seen["again"] = server.there()
    seen["new"] = len({one.pid for one in server.replicas()} - {one.pid for one in before})
    seen["after"] = [server.complete(f"{at} after {BASE}", 8)[0] for at in range(6)]


def two(folder: str, seen: dict[str, Any]) -> None:
    """Two replicas that talk, and lose one of them."""
    with running(folder, seen, 2, "replicas.cpus=0") as server:
        talk(server, seen)
        kill(server, seen)


def scale(folder: str, seen: dict[str, Any]) -> None:
    """Load comes and goes."""
    with running(folder, seen, 1, "replicas.cpus=0", "replicas.most=2", "replicas.target=1", "replicas.idle=4") as server, ThreadPoolExecutor(6) as pool:
        seen["first"], busy, said = server.there(), threading.Event(), []

        def ask(at: int) -> None:
            while not busy.is_set():
                said.append(server.complete(f"{at} {BASE}", 200)[0])

        asking = [pool.submit(ask, at) for at in range(6)]
        seen["grown after"] = server.becomes(2, 120)
        time.sleep(5)
        busy.set()
        for one in asking:
            one.result()
        seen["statuses"], seen["answered"] = sorted(set(said)), len(server.figure("vllm:generation_tokens_total"))
        seen["shrunk after"] = server.becomes(1, 120)
        seen["after"] = server.complete("The king", 8)[0]


def nodes(folder: str, seen: dict[str, Any]) -> None:
    """Two nodes of one core each, so that Ray puts one replica on each; then the second node is gone at once."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False, "node_ip_address": "127.0.0.1"})
    second = cluster.add_node(num_cpus=1, node_ip_address="127.0.0.1")
    try:
        with running(folder, seen, 2, "replicas.cpus=1", f"replicas.address={cluster.address}") as server:
            seen["statuses"] = [server.complete(f"{at} {BASE}", 8)[0] for at in range(8)]
            seen["answered"] = server.figure("vllm:generation_tokens_total")
            found = [psutil.Process(one.pid) for one in psutil.process_iter(["cmdline"]) if "ServeReplica" in " ".join(one.info["cmdline"] or ())]
            seen["nodes"] = len({one.ppid() for one in found})
            cluster.remove_node(second, allow_graceful=False)
            seen["after"] = [server.complete(f"{at} after {BASE}", 8)[0] for at in range(8)]
            seen["gone after"] = server.becomes(1, 60)
            seen["after"] += [server.complete(f"{at} alone {BASE}", 8)[0] for at in range(8)]
    finally:
        cluster.shutdown()


@contextmanager
def running(folder: str, seen: dict[str, Any], count: int, *settings: str) -> Iterator[Server]:
    """A server, which is ended by SIGTERM and must leave no process behind."""
    server = Server(folder, count, *settings)
    family = psutil.Process(server.process.pid).children(recursive=True)
    try:
        yield server
        family = psutil.Process(server.process.pid).children(recursive=True)
        ended = threading.Timer(60, server.process.kill)
        ended.start()
        server.process.send_signal(signal.SIGTERM)
        seen["exit"] = server.process.wait()
        ended.cancel()
        time.sleep(2)
        seen["left"] = [one.pid for one in family if one.is_running() and one.status() != psutil.STATUS_ZOMBIE]
    finally:
        for one in family:
            if one.is_running():
                one.kill()
        server.process.kill()


def main() -> int:
    """Run the part; the report goes to stdout."""
    seen: dict[str, Any] = {}
    {"kill": two, "scale": scale, "nodes": nodes}[sys.argv[1]](sys.argv[2], seen)
    os.write(1, json.dumps(seen).encode())
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
