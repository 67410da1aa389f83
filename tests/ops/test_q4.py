"""The compiled decoder of a file's 4-bit blocks against plain torch, gguf's own arithmetic and numpy, bit for bit, at every level."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch._subclasses import FakeTensorMode

from lilliput.base.errors import UserError
from lilliput.ops import native
from lilliput.ops.q4 import DECODE, Q4, reference

pytestmark = pytest.mark.skipif(native.module() is None, reason=str(native.missing()))
LEVELS = native.levels()
SHAPES = [(1, 32), (3, 96), (7, 320), (64, 256), (257, 160), (576, 1536)]


def file_rows(shape: tuple[int, int], kind: str = "Q4_1") -> np.ndarray:
    import gguf

    weight = np.random.default_rng(sum(shape)).normal(0, 0.05, shape).astype(np.float32)
    return gguf.quants.quantize(weight, getattr(gguf.GGMLQuantizationType, kind))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("double", [True, False], ids=["double", "fp16"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bitwise_the_reference(shape: tuple[int, int], double: bool, level: str) -> None:
    codec = Q4(*shape, double)
    stored = codec.encode("Q4_1", file_rows(shape))
    with native.using(level):
        ours = codec.decode(stored)
    assert ours.shape == shape and torch.equal(ours.view(torch.int32), reference(stored, *shape, double).view(torch.int32))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1"])
def test_bitwise_the_file(kind: str, level: str) -> None:
    import gguf

    codec, rows = Q4(48, 320, double=False), file_rows((48, 320), kind)
    with native.using(level):
        ours = codec.decode(codec.encode(kind, rows))
    assert np.array_equal(ours.numpy(), gguf.quants.dequantize(rows, getattr(gguf.GGMLQuantizationType, kind)))


@pytest.mark.parametrize("level", LEVELS)
def test_every_byte_by_the_definition(level: str) -> None:
    """All 256 bytes under doubled scales and offsets, in numpy's fp32; the file's order: low nibbles are inputs 0..15 of a block."""
    codec, draw = Q4(16, 512), np.random.default_rng(1)
    steps, mean, steps2, mean2 = (np.array([x], np.float32) for x in (0.001, 0.2, 0.01, -1.5))
    q, r = (draw.integers(-127, 128, codec.blocks).astype(np.int8) for _ in range(2))
    numbers = draw.permutation(np.tile(np.arange(256, dtype=np.uint8), 16))
    stored = torch.from_numpy(np.concatenate([np.concatenate([steps, mean, steps2, mean2]).view(np.uint8), numbers, q.view(np.uint8), r.view(np.uint8)]))
    byte = numbers.reshape(codec.blocks, 16)
    n = np.concatenate([byte & 15, byte >> 4], 1).astype(np.float32)
    scales, offsets = q.astype(np.float32) * steps + mean, r.astype(np.float32) * steps2 + mean2
    with native.using(level):
        ours = codec.decode(stored)
    assert np.array_equal(ours.numpy().reshape(-1, 32), n * scales[:, None] + offsets[:, None])


def test_reasons_and_citizenship() -> None:
    codec = Q4(8, 64)
    stored = codec.encode("Q4_1", file_rows((8, 64)))
    with pytest.raises(UserError, match="blocks of Q8_0"):
        codec.encode("Q8_0", file_rows((8, 64)))
    with pytest.raises(AssertionError, match="no 8 x 128 matrix"):
        DECODE(stored, 8, 128, True)
    with FakeTensorMode() as mode:
        assert codec.decode(mode.from_tensor(stored)).shape == (8, 64)
    torch.library.opcheck(DECODE, (stored, 8, 64, True), test_utils=("test_schema", "test_faketensor"))
