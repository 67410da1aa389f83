"""Saved activations in fewer bits: the bytes that the plan counts, the rounding that the format allows, and nothing hidden by it."""

from __future__ import annotations

import pytest
import torch
from nets import gpt, metered, run, traced
from torch import nn

from lilliput.base.errors import UserError
from lilliput.memory.capture import capture
from lilliput.memory.codecs import PIECE, decode, encode, speed
from lilliput.memory.lower import lower
from lilliput.memory.plan import FP8_BLOCK, Decision, stored_bytes
from lilliput.memory.planners.chain import chain
from lilliput.memory.planners.coded import coded
from lilliput.memory.simulate import Rates, simulate
from lilliput.ops.float_codecs import NF4

CODECS = ("bf16", "fp8", "nf4")


def by_definition(x: torch.Tensor, codec: str) -> torch.Tensor:
    if codec == "bf16":
        return x.bfloat16().float()
    block = FP8_BLOCK if codec == "fp8" else 64
    rows = torch.nn.functional.pad(x, (0, -len(x) % block)).view(-1, block)
    top = rows.abs().amax(1, keepdim=True)
    if codec == "fp8":
        scale = (top / 448).clamp(min=torch.finfo(torch.float32).tiny)
        return ((rows / scale).to(torch.float8_e4m3fn).float() * scale).flatten()[: len(x)]
    levels = torch.tensor(NF4)
    nearest = (rows[..., None] / top.clamp(min=1e-38)[..., None] - levels).abs().argmin(-1)
    return (levels[nearest] * top).flatten()[: len(x)]


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("count", [1, 63, 64, 255, 256, 1000, PIECE - 1, PIECE, PIECE + 321])
def test_bytes_and_numbers_are_those_of_the_format(codec: str, count: int) -> None:
    x = torch.randn(count, generator=torch.Generator().manual_seed(count)) * torch.logspace(-3, 3, count)
    stored = encode(x, codec)
    assert stored.nbytes == stored_bytes(codec, x.nbytes) and stored.dtype == torch.uint8
    torch.testing.assert_close(decode(stored, count, codec), by_definition(x, codec), rtol=1e-6, atol=0)


@pytest.mark.parametrize("codec", CODECS)
def test_zeros_stay_and_what_is_no_number_stays_none(codec: str) -> None:
    x = torch.zeros(1024)
    assert torch.equal(decode(encode(x, codec), 1024, codec), x)
    for bad in (torch.nan, torch.inf):
        x[300] = bad
        found = decode(encode(x, codec), 1024, codec)
        assert not torch.isfinite(found[300]) and torch.equal(found[512:], x[512:]), "its own block only"


def test_the_ops_have_shapes_without_numbers() -> None:
    for codec in CODECS:
        x = torch.randn(1000)
        torch.library.opcheck(torch.ops.lilliput.stored_encode.default, (x, codec))
        torch.library.opcheck(torch.ops.lilliput.stored_decode.default, (encode(x, codec), 1000, codec))


@pytest.mark.parametrize("codec", CODECS)
def test_a_model_whose_activations_are_coded_is_counted_to_the_byte(codec: str) -> None:
    net = gpt(dropout=0.1)
    trace, funcs = traced(net)
    whole, plain = chain(trace), run(net)
    plan = coded(whole, codec, len(whole))  # type: ignore[arg-type]
    assert plan and all(trace.storages[s].dtype == "float32" for s in plan)
    simulated, meter, outcome = metered(net, lower(trace, plan), funcs)
    assert simulated.peak["device"] == meter.peak < simulate(lower(trace, {})).peak["device"]
    assert torch.equal(outcome[0], plain[0]), "the forward pass computes with what it made"
    flat = lambda found: torch.cat([g.flatten() for g in found[1].values()])
    apart = (flat(outcome) - flat(plain)).norm() / flat(plain).norm()
    assert 0 < apart < {"bf16": 0.01, "fp8": 0.1, "nf4": 0.4}[codec]


def test_coding_takes_time_on_the_device() -> None:
    trace, _ = traced(gpt())
    whole = chain(trace)
    link = speed("fp8")
    assert 1e6 < link.write < 1e12 and 1e6 < link.read < 1e12
    plan = coded(whole, "fp8", len(whole))
    count = sum(stored_bytes("fp8", trace.storages[s].bytes) for s in plan)
    assert simulate(lower(trace, plan), Rates({"device": link})).seconds == pytest.approx(count / link.write + count / link.read, rel=1e-6)


def test_what_cannot_be_coded_is_refused() -> None:
    step = lambda model, x: torch.where((y := model(x)) > 0, y.exp(), y).sum()
    trace, _ = capture(nn.Linear(4, 4), step, [torch.randn(2, 4)])
    mask = next(s for s in trace.saved() if s.dtype == "bool")
    with pytest.raises(UserError, match="cannot lie in fp8"):
        lower(trace, {mask.index: Decision(codec="fp8")})
    number = next(s for s in trace.saved() if s.dtype == "float32")
    with pytest.raises(UserError, match="cannot be paged in nf4"):
        lower(trace, {number.index: Decision("page", "host", "nf4")})
