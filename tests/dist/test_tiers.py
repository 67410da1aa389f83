"""Host and disk answer to the same words, and a device's tensors come back from either bit for bit."""

from __future__ import annotations

import random
import shutil
import zlib
from pathlib import Path

import pytest
import torch

from lilliput.dist.engine import Engine, whole_pages
from lilliput.dist.tiers import DiskTier, HostTier

SHAPES = {"a": (1 << 19, torch.float32), "b": (5000, torch.bfloat16)}


@pytest.fixture(params=["host", "disk"])
def tier(request: pytest.FixtureRequest, tmp_path: Path):
    engine = Engine(threads=2, block=1 << 20)
    made = HostTier(SHAPES, torch.device("cpu")) if request.param == "host" else DiskTier(SHAPES, engine, tmp_path / "x.bin")
    yield made
    made.close()
    engine.close()


def whole(tier, name: str) -> torch.Tensor:
    count, dtype = SHAPES[name]
    into = torch.full((count,), 3, dtype=dtype)
    tier.read(name, into).result()
    return into


def test_written_is_read(tier) -> None:
    assert not whole(tier, "a").any() and not whole(tier, "b").any()
    expected = {name: torch.randn(count).to(dtype) for name, (count, dtype) in SHAPES.items()}
    for name, tensor in expected.items():
        tier.write(name, tensor)
        tier.turn(name)
    assert all(torch.equal(whole(tier, name), tensor) for name, tensor in expected.items())


def test_windows(tier) -> None:
    tile, buffer = 1 << 18, torch.empty(1 << 18)
    for start in (0, tile):
        piece, ready = tier.window("a", start, tile, buffer)
        ready.result()
        assert piece.numel() == tile and not piece.any()
        piece.fill_(1.0 + start)
        tier.back("a", start, piece).result()
    tier.turn("a")
    assert whole(tier, "a").tolist() == [1.0] * tile + [1.0 + tile] * tile
    assert (piece.data_ptr() == buffer.data_ptr()) == (tier.name == "disk"), "the host's own memory is worked on where it is"


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_two_gigabytes_survive_a_hundred_random_cycles(tmp_path: Path) -> None:
    """96 tensors, 2.06 GB. A cycle evicts eight and loads eight into other memory, some of it on pages and some not, all under way at once; some cycles
    commit and some go back to the commit before. A CRC of its own, not the engine's checksum, is held for each tensor."""
    if shutil.disk_usage(tmp_path).free < 30 << 30:
        pytest.skip("4.1 GB of files, and 25 GiB stay free")
    draw, rounds, count = random.Random(7), 100, 96
    sizes = {f"t{k}": draw.choice((21_504_000, 21_504_000 - draw.randrange(4096))) for k in range(count)}
    whole = torch.randint(0, 256, (21_504_000,), dtype=torch.uint8, generator=torch.Generator().manual_seed(7))
    crc = lambda tensor: zlib.crc32(tensor.numpy())

    def value(name: str, version: int) -> torch.Tensor:
        return whole.roll(101 * int(name[1:]) + 7919 * version)[: sizes[name]]

    def memory(name: str) -> torch.Tensor:
        skip = draw.choice((0, 0, 64))
        return whole_pages(sizes[name] + skip)[skip : skip + sizes[name]]

    engine = Engine()
    tier = DiskTier({name: (size, torch.uint8) for name, size in sizes.items()}, engine, tmp_path / "x.bin")
    now, kept, versions, loaded = {}, {}, dict.fromkeys(sizes, 0), 0
    for name in sizes:
        tier.write(name, value(name, 0)).result()
        tier.turn(name)
        now[name] = crc(value(name, 0))
    for cycle in range(rounds):
        out, back = (draw.sample(sorted(sizes), 8) for _ in range(2))
        writes = []
        for name in out:
            versions[name] += 1
            source = memory(name).copy_(value(name, versions[name]))
            now[name] = crc(source)
            writes.append(tier.write(name, source))
            tier.turn(name)
        loads = [(name, into, tier.read(name, into)) for name in back for into in [memory(name)]]
        for name, into, ready in loads:
            ready.result()
            assert crc(into) == now[name], f"{name} in cycle {cycle}"
            loaded += 1
        for written in writes:
            written.result()
        if cycle % 10 == 9:
            tier.arena.commit(str(cycle))
            kept = dict(now)
        elif cycle % 25 == 21:
            tier.arena.settle()
            tier.arena.back(tier.arena.tags()[0])
            now = dict(kept)
    for name in sizes:
        into = memory(name)
        tier.read(name, into).result()
        assert crc(into) == now[name], name
    assert loaded == 8 * rounds and sum(sizes.values()) > 2e9 and tier.arena.path.stat().st_size == tier.arena.bytes
    tier.close()
    engine.close()
