"""Speeds that no data sheet states: of a copy in the host's memory, and of the disk behind a folder. Measured once, then read from the cache.

A disk is timed past the page cache (O_DIRECT, 2 MiB blocks, two threads: what dist/engine.py does) in a file without a name, so that nothing is left
and nothing can be seen. A slow disk is not waited for: each of three passes ends after PASS seconds. A figure is of one machine and one folder and is
taken again after a week; `speeds.json` in the cache folder may be deleted at any time.
"""

from __future__ import annotations

import json
import mmap
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lilliput.base import env

WEEK = 7 * 86400.0
BLOCK, MOST = 2 << 20, 256 << 20  # bytes of one request, and of the file
PASS = 0.2  # seconds of one pass over it


@dataclass(frozen=True)
class Disk:
    """Bytes/s each way (0 = unknown), and where the figures come from or why there are none."""

    read: float = 0.0
    write: float = 0.0
    source: str = ""


def memory() -> float:
    """Bytes/s (read + written) of one core copying: a floor for the whole chip."""
    return float(_remembered("memory copy", lambda: {"speed": _copy()})["speed"])


def disk(folder: Path) -> Disk:
    """The disk behind a folder, which need not be there yet. Nothing is raised: a folder that cannot be written has no speed."""
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.is_dir())
    try:
        found = _remembered(f"disk of {there}", lambda: _timed(there))
    except OSError as fault:
        return Disk(source=f"{there}: {fault.strerror or fault}")
    when = time.strftime("%Y-%m-%d", time.gmtime(found["when"]))
    return Disk(found["read"], found["write"], f"measured in {there} on {when}{', through the page cache' if not found['direct'] else ''}")


def _remembered(what: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """A figure from the cache, measured when it is not there or is old."""
    path, name, known = env.cache_dir() / "speeds.json", f"{platform.node()}: {what}", {}
    with suppress(OSError, ValueError):
        known = json.loads(path.read_text(encoding="utf-8"))
    if name in known and 0 <= time.time() - known[name]["when"] < WEEK:
        return dict(known[name])
    known[name] = {**measure(), "when": time.time()}
    with suppress(OSError):  # a cache that cannot be written costs the time again
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_name(f".speeds-{os.getpid()}.tmp")
        beside.write_text(json.dumps(known, indent=1), encoding="utf-8")
        beside.replace(path)
    return dict(known[name])


def _copy(size: int = 1 << 25) -> float:
    """32 MiB, best of ten, ~80 ms: other processes take their share of some of them."""
    source, target = memoryview(bytearray(size)), memoryview(bytearray(size))
    target[:] = source  # touches the pages
    best = float("inf")
    for _ in range(10):
        begin = time.perf_counter()
        target[:] = source
        best = min(best, time.perf_counter() - begin)
    return 2 * size / best


def _timed(folder: Path) -> dict[str, Any]:
    """Write, write over (what a run does from its second step on), read."""
    size = min(MOST, shutil.disk_usage(folder).free // 4 // BLOCK * BLOCK)
    if size < BLOCK:
        raise OSError("too little is free to time it")
    handle, direct = _nameless(folder)
    try:
        os.posix_fallocate(handle, 0, size)
        wrote, _ = _pass(handle, size, os.pwritev)
        _, write = _pass(handle, wrote, os.pwritev)
        _, read = _pass(handle, wrote, os.preadv)
    finally:
        os.close(handle)
    return {"read": read, "write": write, "direct": direct}


def _nameless(folder: Path) -> tuple[int, bool]:
    """(handle of a file that no folder lists, whether it is past the page cache)."""
    direct = getattr(os, "O_DIRECT", 0)
    for flags in (direct, 0) if direct else (0,):
        with suppress(OSError, AttributeError):
            return os.open(folder, os.O_RDWR | os.O_TMPFILE | flags, 0o600), bool(flags)
    handle, name = tempfile.mkstemp(dir=folder)  # no O_TMPFILE here
    os.unlink(name)
    return handle, False


def _pass(handle: int, size: int, move: Callable[[int, list[Any], int], int]) -> tuple[int, float]:
    """(bytes moved from the file's beginning on, bytes/s), by two threads, each block in turn, until all is done or PASS seconds are over."""
    begin = time.perf_counter()
    buffers = [memoryview(mmap.mmap(-1, BLOCK)) for _ in range(2)]  # begin on a page, as O_DIRECT wants them

    def lane(number: int) -> int:
        at = number * BLOCK
        while at < size and (at < 2 * BLOCK or time.perf_counter() - begin < PASS):
            at += 2 * BLOCK if move(handle, [buffers[number]], at) == BLOCK else size
        return min(at, size)

    with ThreadPoolExecutor(2) as pool:
        ends = list(pool.map(lane, range(2)))
    moved = sum(-(-(end - number * BLOCK) // (2 * BLOCK)) for number, end in enumerate(ends) if end > number * BLOCK) * BLOCK
    return min(min(ends), size) // BLOCK * BLOCK or BLOCK, moved / (time.perf_counter() - begin)
