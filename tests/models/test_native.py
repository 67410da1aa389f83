"""The lowered decoder against the eager one: every family, every storage, ranges of layers, the reduce hook."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from lilliput.base.errors import UserError
from lilliput.models.decoder import Decoder
from lilliput.models.load import native_refusal
from lilliput.models.native import NativeDecoder
from lilliput.models.spec import DecoderSpec, Rope
from lilliput.ops import float_codecs, native
from lilliput.ops.fp8 import encode
from lilliput.ops.paged import KvStore
from lilliput.ops.step import STEP, decoder_step

pytestmark = pytest.mark.skipif(native.module() is None, reason=str(native.missing()))
LEVELS = native.levels()
LLAMA = DecoderSpec("llama", vocab=131, dim=64, layers=3, heads=4, kv_heads=2, head_dim=16, ffn=96, context=128)
GPT2 = replace(LLAMA, family="gpt2", kv_heads=4, ffn=256, norm="layer", positions="learned", activation="gelu_tanh", qkv_bias=True, o_bias=True,
               mlp_bias=True, tied=True)  # fmt: skip
SPECS = {
    "llama": LLAMA,
    "llama tied, scaled": replace(LLAMA, tied=True, rope=Rope(kind="llama3", factor=8.0, original_context=32)),
    "mistral": replace(LLAMA, family="mistral", window=5),
    "qwen2": replace(LLAMA, family="qwen2", qkv_bias=True, tied=True, window=7, window_layers=(False, True, True)),
    "qwen3": replace(LLAMA, family="qwen3", qk_norm=True, head_dim=24),
    "gpt2": GPT2,
    "gpt2 exact gelu": replace(GPT2, activation="gelu"),
    "opt": replace(GPT2, family="opt", activation="relu"),
    "opt-350m": replace(GPT2, family="opt", activation="relu", norm_place="post", embed_dim=32),
}


def eager(spec: DecoderSpec) -> Decoder:
    model = Decoder(spec).eval()
    model.init_weights(7)
    with torch.no_grad():
        for parameter in model.parameters():  # norms and biases away from 1 and 0, matrices large enough to matter
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel())) * 0.05)
    return model


def lowered(model: Decoder, weights: str = "fp32") -> NativeDecoder:
    return NativeDecoder(model.spec, lambda name: model.get_parameter(name).detach(), weights=weights)  # type: ignore[arg-type]


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", SPECS)
def test_logits_equal_the_eager_model(name: str, level: str) -> None:
    model = eager(SPECS[name])
    tokens = torch.randint(0, 131, (2, 23), generator=torch.Generator().manual_seed(0))
    with native.using(level), torch.inference_mode():
        torch.testing.assert_close(lowered(model)(tokens), model(tokens), atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize(("weights", "bound"), [("fp16", 2e-3), ("w8", 0.05), ("fp8", 0.12), ("fp8_rows", 0.15), ("q4", 0.35), ("nf4", 0.3)])
def test_storages_stay_near(weights: str, bound: float) -> None:
    """Relative error of the logits; each is also smaller in memory than the one before it allows."""
    model = eager(LLAMA)
    tokens = torch.arange(20)[None]
    with torch.inference_mode():
        want, small = model(tokens), lowered(model, weights)
        assert float((small(tokens) - want).norm() / want.norm()) < bound
    assert small.bytes < {"fp16": 0.51, "w8": 0.31, "fp8": 0.36, "fp8_rows": 0.36, "q4": 0.16, "nf4": 0.27}[weights] * lowered(model).bytes * 1.3


@pytest.mark.parametrize("level", LEVELS)
def test_rows_in_fp8(level: str) -> None:
    """The eager model with rounded rows times decoded weights; a row's result is its own, whatever stands beside it."""
    model = eager(LLAMA)
    small = lowered(model, "fp8_rows")
    tokens = torch.arange(20)[None]
    for name, linear in model.named_modules():
        if name.endswith("_proj"):
            linear.product = lambda x, w, b, _: torch.nn.functional.linear(
                torch.stack([encode(row, "e4m3fn").decode() for row in x.flatten(0, -2)]).view_as(x), float_codecs.decode(float_codecs.encode(w, "e4m3")), b
            )
        elif name == "head":
            linear.weight.data = float_codecs.decode(float_codecs.encode(linear.weight, "e4m3"))
        elif name == "embed":
            linear.weight.data = linear.weight.half().float()
    with native.using(level), torch.inference_mode():
        got, plain = small(tokens), lowered(eager(LLAMA), "fp8")(tokens)
        apart, alone = (float((got - other).norm() / got.norm()) for other in (model(tokens), plain))
        assert apart < 0.6 * alone < 0.06, f"a number near a tie may fall to either side: {apart} from the same rounding, {alone} from weights alone"
        assert torch.equal(small(torch.cat([tokens, tokens.flip(1) * 5])[:, :20])[0], got[0])


def test_a_step_is_a_citizen_of_torch() -> None:
    """opcheck from tokens, and from hidden states that are written in place; the op is what `decoder_step` runs; shapes alone; one compiled graph."""
    model = lowered(eager(LLAMA))
    step, tokens, batch = whole_step(model, list(range(9)))
    names = "positions_R", "cu_q", "lengths", "tables", "sampled_N"
    rest = *(batch[name] for name in names), 0, 3
    for start, hidden, mass in ((tokens, torch.empty(9, 64), None), (None, torch.randn(9, 64), torch.zeros(3, 1, 2, 9))):
        torch.library.opcheck(STEP, (model.plan.handle, start, hidden, *rest, mass))
    hidden = torch.randn(9, 64)
    want_hidden, want = step(model.plan, None, hidden.clone(), **batch)
    run = torch.compile(lambda x: (x := x + 0, STEP(model.plan.handle, None, x, *rest)), backend="aot_eager", fullgraph=True)
    got_hidden, got = run(hidden)
    assert torch.equal(got_hidden, want_hidden) and torch.equal(got, want) and not torch.equal(hidden, want_hidden)
    with FakeTensorMode() as mode:
        fake = {name: mode.from_tensor(batch[name]) for name in names}
        assert step(model.plan, None, mode.from_tensor(hidden), **fake)[1].shape == want.shape


def test_a_model_compiles_into_one_graph_as_citizen() -> None:
    """The eager decoder with our attention and norms, forward and backward: the numbers of the plain one, bit for bit."""
    model, tokens = eager(LLAMA).train(), torch.randint(0, 131, (2, 23), generator=torch.Generator().manual_seed(0))
    gradients = []
    for run in (model, torch.compile(model, backend="aot_eager", fullgraph=True)):
        loss = run(tokens).square().mean()
        gradients.append((loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))))
    assert all(torch.equal(a, b) for a, b in zip(*gradients)) and all(float(g.abs().sum()) > 0 for g in gradients[0])


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("kv", ["fp32", "int8"])
def test_keys_before_rope_give_the_same_logits(kv: str, level: str) -> None:
    """fp32: up to rounding; int8: within what the codec does, and not what rotated keys give (so they did lie otherwise)."""
    model = eager(LLAMA)
    tokens = torch.randint(0, 131, (2, 23), generator=torch.Generator().manual_seed(0))
    read = lambda name: model.get_parameter(name).detach()
    with native.using(level), torch.inference_mode():
        rotated, before = (NativeDecoder(model.spec, read, weights="fp32", kv=kv, rotate_on_read=on_read)(tokens) for on_read in (False, True))
        bound = 2e-4 if kv == "fp32" else 0.1
        torch.testing.assert_close(before, model(tokens), atol=bound, rtol=bound)
        assert kv == "fp32" or not torch.equal(before, rotated)


def test_mass_of_each_layer_comes_out_of_the_step() -> None:
    """Every query's probabilities sum to 1: 4 heads, 9 queries; the logits are bit for bit those without."""
    model = lowered(eager(LLAMA))
    step, tokens, batch = whole_step(model, list(range(9)))
    _, want = step(model.plan, tokens, None, **batch)
    mass = torch.zeros(3, 1, 2, 12)
    _, got = step(model.plan, tokens, None, mass=mass, **batch)
    assert torch.equal(got, want)
    torch.testing.assert_close(mass.sum((1, 2, 3)), torch.full((3,), 4.0 * 9))
    assert (mass[..., 9:] == 0).all() and (mass[..., :9] > 0).all() and not torch.allclose(mass[0], mass[1])
    with pytest.raises(AssertionError, match="room for fewer keys"):
        step(model.plan, tokens, None, mass=torch.zeros(3, 1, 2, 8), **batch)


def test_sinks_stay_in_sight_of_a_window() -> None:
    """Window 4 with 2 sinks sees all of 6 tokens, and of 8 neither all nor the window alone."""
    model = eager(LLAMA)
    read = lambda name: model.get_parameter(name).detach()
    full, window, sinks = (NativeDecoder(spec, read, sinks=n) for spec, n in ((LLAMA, 0), (replace(LLAMA, window=4), 0), (replace(LLAMA, window=4), 2)))
    tokens = torch.arange(8)[None]
    with torch.inference_mode():
        assert torch.equal(sinks(tokens[:, :6]), full(tokens[:, :6])) and not torch.equal(window(tokens[:, :6]), full(tokens[:, :6]))
        last = [m(tokens)[0, -1] for m in (full, window, sinks)]
    assert not torch.allclose(last[2], last[0], atol=1e-3) and not torch.allclose(last[2], last[1], atol=1e-3)


def whole_step(model: NativeDecoder, tokens: list[int], **how):
    store = KvStore(layers=model.spec.layers, blocks=4, kv_heads=model.spec.kv_heads, head_dim=model.spec.head_dim)
    model.plan.cache(store)
    count = len(tokens)
    int32 = lambda numbers: torch.tensor(numbers, dtype=torch.int32)
    batch = {"positions_R": torch.arange(count, dtype=torch.int32), "cu_q": int32([0, count]), "lengths": int32([count]), "tables": int32([[2, 0, 1, 3]]),
             "sampled_N": int32([count - 1])}  # fmt: skip
    return decoder_step, int32(tokens), batch | how


def test_the_clock_adds_up_regions_and_changes_nothing() -> None:
    model = lowered(eager(LLAMA))
    step, tokens, batch = whole_step(model, list(range(20)))
    _, want = step(model.plan, tokens, None, **batch)
    seconds = model.plan.clock()
    _, got = step(model.plan, tokens, None, **batch)
    once = seconds.clone()
    step(model.plan, tokens, None, **batch)
    assert torch.equal(got, want) and (once[:6] > 0).all() and (once[6:] == 0).all() and (seconds[:6] > once[:6]).all()


def test_layers_in_ranges_are_the_whole() -> None:
    """[0, 1) then [1, 3), hidden states between: bit-equal to one call. What pipelines and streaming do."""
    model = lowered(eager(LLAMA))
    step, tokens, batch = whole_step(model, list(range(20)))
    _, want = step(model.plan, tokens, None, **batch)
    hidden, _ = step(model.plan, tokens, None, layers=(0, 1), **batch)
    _, got = step(model.plan, None, hidden, layers=(1, 3), **batch)
    assert torch.equal(got, want)


def test_reduce_sees_every_partial_sum() -> None:
    """Halving partial sums twice over, as two ranks with equal parts would: called after O and after down of each layer, and in place."""
    model = lowered(eager(LLAMA))
    step, tokens, batch = whole_step(model, list(range(9)))
    _, want = step(model.plan, tokens, None, **batch)
    calls = []

    def reduce(partial: torch.Tensor) -> None:
        calls.append(partial.numel())
        partial.mul_(0.5)
        partial.mul_(2)

    _, got = step(model.plan, tokens, None, reduce=reduce, **batch)
    assert calls == [9 * 64] * 6 and torch.allclose(got, want, atol=1e-5)
    _, other = step(model.plan, tokens, None, reduce=lambda partial: partial.zero_(), **batch)
    assert not torch.allclose(other, want, atol=1e-2)


def test_an_exception_in_reduce_comes_through() -> None:
    model = lowered(eager(LLAMA))
    step, tokens, batch = whole_step(model, [1, 2])

    def broken(partial: torch.Tensor) -> None:
        raise RuntimeError("the link is down")

    with pytest.raises(RuntimeError, match="the link is down"):
        step(model.plan, tokens, None, reduce=broken, **batch)


def test_refusals() -> None:
    assert native_refusal(LLAMA, "cpu") is None
    assert "CPUs" in str(native_refusal(LLAMA, "cuda:0"))
    assert "300" in str(native_refusal(replace(LLAMA, head_dim=300), "cpu"))
    with pytest.raises(UserError, match="unknown storage `int3`"):
        lowered(eager(LLAMA), "int3")
    with pytest.raises(UserError, match="cannot be stored as q4"):
        lowered(eager(replace(LLAMA, dim=40)), "q4")
