"""Facts against the model they speak of: parameters, consumers, pairs, and bytes that autograd really keeps."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from lilliput.base.facts import Activation
from lilliput.memory.meter import Meter
from lilliput.models.decoder import Decoder
from lilliput.models.facts import facts
from lilliput.models.layers import LayerNorm, Linear, RMSNorm
from lilliput.models.sizes import PRESETS
from lilliput.models.spec import DecoderSpec
from lilliput.ops.attention import visible

LLAMA = DecoderSpec("llama", vocab=512, dim=64, layers=3, heads=4, kv_heads=2, head_dim=16, ffn=176, context=512)
GPT2 = replace(LLAMA, family="gpt2", kv_heads=4, ffn=256, norm="layer", positions="learned", activation="gelu_tanh", qkv_bias=True, o_bias=True,
               mlp_bias=True, tied=True)
SPECS = {
    "llama": LLAMA,
    "mistral": replace(LLAMA, family="mistral", window=20),
    "qwen2": replace(LLAMA, family="qwen2", qkv_bias=True, tied=True, window=20, window_layers=(False, True, True)),
    "qwen3": replace(LLAMA, family="qwen3", qk_norm=True, head_dim=24),
    "gpt2": GPT2,
    "opt": replace(GPT2, family="opt", activation="relu"),
    "opt-350m": replace(GPT2, family="opt", activation="relu", norm_place="post", embed_dim=32),
    "opt projected": replace(GPT2, family="opt", activation="relu", embed_dim=32),
    "characters": replace(LLAMA, vocab=65),
    "characters gpt2": replace(GPT2, vocab=65),
    "characters opt": replace(GPT2, family="opt", activation="relu", vocab=65),
    "deep": replace(LLAMA, vocab=65, layers=8, dim=96, head_dim=24),
    "wide vocabulary": replace(LLAMA, vocab=8000),
    "wide vocabulary tied": replace(GPT2, vocab=8000),
    "much attention": replace(LLAMA, vocab=65, heads=12, kv_heads=12, head_dim=32, ffn=64),
}


@pytest.mark.parametrize(("name", "published"), [
    ("gpt2", 124_439_808), ("gpt2-xl", 1_557_611_200), ("smollm2-135m", 134_515_008), ("llama-1b", 1_235_814_400), ("llama-7b", 6_738_415_616),
    ("llama-13b", 13_015_864_320), ("llama-70b", 68_976_648_192), ("opt-1.3b", 1_315_758_080 - 2 * 2048), ("opt-13b", 12_853_473_280 - 2 * 5120),
    ("gpt3-175b", 174_604_259_328),
])
def test_published_parameter_counts(name: str, published: int) -> None:
    """OPT's published counts hold two rows of positions that no token reads."""
    assert facts(PRESETS[name]).parameters == published


def test_small_presets() -> None:
    assert facts(PRESETS["tiny"]).parameters * 4 <= 1_490_000
    assert 2.9e6 < facts(PRESETS["llama-3m"]).parameters < 3.2e6
    assert PRESETS["gpt-nano"].dim == 128 and PRESETS["gpt-nano"].layers == PRESETS["gpt-nano"].heads == 4 and PRESETS["gpt-nano"].context == 64


@pytest.mark.parametrize("name", SPECS)
def test_chain_layout_and_linears_name_real_modules(name: str) -> None:
    model = Decoder(SPECS[name])
    stated = model.facts
    assert [part.split(".")[0] for part in stated.chain] == [n for n, _ in model.named_children() if "dropout" not in n]
    first = {n: m for n, m in model.layers.named_modules(prefix="layers") if n.startswith("layers.0.")}
    inside = {n.replace("layers.0.", "layers.*.") for n, m in first.items() if isinstance(m, Linear)}
    assert set(stated.linears) == inside
    assert set(stated.layout) == inside | {"embed", "head"}
    assert stated.layout["layers.*.attn.o_proj"] == stated.layout["layers.*.mlp.down_proj"] == "row" and stated.layout["layers.*.attn.k_proj"] == "col"
    assert stated.tied == ((("embed.weight", "head.weight"),) if SPECS[name].tied else ())
    assert stated.kv is not None and stated.kv.bytes_per_token(4) == 2 * 4 * SPECS[name].layers * SPECS[name].kv_heads * SPECS[name].head_dim


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2", "opt-350m"])
def test_feeds_are_all_consumers(name: str) -> None:
    """Who reads a norm's output, seen by its storage; post-norm outputs are also the residual stream."""
    spec = SPECS[name]
    model = Decoder(spec)
    model.init_weights(0)
    made: dict[int, str] = {}
    seen: dict[str, set[str]] = {}
    kept: list[Tensor] = []  # or storages would be reused

    def star(path: str) -> str:
        return ".".join("*" if part.isdigit() else part for part in path.split("."))

    for path, module in model.named_modules():
        if isinstance(module, RMSNorm | LayerNorm):
            module.register_forward_hook(lambda m, i, o, path=star(path): kept.append(o) or made.__setitem__(o.data_ptr(), path))
        elif isinstance(module, Linear) or path == "head":
            module.register_forward_pre_hook(lambda m, i, path=star(path): kept.append(i[0]) or seen.setdefault(made.get(i[0].data_ptr(), ""), set()).add(path))
    model(torch.zeros(1, 4, dtype=torch.long))
    stated = model.facts.feeds
    norms = {star(path) for path, m in model.named_modules() if isinstance(m, RMSNorm | LayerNorm)}
    assert set(stated) == norms
    for norm, consumers in stated.items():
        assert seen.get(norm, set()) == set(consumers) - {"residual", "attention"}, norm
        assert ("residual" in consumers) == (spec.norm_place == "post")
        assert ("attention" in consumers) == norm.endswith(("q_norm", "k_norm"))


def measured(spec: DecoderSpec, sequences: int, tokens: int) -> tuple[int, int]:
    """(bytes kept for the backward pass, peak bytes) of one micro-batch beside parameters and gradients."""
    model = Decoder(spec)
    model.init_weights(0)
    ids = torch.randint(0, spec.vocab, (sequences, tokens))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    owned = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(t: Tensor) -> Tensor:
        if t.untyped_storage().data_ptr() not in owned:
            kept[t.untyped_storage().data_ptr()] = t
        return t

    def loss() -> Tensor:
        return F.cross_entropy(model(ids).flatten(0, 1), ids.roll(-1, 1).flatten())

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        loss()
    saved = sum(t.untyped_storage().nbytes() for t in kept.values())
    kept.clear()
    with Meter([*model.parameters(), *(p.grad for p in model.parameters() if p.grad is not None)]) as meter:
        loss().backward()
    return saved, meter.peak


def total(terms: list[Activation], layers: int) -> tuple[int, int]:
    saved = sum(t.size * (layers if t.per == "block" else 1) for t in terms if t.saved)
    early = sum(t.size for t in terms if t.early)
    return saved, saved + max(t.size - (early if t.per == "block" else 0) for t in terms if not t.saved)


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize(("sequences", "tokens"), [(1, 32), (2, 96), (4, 64)], ids=str)
def test_activation_bytes(name: str, sequences: int, tokens: int) -> None:
    spec = SPECS[name]
    stated = facts(spec).activations
    assert stated is not None
    terms = stated(sequences, tokens, 4)
    saved, peak = total(terms, spec.layers)
    really_saved, really_peak = measured(spec, sequences, tokens)
    assert saved == pytest.approx(really_saved, rel=0.01)
    assert peak == pytest.approx(really_peak, rel=0.10)
    assert len({t.name for t in terms}) == len(terms) and all(t.size >= 0 for t in terms)


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "gpt2", "opt-350m"])
def test_flops_of_matrices_and_visible_pairs(name: str) -> None:
    spec = SPECS[name]
    model = Decoder(spec)
    model.init_weights(0)
    pairs = 0

    def count(layer: int, q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
        nonlocal pairs
        pairs += int(visible(q.shape[2], k.shape[2], window, "cpu").sum()) * q.shape[0] * q.shape[1]
        return q

    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(2, 50, dtype=torch.long), attend=count)
    stated = facts(spec).flops
    assert stated is not None
    assert stated(100, 50) == counter.get_total_flops() + 4 * pairs * spec.head_dim


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 60), st.integers(1, 60), st.sampled_from(["llama", "mistral", "qwen2"]))
def test_flops_add_up_token_by_token(tokens: int, context: int, name: str) -> None:
    stated = facts(SPECS[name]).flops
    assert stated is not None
    if tokens <= context:
        assert stated(tokens, context) == sum(stated(1, at + 1) for at in range(context - tokens, context))
    else:
        whole, rest = divmod(tokens, context)
        assert stated(tokens, context) == whole * stated(context, context) + (stated(rest, rest) if rest else 0)
