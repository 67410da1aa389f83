"""The engine of the disk tiers against the disk: a sweep of threads and block sizes, and the engine in the same rounds.

    python benchmarks/infinity.py [--folder .] [--megabytes 512] [--rounds 5]

Every round runs each contender once, in turn; medians in MB/s and the load are printed. All move the same bytes between a file and the same tensor
in huge pages with O_DIRECT, so the best of the sweep is what the disk can do here. The engine's figures include a checksum of every block, and for
tensors that do not begin on a page a copy through the pool of buffers, which the sweep does without.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from lilliput.base.show import Show
from lilliput.dist.arena import Arena
from lilliput.dist.engine import Engine, File, whole_pages


def raw(file: File, tensor: torch.Tensor, threads: int, block: int, writing: bool) -> float:
    """Seconds to move the whole file by threads that do nothing else."""

    def work(number: int) -> None:
        for at in range(number * block, tensor.numel(), threads * block):
            (file.write if writing else file.read)(tensor[at : at + block], at)

    with ThreadPoolExecutor(threads) as pool:
        begin = time.perf_counter()
        list(pool.map(work, range(threads)))
        return time.perf_counter() - begin


def tiered(arena: Arena, tensor: torch.Tensor, writing: bool) -> float:
    """Seconds to move as much through an arena."""
    begin = time.perf_counter()
    if writing:
        arena.write("x", tensor).result()
        arena.turn("x")
    else:
        arena.read("x", tensor).result()
    return time.perf_counter() - begin


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", default=".")
    parser.add_argument("--megabytes", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    given, show = parser.parse_args(), Show()
    size = given.megabytes << 20
    shapes = [(threads, block) for threads in (1, 2, 4, 6) for block in (1 << 20, 2 << 20, 4 << 20, 8 << 20)]
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        file, engine = File(Path(folder) / "raw.bin", size), Engine()
        arena = Arena(engine, Path(folder) / "arena.bin", {"x": size}, generations=1)
        tensors = {"engine, a tensor that begins on a page": whole_pages(size), "engine, any other tensor": torch.empty(size, dtype=torch.uint8)}
        for tensor in tensors.values():
            tensor.random_(0, 255)
        pages = tensors["engine, a tensor that begins on a page"]
        show.line(f"O_DIRECT: {file.reason or 'yes'}; load {os.getloadavg()[0]:.2f}")
        rates: dict[tuple[str, bool], list[float]] = {}
        for _ in range(given.rounds):
            for writing in (True, False):
                for threads, block in shapes:
                    rates.setdefault((f"{threads} threads, {block / 2**20:g} MiB", writing), []).append(size / raw(file, pages, threads, block, writing) / 1e6)
                for name, tensor in tensors.items():
                    rates.setdefault((name, writing), []).append(size / tiered(arena, tensor, writing) / 1e6)
        for writing in (True, False):
            found = {name: statistics.median(each) for (name, which), each in rates.items() if which == writing}
            ours = {name: found.pop(name) for name in tensors}
            best = max(found, key=lambda name: found[name])
            for name, rate in found.items():
                show.line(f"{'write' if writing else 'read'}  {name}: {rate:.0f} MB/s")
            for name, rate in ours.items():
                show.line(f"{'write' if writing else 'read'}  {name}: {rate:.0f} MB/s, {rate / found[best]:.0%} of the best ({best})")
        show.line(f"load {os.getloadavg()[0]:.2f}")
        arena.close()
        engine.close()


if __name__ == "__main__":
    main()
