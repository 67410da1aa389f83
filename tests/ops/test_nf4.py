"""The compiled NF4 decoder against plain torch and against bitsandbytes' arithmetic, bit for bit, at every level."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch._subclasses import FakeTensorMode

from lilliput.ops import native
from lilliput.ops.float_codecs import NF4
from lilliput.ops.nf4 import DECODE, Nf4, reference, supports

pytestmark = pytest.mark.skipif(native.module() is None, reason=str(native.missing()))
LEVELS = native.levels()
SHAPES = [(1, 64), (3, 64), (7, 320), (64, 256), (100, 192), (257, 64 * 5), (576, 1536)]  # one block, odd blocks, a second level that ends early


def bytes_of(shape: tuple[int, int], double: bool, seed: int = 0) -> tuple[Nf4, torch.Tensor]:
    codec = Nf4(*shape, double)
    return codec, codec.encode(torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * torch.linspace(0.1, 3, shape[0])[:, None])


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("double", [True, False], ids=["double", "fp32 scales"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bitwise_the_reference(shape: tuple[int, int], double: bool, level: str) -> None:
    codec, stored = bytes_of(shape, double)
    with native.using(level):
        ours = codec.decode(stored)
    assert supports(stored) is None and ours.shape == shape
    assert torch.equal(ours.view(torch.int32), reference(stored, *shape, double).view(torch.int32))


@pytest.mark.parametrize("level", LEVELS)
def test_every_byte_by_the_definition(level: str) -> None:
    """All 256 bytes under scales that the second level makes, one of them below zero, in numpy's fp32."""
    codec = Nf4(64, 128)
    second, mean = np.array([0.03125], np.float32), np.float32(1.7)
    q = np.random.default_rng(0).integers(-127, 128, codec.blocks).astype(np.int8)
    q[0] = -127  # 1.7 - 3.97: clamped to zero
    numbers = np.tile(np.arange(256, dtype=np.uint8), 16)
    stored = torch.from_numpy(np.concatenate([second.view(np.uint8), np.frombuffer(mean.tobytes(), np.uint8), numbers, q.view(np.uint8)]))
    scales = np.maximum(q.astype(np.float32) * second[0] + mean, np.float32(0))
    levels = np.array(NF4, np.float32)[np.stack([numbers >> 4, numbers & 15], 1).reshape(codec.blocks, 64)]
    with native.using(level):
        ours = codec.decode(stored)
    assert scales[0] == 0 and np.array_equal(ours.numpy().reshape(-1, 64), levels * scales[:, None])


@pytest.mark.parametrize("level", LEVELS)
def test_the_same_bits_for_any_number_of_threads(level: str) -> None:
    codec, stored = bytes_of((512, 1024), True)
    with native.using(level):
        many = codec.decode(stored)
        native.threads(1)
        one = codec.decode(stored)
        native.threads(2)
    assert torch.equal(many, one)


@pytest.mark.parametrize("level", LEVELS)
def test_nan_scales_stay_nan(level: str) -> None:
    codec, stored = bytes_of((2, 64), True)
    stored[4:8] = torch.tensor([float("nan")]).view(torch.uint8)  # the mean
    with native.using(level):
        assert codec.decode(stored)[codec.decode(stored) != 0].isnan().all()


def test_reasons_and_what_is_done_instead() -> None:
    codec, stored = bytes_of((8, 64), True)
    shifted = torch.cat([torch.zeros(1, dtype=torch.uint8), stored])[1:]
    assert "no multiple of 4" in str(supports(shifted)) and "strided" in str(supports(torch.zeros(8, dtype=torch.uint8)[::2]))
    aligned = torch.cat([torch.zeros(4, dtype=torch.uint8), stored])[4:]
    assert supports(aligned) is None and torch.equal(codec.decode(aligned), codec.decode(stored))
    with pytest.raises(AssertionError, match="no 8 x 128 matrix"):
        DECODE(stored, 8, 128, True)


def test_a_citizen_of_torch() -> None:
    """On shapes alone, on meta, and under torch.compile's tracing it is one operation."""
    codec, stored = bytes_of((8, 64), True)
    with FakeTensorMode() as mode:
        fake = codec.decode(mode.from_tensor(stored))
    assert fake.shape == (8, 64) and fake.dtype == torch.float32
    assert codec.decode(stored.to("meta")).is_meta
    torch.library.opcheck(DECODE, (stored, 8, 64, True), test_utils=("test_schema", "test_faketensor"))


@pytest.mark.slow
def test_bitwise_bitsandbytes() -> None:
    """16.8M weights without the second level: numbers, scales and decoded weights. bitsandbytes is no dependency: put it on PYTHONPATH to run this."""
    functional = pytest.importorskip("bitsandbytes.functional")
    weight, codec = torch.randn(4096, 4096, generator=torch.Generator().manual_seed(2)), Nf4(4096, 4096, double=False)
    theirs, state = functional.quantize_4bit(weight, quant_type="nf4", blocksize=64, compress_statistics=False)
    ours = codec.encode(weight)
    scales, numbers, _ = ours.split(codec.sections)
    assert torch.equal(scales.view(torch.float32), state.absmax.flatten()) and torch.equal(numbers, theirs.flatten())
    assert torch.equal(codec.decode(ours), functional.dequantize_4bit(theirs, state))
