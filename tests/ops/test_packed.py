"""Packed products: every format and number of rows against plain torch, exactness of the integers, bit-equality, lossless imports."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, quants
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from lilliput.base.errors import UserError
from lilliput.ops import codecs, float_codecs, native, packed
from lilliput.ops.panels import PackedWeight

needs_native = pytest.mark.skipif(native.module() is None, reason=str(native.missing()))
LEVELS = native.levels()
SHAPES = [(0, 16, 32), (1, 16, 32), (1, 33, 64), (2, 40, 96), (3, 100, 64), (5, 49, 128), (17, 70, 576), (100, 130, 96), (130, 17, 288), (7, 5, 256)]
FORMATS = ["w8", "w8 g32", "q4", "q4 mins", "q4 zeros", "f32", "f16", "nf4", "e4m3", "e5m2"]


def make(weight: torch.Tensor, name: str) -> PackedWeight:
    if name.startswith("w8"):
        return codecs.quantize_w8(weight, 32 if "g32" in name else 0)
    if name == "q4 zeros":
        n = codecs.numbers(codecs.quantize_q4(weight, 32))
        shape = weight.shape[0], weight.shape[1] // 32
        return codecs.pack_q4(n, torch.rand(shape), 32, "zeros", torch.randint(0, 17, shape).float())
    if name.startswith("q4"):
        return codecs.quantize_q4(weight, 32, "mins" if "mins" in name else "symmetric")
    return float_codecs.encode(weight, name, 32)


def ways(weight: PackedWeight) -> list[str]:
    return ["int8", "fp32"] if weight.format in ("w8", "q4") else ["fp32"]


@needs_native
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", FORMATS)
def test_equals_reference_for_every_number_of_rows(name: str, level: str) -> None:
    torch.manual_seed(0)
    with native.using(level):
        for rows, outputs, inputs in SHAPES:
            weight, x, bias = make(torch.randn(outputs, inputs), name), torch.randn(rows, inputs) * 10, torch.randn(outputs)
            for way in ways(weight):
                got, want = packed.linear(x, weight, bias, activations=way), packed.reference(x.double().float(), weight, bias, way == "int8")
                torch.testing.assert_close(got, want, atol=3e-6 * float(want.abs().max() if rows else 1), rtol=1e-5)
                added = packed.linear(x, weight, bias, activations=way, add_to=torch.ones(rows, outputs))
                assert torch.equal(added, 1 + got)


@needs_native
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", FORMATS)
def test_a_row_does_not_depend_on_its_company(name: str, level: str) -> None:
    """Bit-equal alone, in batches of 2 to 130, on 1, 2, 3 and 20 threads."""
    torch.manual_seed(1)
    with native.using(level):
        weight, x = make(torch.randn(70, 160), name), torch.randn(130, 160)
        for way in ways(weight):
            whole = packed.linear(x, weight, activations=way)
            for rows in (1, 2, 3, 4, 5, 6, 7, 9, 97):
                assert torch.equal(packed.linear(x[3 : 3 + rows], weight, activations=way), whole[3 : 3 + rows]), f"{rows} rows, {way}"
            for threads in (1, 3, 20):  # 20: more than there are shares (csrc/pool.h)
                native.threads(threads)
                other = packed.linear(x, weight, activations=way)
                native.threads(2)
                assert torch.equal(other, whole), f"{threads} threads"


@needs_native
def test_levels_agree_on_integers() -> None:
    torch.manual_seed(2)
    for name in ("w8", "q4", "q4 mins"):
        weight, x = make(torch.randn(48, 128), name), torch.randn(9, 128)
        results = []
        for level in LEVELS[1:]:
            with native.using(level):
                results.append(packed.linear(x, weight, activations="int8"))
        assert all(torch.equal(results[0], other) for other in results[1:])


@needs_native
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("inputs", [32, 100, 576, 4096])
def test_sums_are_exact_at_the_extremes(inputs: int, level: str) -> None:
    """All weights at -128 and 127, rows at +-127 (nibbles at 0 and 15): int32 sums against numpy's int64. Where vpmaddubsw would saturate."""
    generator = np.random.default_rng(inputs)
    with native.using(level):
        for signs in ("same", "mixed"):
            q = np.full((16, inputs), -128, np.int64) if signs == "same" else generator.choice([-128, 127], (16, inputs))
            x = np.full((3, inputs), -127, np.int64) if signs == "same" else generator.choice([-127, 127], (3, inputs))
            weight = codecs.pack_w8(torch.from_numpy(q).to(torch.int8), torch.ones(16, 1), 0)
            got = packed.linear(torch.from_numpy(x).float(), weight, activations="int8")  # scale 127 / 127 = 1
            want = (x @ q.T).astype(np.float32)
            assert np.array_equal(got.numpy(), want)
            if inputs % 32:
                continue
            n = np.full((16, inputs), 15, np.int64) if signs == "same" else generator.choice([0, 15], (16, inputs))
            nibbles = codecs.pack_q4(torch.from_numpy(n).to(torch.uint8), torch.ones(16, inputs // 32), 32, "symmetric")
            assert np.array_equal(packed.linear(torch.from_numpy(x).float(), nibbles, activations="int8").numpy(), (x @ (n - 8).T).astype(np.float32))


@needs_native
@pytest.mark.parametrize("level", LEVELS)
def test_rows_that_are_not_finite_spoil_only_themselves(level: str) -> None:
    with native.using(level):
        for name in ("w8", "q4 mins"):
            weight, x = make(torch.randn(20, 64), name), torch.randn(4, 64)
            x[1, 5], x[2, 63] = float("nan"), float("inf")
            y = packed.linear(x, weight)
            assert y[[0, 3]].isfinite().all() and y[1].isnan().all() and y[2].isnan().all()
            assert torch.equal(packed.linear(torch.zeros(1, 64), make(torch.randn(20, 64), "w8")), torch.zeros(1, 20))


@needs_native
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", ["w8", "w8 g32", "q4", "q4 mins"])
def test_static_scales_are_the_same_for_every_row_and_saturate(name: str, level: str) -> None:
    torch.manual_seed(4)
    weight, x = make(torch.randn(40, 96), name), torch.randn(9, 96)
    static = torch.rand(weight.groups) * 0.02 + 0.01  # 127 of them: 1.3 to 3.8, so some numbers saturate
    assert (x.unflatten(-1, (weight.groups, -1)).abs() > 127 * static[:, None]).any()
    q, scales, sums = packed.quantize_rows(x, weight.group, static)
    assert q.abs().max() == 127 and (scales == static).all() and torch.equal(sums, q.unflatten(-1, (weight.groups, -1)).sum(-1, dtype=torch.int32))
    with native.using(level):
        got = packed.linear(x, weight, static_G=static)
        torch.testing.assert_close(got, packed.reference(x, weight, None, True, static), atol=1e-4, rtol=1e-5)
        assert torch.equal(packed.linear(x[4:5], weight, static_G=static), got[4:5])
    own = packed.quantize_rows(x, weight.group)[1]
    torch.testing.assert_close(packed.linear(x[:1], weight, static_G=own[0].clone()), packed.linear(x[:1], weight), atol=1e-5, rtol=1e-5)


@needs_native
def test_outliers_stay_in_their_row_and_group() -> None:
    """One row 3,000 times the others, one number 3,000 times its row: scales are a row's (w8) or a group's (q4)."""
    torch.manual_seed(3)
    weight = torch.randn(32, 128)
    x = torch.randn(8, 128)
    x[0] *= 3000
    error = lambda name, x: ((packed.linear(x, make(weight, name)) - x @ codecs.decode(make(weight, name)).t()).norm(dim=1) / (x @ weight.t()).norm(dim=1))
    assert float(error("w8", x).max()) < 0.02
    x[1, 7] = 3000.0
    others = x[1].clone()
    others[7] = 0
    assert float(error("q4", others[None]).max()) < 0.02


def test_gguf_blocks_bit_for_bit() -> None:
    """The gguf package's own quantiser and dequantiser as the oracle; an import and a decode give its numbers exactly."""
    weight = np.random.default_rng(0).standard_normal((24, 96)).astype(np.float32)
    for kind in ("Q4_0", "Q4_1", "Q8_0"):
        number = GGMLQuantizationType[kind]
        blocks = quants.quantize(weight, number)
        assert np.array_equal(codecs.decode(codecs.from_gguf(kind, blocks)).numpy(), quants.dequantize(blocks, number))


def test_rounding_is_within_half_a_step() -> None:
    torch.manual_seed(4)
    weight = torch.randn(20, 128)
    step = weight.abs().amax(1, keepdim=True) / 127
    assert ((codecs.decode(codecs.quantize_w8(weight)) - weight).abs() <= step / 2 + 1e-6).all()
    mins = codecs.quantize_q4(weight, 32, "mins")
    grouped = weight.unflatten(1, (-1, 32))
    half = ((grouped.amax(-1) - grouped.amin(-1)) / 30)[..., None]
    assert ((codecs.decode(mins).unflatten(1, (-1, 32)) - grouped).abs() <= half * 1.01 + 2e-3).all()
    nf4 = float_codecs.decode(float_codecs.encode(weight, "nf4", 32)).unflatten(1, (-1, 32))
    widest = max(b - a for a, b in zip(float_codecs.NF4, float_codecs.NF4[1:])) / 2
    assert ((nf4 - grouped).abs() <= widest * 1.01 * grouped.abs().amax(-1, keepdim=True)).all()


def test_fp8_is_torchs() -> None:
    """Every finite byte of both formats decodes as torch's own dtypes do."""
    for name, kind in float_codecs.FP8.items():
        byte = torch.arange(256, dtype=torch.uint8)
        value = byte.view(kind).float()
        kept = byte[value.isfinite()]
        weight = PackedWeight(name, 16, len(kept), 0, "symmetric", kept[None, :, None].expand(1, -1, 16).contiguous(), torch.ones(1, 1, 16))
        assert torch.equal(float_codecs.decode(weight)[3], kept.view(kind).float())
        if native.module():
            assert torch.equal(packed.linear(torch.eye(len(kept)), weight)[:, 5], kept.view(kind).float())


@pytest.mark.parametrize("group", [128, 48, 7])
def test_a_group_that_does_not_divide(group: int) -> None:
    with pytest.raises(UserError) as caught:
        codecs.quantize_q4(torch.randn(16, 576), group)
    assert "32, 64" in str(caught.value.why) and caught.value.fix == "group=64"


@needs_native
def test_the_op_is_a_good_torch_citizen() -> None:
    weight = codecs.quantize_q4(torch.randn(20, 64), 32)
    arguments = torch.randn(3, 64), weight.data, weight.scales, None, 3, 20, 32, 0, None, True, None
    torch.library.opcheck(packed.LINEAR, arguments, test_utils=("test_schema", "test_faketensor"))


@needs_native
def test_only_a_watched_product_goes_through_the_dispatcher() -> None:
    """Modes, tensors of a class of their own, gradients and torch.compile's tracer see the op; nobody else pays for it. The numbers are the same."""
    weight, x = make(torch.randn(20, 64), "q4"), torch.randn(3, 64)
    seen: list[str] = []

    class Watching(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    plain = packed.linear(x, weight)
    with Watching():
        watched = packed.linear(x, weight)
    assert "lilliput.linear_packed.default" in seen and torch.equal(plain, watched)
    with FakeTensorMode() as mode:
        assert packed.linear(mode.from_tensor(x), weight_of(weight, mode.from_tensor)).shape == (3, 20)
    assert not native.watched(x) and native.watched(torch.nn.Parameter(x)) and native.watched(x.clone().requires_grad_())
    with torch.no_grad():
        assert not native.watched(x.clone().requires_grad_())


def weight_of(weight: PackedWeight, turn: Callable[[torch.Tensor], torch.Tensor]) -> PackedWeight:
    return replace(weight, **{name: turn(part) for name in ("data", "scales", "offsets") if (part := getattr(weight, name)) is not None})
