"""Arenas and their engine: bytes come back, generations outlive a kill at any moment, damage is named, a full disk is refused first."""

from __future__ import annotations

import errno
import os
import random
import signal
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
import torch

from lilliput.base.errors import UserError
from lilliput.dist import engine as engines
from lilliput.dist.arena import Arena
from lilliput.dist.engine import BLOCK, Buffers, Engine, File, whole_pages
from lilliput.ops.pages import PAGE

SIZES = {"small": 12, "odd": 3 * PAGE + 5, "blocks": 2 * BLOCK + 4 * PAGE + 4}


@pytest.fixture
def engine():
    made = Engine(threads=3, block=BLOCK)
    yield made
    made.close()


def content(name: str, version: int) -> torch.Tensor:
    return torch.randint(0, 256, (SIZES[name],), dtype=torch.uint8, generator=torch.Generator().manual_seed(len(name) * 100 + version))


def put(arena: Arena, name: str, version: int) -> None:
    arena.write(name, content(name, version)).result()
    arena.turn(name)


def got(arena: Arena, name: str) -> torch.Tensor:
    into = torch.full((SIZES[name],), 7, dtype=torch.uint8)
    arena.read(name, into).result()
    return into


def test_bytes_come_back_and_unwritten_ones_are_zeros(engine: Engine, tmp_path: Path) -> None:
    arena = Arena(engine, tmp_path / "a.bin", SIZES)
    assert not got(arena, "blocks").any() and engine.read_bytes == 0
    for name in SIZES:
        put(arena, name, 1)
        assert torch.equal(got(arena, name), content(name, 1))
    assert engine.written_bytes == engine.read_bytes == PAGE + 4 * PAGE + 2 * BLOCK + 5 * PAGE
    assert (tmp_path / "a.bin").stat().st_size == arena.bytes == 2 * arena.slot + 2 * engine.written_bytes


def test_pieces(engine: Engine, tmp_path: Path) -> None:
    arena, whole = Arena(engine, tmp_path / "a.bin", SIZES), content("blocks", 1)
    for start in (BLOCK, 2 * BLOCK, 0):
        arena.write("blocks", whole[start : start + BLOCK], start)
    assert not got(arena, "blocks").any(), "the old generation is read until all pieces are there"
    arena.turn("blocks")
    assert torch.equal(got(arena, "blocks"), whole)
    piece = torch.empty(BLOCK // 4, dtype=torch.float32)
    arena.read("blocks", piece, BLOCK).result()
    assert torch.equal(piece.view(torch.uint8), whole[BLOCK : 2 * BLOCK])


def test_a_thousand_evictions_keep_every_bit(engine: Engine, tmp_path: Path) -> None:
    draw, arena = random.Random(0), Arena(engine, tmp_path / "a.bin", SIZES)
    sums: dict[str, int] = {}
    for turn in range(200):
        name = draw.choice(list(SIZES))
        if name in sums and draw.random() < 0.5:
            assert zlib.crc32(got(arena, name).numpy().tobytes()) == sums[name]
            continue
        put(arena, name, turn)
        sums[name] = zlib.crc32(content(name, turn).numpy().tobytes())
        if draw.random() < 0.2:
            arena.commit(f"step {turn}")


def test_generations_by_tag(engine: Engine, tmp_path: Path) -> None:
    arena = Arena(engine, tmp_path / "a.bin", SIZES)
    for version in (1, 2, 3):
        put(arena, "odd", version)
        put(arena, "odd", version + 10)  # twice between commits: the second goes where the first is
        arena.commit(f"step {version}")
    put(arena, "blocks", 4)
    arena.close()
    again = Arena(engine, tmp_path / "a.bin", SIZES)
    assert again.tags() == ["step 3", "step 2"]
    for version in (2, 3):
        again.back(f"step {version}")
        assert torch.equal(got(again, "odd"), content("odd", version + 10))
        assert not got(again, "blocks").any()
    with pytest.raises(UserError, match="does not hold step 1"):
        again.back("step 1")
    again.back("step 2")  # going on from the older one gives up the newer
    put(again, "odd", 9)
    again.commit("step 9")
    assert again.tags() == ["step 9", "step 2"] and again.generation == 4
    with pytest.raises(UserError, match="in use"):
        Arena(engine, tmp_path / "a.bin", SIZES)
    again.close()
    other = Arena(engine, tmp_path / "a.bin", {**SIZES, "more": 4})
    assert other.tags() == [], "another model's generations are not read"


KILLED = """
import sys, torch
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_arena import SIZES, put
from lilliput.dist.arena import Arena
from lilliput.dist.engine import Engine
arena, version = Arena(Engine(threads=2, block=1 << 20), Path(sys.argv[1]), SIZES), 0
while True:
    version += 1
    for name in SIZES:
        put(arena, name, version)
    arena.commit(str(version))
    print(version, flush=True)
"""


def test_kill_leaves_the_last_generation(engine: Engine, tmp_path: Path) -> None:
    draw = random.Random(1)
    for trial in range(2):
        path = tmp_path / f"{trial}.bin"
        process = subprocess.Popen([sys.executable, "-c", KILLED.format(tests=str(Path(__file__).parent)), str(path)], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        lines = [process.stdout.readline() for _ in range(3)]
        try:
            process.wait(timeout=draw.random() * 0.05)
        except subprocess.TimeoutExpired:
            pass
        os.kill(process.pid, signal.SIGKILL)
        told = int(([*lines, *process.stdout.read().splitlines()])[-1])
        process.wait()
        arena = Arena(engine, path, SIZES)
        newest = int(arena.tags()[0])
        assert newest in (told, told + 1), "what was said to be committed is there"
        for tag in arena.tags()[:1]:
            arena.back(tag)
            assert all(torch.equal(got(arena, name), content(name, newest)) for name in SIZES)


def test_damage_is_named(engine: Engine, tmp_path: Path) -> None:
    arena = Arena(engine, tmp_path / "a.bin", SIZES)
    put(arena, "blocks", 1)
    at = arena.places["blocks"][arena.at["blocks"]] + BLOCK + 17
    with open(tmp_path / "a.bin", "r+b") as file:
        file.seek(at)
        byte = file.read(1)
        file.seek(at)
        file.write(bytes([byte[0] ^ 4]))
        file.flush()
        os.fsync(file.fileno())
    with pytest.raises(UserError, match="blocks is damaged on disk") as fault:
        got(arena, "blocks")
    assert "block 1 " in fault.value.why and str(at - 17) in fault.value.why and "a.bin" in fault.value.why


def test_tensors_on_pages_go_straight_and_others_through_the_pool(engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    count = 2 * BLOCK + 3 * PAGE + 4
    arena, value = Arena(engine, tmp_path / "a.bin", {"x": count}), content("blocks", 1)
    value = torch.cat([value, value])[:count]
    on, off = whole_pages(count)[:count].copy_(value), whole_pages(count + 64)[64 : count + 64].copy_(value)
    assert on.data_ptr() % PAGE == 0 and off.data_ptr() % PAGE == 64
    pools: list[int] = []
    taken = Buffers.taken
    monkeypatch.setattr(Buffers, "taken", lambda self: pools.append(1) or taken(self))
    for source, into, through in ((on, off, 1 + 3), (off, on, 3 + 1)):  # the last block is no whole number of pages
        arena.write("x", source).result()
        arena.turn("x")
        arena.read("x", into.zero_()).result()
        assert torch.equal(into, value) and len(pools) == through
        pools.clear()


def test_a_torn_index_is_no_generation(engine: Engine, tmp_path: Path) -> None:
    arena = Arena(engine, tmp_path / "a.bin", SIZES)
    put(arena, "odd", 1)
    arena.commit("one")
    arena.commit("two")
    buffer = whole_pages(arena.slot)
    arena.file.read(buffer, arena.slot * arena.index)
    buffer[60] += 1
    arena.file.write(buffer, arena.slot * arena.index)
    assert arena.tags() == ["one"]


def test_space_is_checked_first(engine: Engine, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no room") as fault:
        Arena(engine, tmp_path / "a.bin", {"huge": 1 << 60})
    assert "2,305,8" in fault.value.why and "bytes) are needed" in fault.value.why and not (tmp_path / "a.bin").exists()


def test_a_disk_that_fills_up_is_named_and_the_generation_stays(engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arena = Arena(engine, tmp_path / "a.bin", SIZES)
    put(arena, "odd", 1)
    arena.commit("one")

    def full(*args) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(engines.os, "pwritev", full)
        with pytest.raises(UserError, match="disk full") as fault:
            put(arena, "odd", 2)
        assert "bytes are free" in fault.value.why
    arena.file.close()
    again = Arena(engine, tmp_path / "a.bin", SIZES)
    again.back("one")
    assert torch.equal(got(again, "odd"), content("odd", 1))


def test_preallocation_that_fails_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(engines.os, "posix_fallocate", full)
    with pytest.raises(UserError, match="disk full"):
        File(tmp_path / "a.bin", 1 << 20)


def test_a_file_system_without_direct_access_is_used_and_said(engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.open

    def refusing(path, flags, mode=0o777):
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return real(path, flags, mode)

    with monkeypatch.context() as patch:
        patch.setattr(engines.os, "open", refusing)
        arena = Arena(engine, tmp_path / "a.bin", SIZES)
    assert not arena.file.direct and "refuses O_DIRECT" in arena.file.reason
    put(arena, "blocks", 1)
    assert torch.equal(got(arena, "blocks"), content("blocks", 1))


def test_bytes_reach_the_disk(engine: Engine, tmp_path: Path) -> None:
    def counted() -> dict[str, int]:
        return {k: int(v) for k, v in (line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())}

    arena = Arena(engine, tmp_path / "a.bin", {"x": 8 * BLOCK})
    if not arena.file.direct:
        pytest.skip(arena.file.reason)
    tensor, before = torch.randn(2 * BLOCK), counted()
    arena.write("x", tensor).result()
    arena.turn("x")
    back = torch.empty_like(tensor)
    for _ in range(3):
        arena.read("x", back).result()
    after = counted()
    assert torch.equal(back, tensor)
    assert after["write_bytes"] - before["write_bytes"] >= 8 * BLOCK
    assert after["read_bytes"] - before["read_bytes"] >= 3 * 8 * BLOCK, "a cached page would not be read again"


def test_buffers_are_few_aligned_and_given_back() -> None:
    buffers = Buffers(2, 5000)
    with buffers.taken() as one, buffers.taken() as two:
        assert buffers.free.empty()
        assert {t.data_ptr() % PAGE for t in (one, two)} == {0} and one.numel() == 2 * PAGE
    assert buffers.free.qsize() == 2
