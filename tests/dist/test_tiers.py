"""Host and disk answer to the same words, and a device's tensors come back from either bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lilliput.dist.engine import Engine
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
