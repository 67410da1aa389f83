"""Two replicas of the tiny model through Ray Serve, one of which is killed: run by tests/serve/test_replicas.py inside a network of its own.

    python tests/replicas_run.py FOLDER      FOLDER holds the model; prints what was seen as JSON
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
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psutil

BASE = "Tell me a long story about the king and his daughters. " * 6


class Server:
    """`lilliput serve --replicas 2` as a process of its own."""

    def __init__(self, folder: str) -> None:
        command = [sys.executable, "-m", "lilliput", "serve", folder, "--replicas", "2", "--json", "http.port=0", "http.name=tiny", "http.drain=5",
                   "replicas.cpus=0", "threads=1"]  # fmt: skip
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
    start = time.monotonic()
    while time.monotonic() - start < 90 and json.loads(server.get("/stats"))["models"][0]["replicas"] < 2:
        time.sleep(0.5)
    seen["again"] = json.loads(server.get("/stats"))["models"][0]["replicas"]
    seen["new"] = len({one.pid for one in server.replicas()} - {one.pid for one in before})
    seen["after"] = [server.complete(f"{at} after {BASE}", 8)[0] for at in range(6)]


def main() -> int:
    """Run it all; the report goes to stdout."""
    seen: dict[str, Any] = {}
    server = Server(sys.argv[1])
    family = psutil.Process(server.process.pid).children(recursive=True)
    try:
        talk(server, seen)
        kill(server, seen)
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
    os.write(1, json.dumps(seen).encode())
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
