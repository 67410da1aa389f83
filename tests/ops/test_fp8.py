"""FP8 by its definition: the 256 codes of each format, rounding, ties, saturation, scales, products and gradients."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lilliput.ops import fp8, native
from lilliput.ops.fp8 import FORMATS, Coded, Scaling, encode, exponents, power, product

# format -> (exponent bits, mantissa bits, exponent bias); fn and fnuz have no infinity
SHAPE = {"e4m3fn": (4, 3, 7), "e4m3fnuz": (4, 3, 8), "e5m2": (5, 2, 15), "e5m2fnuz": (5, 2, 16)}
LARGEST = {"e4m3fn": 448.0, "e4m3fnuz": 240.0, "e5m2": 57344.0, "e5m2fnuz": 57344.0}


def value(format: str, code: int) -> float:
    """What a code stands for: Micikevicius et al. table 1; the fnuz formats have one NaN, 0x80, and no negative zero."""
    exponents, mantissas, bias = SHAPE[format]
    sign, e, m = code >> 7, code >> mantissas & (1 << exponents) - 1, code & (1 << mantissas) - 1
    if format.endswith("fnuz") and code == 0x80:
        return math.nan
    if format == "e4m3fn" and code & 0x7F == 0x7F:
        return math.nan
    if format == "e5m2" and e == 31:
        return math.nan if m else math.copysign(math.inf, -sign or 1)
    number = (m / 2**mantissas) * 2.0 ** (1 - bias) if e == 0 else (1 + m / 2**mantissas) * 2.0 ** (e - bias)
    return math.copysign(number, -1 if sign else 1)


def finite(format: str) -> list[tuple[int, float]]:
    """(code, value) of the finite codes from zero up."""
    return [(c, value(format, c)) for c in range(128) if math.isfinite(value(format, c))]


@pytest.mark.parametrize("format", FORMATS)
def test_all_codes_decode_to_the_published_values(format: str) -> None:
    codes = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(FORMATS[format])
    decoded = Coded(codes, torch.tensor(1.0)).decode()
    expected = torch.tensor([value(format, c) for c in range(256)])
    assert torch.equal(decoded.isnan(), expected.isnan())
    assert torch.equal(decoded[~expected.isnan()], expected[~expected.isnan()])
    whole = codes[~expected.isnan()][:250]
    assert torch.equal(fp8.widened(whole), whole.float()) and torch.equal(fp8.widened(whole.view(2, -1).t()), whole.view(2, -1).t().float())
    assert max(v for _, v in finite(format)) == LARGEST[format] == torch.finfo(FORMATS[format]).max


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("format", FORMATS)
def test_rounds_to_the_nearest_and_ties_to_even(format: str, sign: int) -> None:
    known = finite(format)
    for (low, a), (high, b) in itertools.pairwise(known):
        middle = (a + b) / 2
        x = torch.tensor([a, middle, b, math.nextafter(middle, a) if a else middle * 0.99, middle + (b - a) / 64]) * sign
        x = x.float()
        got = encode(x, format, bias=0).codes.view(torch.uint8).int() & 0x7F
        even = low if low % 2 == 0 else high
        near = low if float(x[3]) * sign < middle else even  # the neighbour may not exist in fp32
        assert got.tolist() == [low, even, high, near, high], f"between {a} and {b}"


@pytest.mark.parametrize("format", FORMATS)
def test_what_does_not_fit_saturates(format: str) -> None:
    largest = LARGEST[format]
    x = torch.tensor([largest * 1.0001, largest * 1.07, largest * 2, 3e38, -3e38])
    coded = encode(x, format, bias=0)
    assert coded.decode().tolist() == [largest] * 4 + [-largest]
    assert coded.unscale == 1


def test_the_casts_alone_do_not_do_it() -> None:
    """Why it is said and not left to torch: one format swallows infinities, the other makes them."""
    assert torch.tensor(math.inf).to(torch.float8_e4m3fn).float() == 448
    assert torch.tensor(61440.0).to(torch.float8_e5m2).float() == math.inf


@pytest.mark.parametrize("bias", [None, 0])
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_infinities_and_nan_are_not_hidden(format: str, bad: float, bias: int | None) -> None:
    coded = encode(torch.tensor([1.0, bad, 2.0]), format, bias)
    assert coded.unscale.isnan() and coded.decode().isnan().all()
    other = encode(torch.ones(3, 2), format)
    assert product(Coded(coded.codes[None], coded.unscale), other).isnan().all()


@pytest.mark.parametrize("format", FORMATS)
def test_zeros_and_subnormals(format: str) -> None:
    zero = encode(torch.tensor([0.0, -0.0]), format)
    assert zero.unscale == 1 and zero.decode().tolist() == [0, 0]
    tiny = torch.tensor([1e-45, -3e-42, 1e-40])
    coded = encode(tiny, format)
    assert coded.unscale == 2.0**-126 and coded.decode().isfinite().all(), "b stops at 126"
    small = torch.tensor([2.0**-126, 2.0**-130])
    assert encode(small, format).unscale.isfinite()


@pytest.mark.parametrize("format", FORMATS)
def test_the_bias_fills_the_format(format: str) -> None:
    """x 2^b lies in (max / 2, max] for 100,000 magnitudes over the whole range, and b is floor(log2(max / amax))."""
    generator = torch.Generator().manual_seed(0)
    top = torch.rand(100_000, generator=generator).add_(0.5) * 2.0 ** torch.randint(-100, 127, (100_000,), generator=generator)
    largest = LARGEST[format]
    b = exponents(top, largest)
    scaled = top.double() * 2.0 ** b.double()
    assert ((scaled > largest / 2) & (scaled <= largest)).all()
    assert torch.equal(power(b).double(), 2.0 ** b.double())
    exact = torch.tensor([largest, largest / 2, largest / 4])
    assert exponents(exact, largest).tolist() == [0, 1, 2]
    assert exponents(torch.nextafter(exact, torch.tensor(1e9)), largest).tolist() == [-1, 0, 1]


@pytest.mark.parametrize("format", FORMATS)
@given(seed=st.integers(0, 2**31), shift=st.integers(-60, 60), spread=st.floats(0.1, 4))
@settings(max_examples=40, deadline=None)
def test_a_power_of_two_leaves_the_codes_as_they_are(format: str, seed: int, shift: int, spread: float) -> None:
    x = torch.randn(257, generator=torch.Generator().manual_seed(seed)).mul_(spread).exp()
    x[::2] *= -1
    plain, scaled = encode(x, format), encode(x * 2.0**shift, format)
    assert torch.equal(plain.codes.view(torch.uint8), scaled.codes.view(torch.uint8))
    assert torch.equal(scaled.decode(), plain.decode() * 2.0**shift)


@pytest.mark.parametrize("format", FORMATS)
@given(seed=st.integers(0, 2**31))
@settings(max_examples=40, deadline=None)
def test_the_error_of_a_normal_number(format: str, seed: int) -> None:
    x = torch.randn(1000, generator=torch.Generator().manual_seed(seed))
    coded, bits = encode(x, format), SHAPE[format][1]
    normal = x.abs() / coded.unscale >= 2.0 ** (1 - SHAPE[format][2])
    assert normal.any() and ((coded.decode() - x).abs() <= x.abs() * 2.0 ** -(bits + 1))[normal].all()


def test_bf16_input_gives_the_same_codes() -> None:
    x = torch.randn(64, 64, generator=torch.Generator().manual_seed(3)).bfloat16()
    assert torch.equal(encode(x, "e4m3fn").codes.view(torch.uint8), encode(x.float(), "e4m3fn").codes.view(torch.uint8))


@pytest.mark.parametrize("kinds", [("e4m3fn", "e4m3fn"), ("e5m2", "e4m3fn")])
def test_decoded_products_are_those_of_scaled_mm(kinds: tuple[str, str]) -> None:
    """Bitwise, in all three layouts of a Linear."""
    generator = torch.Generator().manual_seed(1)
    a, b = torch.randn(48, 64, generator=generator), torch.randn(64, 32, generator=generator)
    for left, right in ((a, b), (a.t().contiguous().t(), b), (a, b.t().contiguous().t())):
        coded = encode(left, kinds[0]), encode(right, kinds[1])
        assert torch.equal(product(*coded, backend="decoded"), product(*coded, backend="scaled_mm"))
    assert fp8.choose(coded[0].codes, coded[1].codes) == ("decoded", "scaled_mm: no 8-bit float units on this device")


def reference(x: torch.Tensor, weight: torch.Tensor, grad: torch.Tensor, scaling: Scaling) -> tuple[torch.Tensor, ...]:
    """y, dX and dW from decoded operands."""
    r = lambda t, format: encode(t, format, scaling.bias).decode()
    x8, w8, g8 = r(x, scaling.forward), r(weight, scaling.forward), r(grad, scaling.backward)
    return x8 @ w8.t(), g8 @ w8, g8.flatten(0, 1).t() @ x8.flatten(0, 1)


@pytest.mark.parametrize("scaling", [Scaling(), Scaling(bias=4), Scaling("e4m3fnuz", "e5m2fnuz"), Scaling("e5m2", "e4m3fn")], ids=str)
@pytest.mark.parametrize("coded", [True, False], ids=["codes", "made anew"])
def test_forward_and_both_gradients(scaling: Scaling, coded: bool) -> None:
    generator = torch.Generator().manual_seed(2)
    draw = lambda *shape: torch.randn(shape, generator=generator)
    x, weight, bias, grad = draw(2, 5, 24).requires_grad_(), draw(40, 24).requires_grad_(), draw(40).requires_grad_(), draw(2, 5, 40)
    x8, w8 = (encode(t.detach(), scaling.forward, scaling.bias) for t in (x, weight))
    y = fp8.linear(x, weight, bias, x8, w8 if coded else None, scaling, None)
    y.backward(grad)
    expected = reference(x.detach(), weight.detach(), grad, scaling)
    assert torch.equal(y, expected[0] + bias) and torch.equal(x.grad, expected[1]) and torch.equal(weight.grad, expected[2])
    assert torch.equal(bias.grad, grad.flatten(0, 1).sum(0)), "the bias learns from the gradient as it is"


def test_a_weight_stored_as_bytes() -> None:
    """The codes are made from the decoded matrix; no gradient reaches it."""
    weight = torch.randn(16, 24, generator=torch.Generator().manual_seed(4)).half()
    x = torch.randn(3, 24, generator=torch.Generator().manual_seed(5)).requires_grad_()
    y = fp8.linear(x, weight.view(torch.uint8), None, encode(x.detach(), "e4m3fn"), None, Scaling(), lambda b: b.view(torch.float16).float())
    y.backward(torch.ones_like(y))
    expected = reference(x.detach()[None], weight.float(), torch.ones(1, 3, 16), Scaling())
    assert torch.equal(y, expected[0][0]) and torch.equal(x.grad, expected[1][0])


def kept(run, weight: torch.Tensor) -> int:
    """Bytes of what autograd saves, storages once, without the weight."""
    storages: dict[int, int] = {}

    def pack(t: torch.Tensor) -> torch.Tensor:
        if t.untyped_storage().data_ptr() != weight.data_ptr():
            storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        run()
    return sum(storages.values())


def test_one_byte_a_number_is_kept() -> None:
    x, weight = torch.randn(256, 128).requires_grad_(), torch.nn.Parameter(torch.randn(64, 128))
    inner = x + 1.0
    x8, w8 = encode(inner.detach(), "e4m3fn"), encode(weight.detach(), "e4m3fn")
    plain = kept(lambda: torch.nn.functional.linear(inner, weight), weight)
    eight = kept(lambda: fp8.linear(inner, weight, None, x8, w8, Scaling()), weight)
    assert plain == 4 * 256 * 128
    assert eight - w8.codes.nbytes - w8.unscale.nbytes == 256 * 128 + 4, "the codes of x and their scale"


@pytest.mark.parametrize("level", native.levels())
@pytest.mark.parametrize("width", [1, 7, 64, 129])
def test_the_compiled_rounding_of_rows(width: int, level: str) -> None:
    """Bit for bit what encode and decode make of each row, over 200 orders of two, ties, zeros, subnormals and infinities among them."""
    generator = torch.Generator().manual_seed(width)
    x = torch.randn(64, width, generator=generator) * 2.0 ** torch.randint(-12, 12, (64, width), generator=generator)
    x[:60] *= 2.0 ** torch.randint(-90, 90, (60, 1), generator=generator)
    x[60], x[61, 0], x[62], x[63, -1] = 0, math.inf, 1e-44, math.nan
    x[0] = torch.arange(width) / 16 + 0.03125  # ties of the binades above
    y = torch.empty_like(x)
    with native.using(level):
        native.module().round8(x.data_ptr(), y.data_ptr(), *x.shape)
    expected = torch.stack([encode(row, "e4m3fn").decode() for row in x])
    torch.testing.assert_close(y, expected, rtol=0, atol=0, equal_nan=True)
