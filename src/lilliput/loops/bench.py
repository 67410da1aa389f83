"""Benchmarks: ours and the peers' in turns, medians, and the machine's limits from the same run.

Two sides are never timed one after the other but alternately (A, B, A, B ...), because other processes of the machine come and go;
a ratio is the median of the rounds' ratios. Between sides there is a pause: OpenMP's threads go on spinning for a while after
a product of torch, on the cores that the other side needs. Each peer of `decode` is a process of its own.

A line that is slower than a peer's says so like any other.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lilliput.base import env
from lilliput.base.errors import UserError

if TYPE_CHECKING:
    from lilliput.models.native import NativeDecoder

PAUSE = 0.02  # seconds between two sides
PEERS = Path(__file__).parent / "peers"


def machine() -> dict[str, Any]:
    """What a page of results says of where they come from."""
    from lilliput.ops import native

    names = [line.partition(":")[2].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    load = os.getloadavg()
    kernels = native.level()
    count = 0 if native.module() is None else native.module().threads()
    cpu = names[0] if names else platform.processor()
    told = {"cpu": cpu, "kernels": kernels, "threads": count, "load": round(load[0], 2), "python": platform.python_version()}
    return told | ({"commit": commit} if (commit := _commit()) else {})


def _commit() -> str:
    """The commit of a source checkout, "+" where files differ from it; "" for an installed package."""
    try:
        said = subprocess.run(["git", "-C", str(PEERS), "describe", "--always", "--dirty=+"], capture_output=True, text=True)
    except OSError:
        return ""
    return said.stdout.strip() if said.returncode == 0 else ""


def _lines(path: str) -> list[str]:
    return Path(path).read_text(encoding="utf-8").splitlines() if Path(path).exists() else []


def alternate(sides: Mapping[str, Callable[[], object]], rounds: int = 7, least: float = 0.004) -> dict[str, list[float]]:
    """Seconds of each side in each round. A side that takes less than `least` is repeated inside its turn."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    counts: dict[str, int] = {}
    for name, run in sides.items():
        run()
        start = time.perf_counter()
        run()
        counts[name] = max(1, round(least / max(time.perf_counter() - start, 1e-7)))
    for _ in range(rounds):
        for name, run in sides.items():
            time.sleep(PAUSE)
            run()  # wakes its threads
            start = time.perf_counter()
            for _ in range(counts[name]):
                run()
            times[name].append((time.perf_counter() - start) / counts[name])
    return times


def ratio(times: Mapping[str, list[float]], ours: str, theirs: str) -> float:
    """How many times faster ours is: the median over the rounds."""
    return statistics.median(b / a for a, b in zip(times[ours], times[theirs]))


@dataclass
class Worker:
    """A peer in a process of its own; `rate` asks it for tokens a second."""

    name: str
    process: subprocess.Popen[str]

    @staticmethod
    def start(name: str, command: Sequence[str], **settings: str) -> Worker:
        """Start it with these environment variables and wait until it is ready. UserError with its last words when it ends instead."""
        process = subprocess.Popen(list(command), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env.child(**settings))
        assert process.stdout is not None and process.stderr is not None, "pipes were asked for"
        if not process.stdout.readline():
            words = process.stderr.read().strip().splitlines()
            raise UserError(f"{name} did not start", words[-1] if words else "it ended without a word", " ".join(command))
        return Worker(name, process)

    def rate(self, **asked: int) -> float:
        """Tokens a second of {"batch": B, "steps": N} or {"prefill": T}; NaN when the peer gave up."""
        assert self.process.stdin is not None and self.process.stdout is not None, "pipes were asked for"
        try:
            self.process.stdin.write(json.dumps(asked) + "\n")
            self.process.stdin.flush()
            return float(json.loads(self.process.stdout.readline())["rate"])
        except (BrokenPipeError, json.JSONDecodeError):
            return float("nan")

    def end(self) -> None:
        """Close its input and wait."""
        if self.process.stdin is not None:
            self.process.stdin.close()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()


class Ours:
    """The engine on one model, asked as the workers are: tokens through scheduler, native step, sampler and text."""

    def __init__(self, model: NativeDecoder, tokenizer: Any, kv: str = "fp32") -> None:
        from lilliput.serve.engine import Engine

        # no sharing: every prompt is the same one, and would be found
        self.engine = Engine(model, tokenizer, kv_tokens=64 * 160 + 4096, max_batch_tokens=4096, kv=kv, sharing=False)

    def rate(self, **asked: int) -> float:
        """As Worker.rate."""
        from lilliput.serve.request import Sampling

        if "prefill" in asked:
            self.engine.add([1000 + i for i in range(asked["prefill"])], Sampling(1, ignore_eos=True))
            start = time.perf_counter()
            self.engine.step()
            return asked["prefill"] / (time.perf_counter() - start)
        batch, steps = asked["batch"], asked["steps"]
        for _ in range(batch):
            self.engine.add([1000 + i for i in range(32)], Sampling(steps + 1, ignore_eos=True))
        self.engine.step()  # all prompts
        start = time.perf_counter()
        while self.engine.busy:
            self.engine.step()
        return batch * steps / (time.perf_counter() - start)

    def end(self) -> None:
        """Nothing to end."""


def decode(sides: Mapping[str, Worker | Ours], batches: Sequence[int], prefills: Sequence[int], rounds: int,
           note: Callable[[str], None]) -> list[dict[str, Any]]:  # fmt: skip
    """One row a side, one column a load; medians over rounds in which the sides take turns. Ratios: see `against`."""
    asked = [{"batch": batch, "steps": min(48, max(12, 192 // batch))} for batch in batches] + [{"prefill": tokens} for tokens in prefills]
    rows: dict[str, dict[str, Any]] = {name: {"side": name} for name in sides}
    for load in asked:
        label = f"batch {load['batch']}" if "batch" in load else f"prompt {load['prefill']}"
        times: dict[str, list[float]] = {name: [] for name in sides}
        for turn in range(rounds + 1):
            for name, side in sides.items():
                time.sleep(PAUSE)
                rate = side.rate(**load)
                if turn:  # the first round warms caches and threads
                    times[name].append(rate)
        for name, rates in times.items():
            rows[name][label] = round(statistics.median(rates), 1)
            rows[name][f"{label} rounds"] = rates
        note(f"{label}: " + ", ".join(f"{name} {rows[name][label]:,.0f}" for name in sides))
    return list(rows.values())


def against(rows: Sequence[Mapping[str, Any]], ours: str, theirs: str) -> dict[str, float]:
    """Load -> how many times faster ours is than theirs, the median of the rounds' ratios."""
    mine, other = (next(row for row in rows if row["side"] == name) for name in (ours, theirs))
    loads = [key.removesuffix(" rounds") for key in mine if key.endswith(" rounds")]
    return {load: round(statistics.median(a / b for a, b in zip(mine[f"{load} rounds"], other[f"{load} rounds"])), 2) for load in loads}


def peers(model: str, threads: int, llama: str, vllm: str, work: Path, note: Callable[[str], None]) -> tuple[dict[str, Worker], dict[str, Path]]:
    """The peers that can be started here, and the GGUF files made for llama.cpp (type -> path), which ours reads too.

    llama, vllm: the Python of an environment that has them; "" = leave it out. UserError when a peer that was asked for does not start.
    """
    from lilliput.models import hub
    from lilliput.models.checkpoints import open_checkpoint, save_model

    checkpoint = open_checkpoint(hub.locate(model))
    found: dict[str, Worker] = {}
    files: dict[str, Path] = {}
    try:
        import transformers  # noqa: F401

        note("starting transformers")
        found["transformers fp32"] = Worker.start("transformers", [sys.executable, "-m", "lilliput.loops.peers.transformers_worker", model, str(threads)])
    except ImportError:
        note("transformers is not installed: left out")
    if llama:
        if checkpoint.format != "gguf":
            raise UserError("llama.cpp needs a GGUF model", f"{model} is {checkpoint.format}", "leave --llama-cpp out")
        for kind in ("Q4_0", "Q8_0"):
            files[kind] = work / f"{kind}.gguf"
            note(f"quantising to {kind}, starting llama.cpp")
            command = [llama, str(PEERS / "llama_worker.py"), "quantize", str(checkpoint.path), str(files[kind]), kind]
            made = subprocess.run(command, capture_output=True, text=True)
            if made.returncode:
                raise UserError(f"llama.cpp could not make {kind}", made.stderr.strip()[-300:], f"{llama} -c 'import llama_cpp'")
            found[f"llama.cpp {kind}"] = Worker.start("llama.cpp", [llama, str(PEERS / "llama_worker.py"), "serve", str(files[kind]), str(threads)])
    if vllm:
        save_model(work / "hf", checkpoint.read, checkpoint.spec, checkpoint.tokenizer())
        note("starting vLLM")
        settings = {"VLLM_CPU_KVCACHE_SPACE": "2", "OMP_NUM_THREADS": str(threads), "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
        found["vLLM fp32"] = Worker.start("vLLM", [vllm, str(PEERS / "vllm_worker.py"), "serve", str(work / "hf"), "float32"], **settings)
    return found, files
