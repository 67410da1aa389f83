"""The decoder's seams: cache hook, deltas, recomputed blocks, dropout, storage in bf16, and weights keyed by name. Numbers: test_families.py."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lilliput.base.errors import UserError
from lilliput.memory.capture import capture
from lilliput.memory.execute import Executor
from lilliput.memory.lower import lower
from lilliput.memory.planners.chain import chain, entries
from lilliput.memory.planners.sqrt import segments
from lilliput.models.decoder import Decoder, init_tensor
from lilliput.models.layers import Linear
from lilliput.models.spec import DecoderSpec, Rope
from lilliput.ops.attention import attend

LLAMA = DecoderSpec("llama", vocab=61, dim=32, layers=3, heads=4, kv_heads=2, head_dim=8, ffn=48, context=64)
GPT2 = replace(LLAMA, family="gpt2", kv_heads=4, norm="layer", positions="learned", activation="gelu_tanh", qkv_bias=True, o_bias=True,
               mlp_bias=True, tied=True)
SPECS = {
    "llama": LLAMA,
    "mistral": replace(LLAMA, family="mistral", window=7),
    "qwen2": replace(LLAMA, family="qwen2", qkv_bias=True, tied=True, window=7, window_layers=(False, True, True)),
    "qwen3": replace(LLAMA, family="qwen3", qk_norm=True, head_dim=12, rope=Rope(1e4, "yarn", 4.0, 16, attention_factor=1.1)),
    "gpt2": GPT2,
    "opt": replace(GPT2, family="opt", activation="relu"),
    "opt-350m": replace(GPT2, family="opt", activation="relu", norm_place="post", embed_dim=16),
}


def built(spec: DecoderSpec, scale: float = 8.0) -> Decoder:
    """A model whose logits are of order 1."""
    model = Decoder(spec)
    model.init_weights(seed=0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2:
                parameter.mul_(scale)
            elif name.endswith("bias"):
                parameter.uniform_(-0.1, 0.1, generator=torch.Generator().manual_seed(1))
    return model


def tokens(batch: int = 2, length: int = 20) -> Tensor:
    return torch.randint(0, 61, (batch, length), generator=torch.Generator().manual_seed(3))


def loss_of(model: Decoder, tokens_BT: Tensor) -> Tensor:
    return F.cross_entropy(model(tokens_BT)[:, :-1].flatten(0, 1), tokens_BT[:, 1:].flatten())


class Cache:
    """The smallest cache there is: all keys and values so far, layer by layer."""

    def __init__(self) -> None:
        self.keys: dict[int, Tensor] = {}
        self.values: dict[int, Tensor] = {}

    def __call__(self, layer: int, q_BHTD: Tensor, k_BGTD: Tensor, v_BGTD: Tensor, window: int | None) -> Tensor:
        self.keys[layer] = torch.cat([self.keys[layer], k_BGTD], 2) if layer in self.keys else k_BGTD
        self.values[layer] = torch.cat([self.values[layer], v_BGTD], 2) if layer in self.values else v_BGTD
        return attend(q_BHTD, self.keys[layer], self.values[layer], causal=True, window=window)


@pytest.mark.parametrize("family", SPECS)
@pytest.mark.parametrize("chunks", [[20], [1] * 20, [9, 1, 7, 3]], ids=str)
def test_a_cache_gives_the_full_forward(family: str, chunks: list[int], device: str) -> None:
    model, tokens_BT, cache = built(SPECS[family]).eval().to(device), tokens().to(device), Cache()
    with torch.inference_mode():
        full, at, parts = model(tokens_BT), 0, []
        for size in chunks:
            positions = torch.arange(at, at + size, device=device).unsqueeze(0)
            parts.append(model(tokens_BT[:, at : at + size], positions, cache))
            at += size
    assert full.std() > 0.2
    torch.testing.assert_close(torch.cat(parts, 1), full, atol=2e-5, rtol=0)


@pytest.mark.parametrize("family", SPECS)
def test_gradients_are_finite_and_reach_everything(family: str, device: str) -> None:
    model = built(SPECS[family]).to(device)
    loss_of(model, tokens().to(device)).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        if not name.endswith("k_proj.bias"):  # adds the same to all scores of a query: softmax does not see it without RoPE
            assert parameter.grad.abs().max() > 1e-8, name


@pytest.mark.parametrize("family", ["llama", "qwen2", "opt-350m"])
def test_gradients_are_the_slope(family: str) -> None:
    model = built(SPECS[family]).double()
    generator = torch.Generator().manual_seed(5)
    way = {name: torch.randn(p.shape, generator=generator, dtype=torch.float64) for name, p in model.named_parameters()}
    hidden = lambda: model.hidden(tokens(1, 12)).square().sum()
    hidden().backward()
    slope = sum((p.grad * way[name]).sum() for name, p in model.named_parameters() if p.grad is not None)

    @torch.no_grad()
    def moved(by: float) -> Tensor:
        for name, p in model.named_parameters():
            p.add_(way[name], alpha=by)
        value = hidden()
        for name, p in model.named_parameters():
            p.sub_(way[name], alpha=by)
        return value

    torch.testing.assert_close((moved(1e-6) - moved(-1e-6)) / 2e-6, slope, rtol=1e-4, atol=1e-4)


def test_packed_rows_with_their_own_positions_are_alone() -> None:
    """What the serving runner does: two sequences in one row, kept apart by its attend."""
    model = built(LLAMA).eval()
    one, two = tokens(1, 6), tokens(2, 9)[1:]

    def apart(layer: int, q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
        return torch.cat([attend(q[:, :, rows], k[:, :, rows], v[:, :, rows], causal=True) for rows in (slice(0, 6), slice(6, 15))], 2)

    with torch.no_grad():
        packed = model(torch.cat([one, two], 1), torch.cat([torch.arange(6), torch.arange(9)]).unsqueeze(0), apart)
        torch.testing.assert_close(packed, torch.cat([model(one), model(two)], 1), atol=1e-5, rtol=0)


def test_inputs_take_the_place_of_tokens() -> None:
    model = built(SPECS["opt-350m"]).eval()
    with torch.no_grad():
        torch.testing.assert_close(model.hidden(None, inputs_BTC=model.embed(tokens())), model.hidden(tokens()))


def test_too_many_tokens_for_learned_positions() -> None:
    model = built(GPT2)
    with pytest.raises(UserError, match="65 tokens") as raised:
        model(tokens(1, 65))
    assert "64" in raised.value.why


class Scaled(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.A = nn.Parameter(torch.full((outputs, inputs), 0.01))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.A.t()


def test_deltas_add_and_names_stay() -> None:
    model = built(LLAMA).eval()
    names = list(model.state_dict())
    with torch.no_grad():
        before = model(tokens())
        for linear in [m for m in model.modules() if isinstance(m, Linear)]:
            linear.deltas["mine"] = Scaled(linear.inputs, linear.outputs)
        after = model(tokens())
        assert (after - before).abs().max() > 1e-3
        assert [name for name in model.state_dict() if ".deltas." not in name] == names
        assert "layers.0.attn.q_proj.deltas.mine.A" in model.state_dict()
        for linear in [m for m in model.modules() if isinstance(m, Linear)]:
            linear.weight.add_(linear.deltas["mine"].A)
            del linear.deltas["mine"]
        torch.testing.assert_close(model(tokens()), after, atol=1e-4, rtol=0)


@pytest.mark.parametrize("tied", [True, False])
def test_tying_survives_whatever_replaces_the_embedding(tied: bool) -> None:
    with torch.device("meta"):
        model = Decoder(replace(LLAMA, tied=tied))
    model.embed.weight = nn.Parameter(torch.randn(61, 32))
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.embed.weight.zero_()
    h = torch.randn(1, 2, 32)
    if tied:
        torch.testing.assert_close(model.head(h), h @ model.embed.weight.t())
        assert (twin.head(h) == 0).all() and "head.weight" not in model.state_dict()
    else:
        assert model.head(h.to("meta")).is_meta


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
def test_bf16_storage_is_fp32_arithmetic(family: str) -> None:
    stored = built(SPECS[family]).bfloat16()
    wide = Decoder(SPECS[family])
    wide.load_state_dict({name: tensor.float() for name, tensor in stored.state_dict().items()})
    logits = stored(tokens())
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, wide(tokens()), atol=1e-5, rtol=0)
    owned = {p.untyped_storage().data_ptr() for p in stored.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(t: Tensor) -> Tensor:
        if t.untyped_storage().data_ptr() not in owned:
            kept[t.untyped_storage().data_ptr()] = t
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        loss = loss_of(stored, tokens())
    wide_weights = {(48, 32), (32, 48), (32, 32), (61, 32)}
    assert not any(tuple(t.shape) in wide_weights or tuple(t.t().shape) in wide_weights for t in kept.values() if t.dim() == 2), "no wide copy of a weight"
    loss.backward()
    loss_of(wide, tokens()).backward()
    for (name, ours), theirs in zip(stored.named_parameters(), wide.parameters(), strict=True):
        assert ours.grad is not None and theirs.grad is not None and ours.grad.dtype == torch.bfloat16
        torch.testing.assert_close(ours.grad.float(), theirs.grad, atol=2e-2 * theirs.grad.abs().max().item(), rtol=2e-2, msg=name)


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("name", SPECS)
def test_recomputed_blocks_are_bitwise_with_dropout(name: str, every: int) -> None:
    plain, again = built(SPECS[name]).train(), built(SPECS[name]).train()
    plain.dropout = again.dropout = 0.2
    trace, funcs = capture(again, loss_of, [tokens()])
    blocks = chain(trace, entries(trace, "layers.*"))
    schedule = lower(trace, segments(blocks, [0, *range(1, len(blocks), every)], until=len(blocks) - 1))
    assert schedule.before, "something runs again"
    for model in (plain, again):
        model.counter.seed, model.counter.step = 9, 4
    loss_of(plain, tokens()).backward()
    batch = tokens()
    with Executor(schedule, funcs).forward():
        loss = loss_of(again, batch)
    loss.backward()
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(plain.parameters(), again.parameters(), strict=True))


def test_dropout_is_off_in_eval_and_on_in_train() -> None:
    model = built(LLAMA)
    assert model.dropout == 0.0
    reference = model(tokens())
    assert torch.equal(model.train()(tokens()), reference)
    model.dropout = 0.3
    assert model.dropout == 0.3
    first = model(tokens())
    assert torch.equal(model(tokens()), first) and not torch.equal(first, reference)
    model.counter.step += 1
    assert not torch.equal(model(tokens()), first)
    assert torch.equal(model.eval()(tokens()), reference)
    sites = [m.site for m in model.modules() if hasattr(m, "site")]
    assert sorted(sites) == list(range(1 + 2 * 3)), "every dropout draws its own mask"


def test_first_weights_depend_on_seed_and_name_only() -> None:
    model, deeper = Decoder(LLAMA), Decoder(replace(LLAMA, vocab=99))
    model.init_weights(7)
    deeper.init_weights(7)
    torch.manual_seed(0)
    q = "layers.1.attn.q_proj.weight"
    assert torch.equal(model.get_parameter(q), init_tensor(q, (32, 32), 7, LLAMA))
    assert torch.equal(model.get_parameter(q), deeper.get_parameter(q))
    assert not torch.equal(init_tensor(q, (32, 32), 8, LLAMA), model.get_parameter(q))
    assert not torch.equal(init_tensor("layers.2.attn.q_proj.weight", (32, 32), 7, LLAMA), model.get_parameter(q))
    with torch.device("meta"):
        assert init_tensor(q, (32, 32), 7, LLAMA).device.type == "cpu"


@pytest.mark.parametrize(("name", "shape", "mean", "deviation"), [
    ("embed.weight", (500, 300), 0.0, 0.02),
    ("layers.0.mlp.up_proj.weight", (500, 300), 0.0, 0.02),
    ("layers.0.attn.o_proj.weight", (500, 300), 0.0, 0.02 / 6**0.5),
    ("layers.2.mlp.down_proj.weight", (500, 300), 0.0, 0.02 / 6**0.5),
    ("layers.2.mlp_norm.weight", (300,), 1.0, 0.0),
    ("layers.2.mlp_norm.bias", (300,), 0.0, 0.0),
    ("layers.2.mlp.up_proj.bias", (300,), 0.0, 0.0),
])
def test_first_weights_have_these_moments(name: str, shape: tuple[int, ...], mean: float, deviation: float) -> None:
    got: Any = init_tensor(name, shape, 0, LLAMA)
    assert abs(got.mean().item() - mean) < 1e-3 and abs(got.std().item() - deviation) < 2e-4
