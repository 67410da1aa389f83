"""DecoderSpec: names and shapes follow from it, and contradictions are refused with numbers."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, replace
from typing import Any

import pytest
import torch

from lilliput.base.errors import UserError
from lilliput.models.decoder import Decoder
from lilliput.models.sizes import PRESETS, preset
from lilliput.models.spec import DecoderSpec

BASE = DecoderSpec("llama", vocab=11, dim=8, layers=2, heads=4, kv_heads=2, head_dim=2, ffn=12, context=16)


def test_shapes_of_a_small_llama() -> None:
    assert BASE.shapes() == {
        "embed.weight": (11, 8),
        **{f"layers.{i}.{name}": shape for i in range(2) for name, shape in {
            "input_norm.weight": (8,), "attn.q_proj.weight": (8, 8), "attn.k_proj.weight": (4, 8), "attn.v_proj.weight": (4, 8), "attn.o_proj.weight": (8, 8),
            "mlp_norm.weight": (8,), "mlp.gate_proj.weight": (12, 8), "mlp.up_proj.weight": (12, 8), "mlp.down_proj.weight": (8, 12)}.items()},
        "norm.weight": (8,),
        "head.weight": (11, 8),
    }


@pytest.mark.parametrize("change", [
    {},
    {"tied": True, "qkv_bias": True},
    {"qk_norm": True, "head_dim": 6, "mlp_bias": True, "o_bias": True},
    {"norm": "layer", "positions": "learned", "activation": "relu"},
    {"norm": "layer", "positions": "learned", "activation": "gelu", "norm_place": "post", "embed_dim": 4, "tied": True},
], ids=str)
def test_the_model_has_these_names_in_this_order(change: dict[str, Any]) -> None:
    spec = replace(BASE, **change)
    state = Decoder(spec).state_dict()
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == spec.shapes()
    assert list(state) == list(spec.shapes())


@pytest.mark.parametrize(("change", "words"), [
    ({"kv_heads": 3}, ("heads=4", "kv_heads=3")),
    ({"head_dim": 3}, ("head_dim=3",)),
    ({"dim": 0}, ("dim=0",)),
    ({"layers": -1}, ("layers=-1",)),
    ({"window": 0}, ("window=0",)),
    ({"window": 4, "window_layers": (True,)}, ("1 entries", "2 layers")),
])
def test_contradictions(change: dict[str, Any], words: tuple[str, ...]) -> None:
    with pytest.raises(UserError) as raised:
        replace(BASE, **change)
    assert all(word in str(raised.value) for word in words)
    assert raised.value.fix


def test_windows_by_layer() -> None:
    assert [replace(BASE, window=4).window_of(i) for i in range(2)] == [4, 4]
    assert [replace(BASE, window=4, window_layers=(False, True)).window_of(i) for i in range(2)] == [None, 4]
    assert BASE.window_of(0) is None


def test_frozen_and_hashable() -> None:
    with pytest.raises(FrozenInstanceError):
        BASE.dim = 3  # type: ignore[misc]
    assert hash(replace(BASE, extra={"pad_token_id": 0})) == hash(BASE)
    assert replace(BASE, extra={"pad_token_id": 0}) != BASE


def test_unknown_preset() -> None:
    assert preset("gpt2") is PRESETS["gpt2"]
    with pytest.raises(UserError, match="lama-7b") as raised:
        preset("lama-7b")
    assert raised.value.fix == "did you mean `llama-7b`?"


def test_built_on_meta_a_giant_costs_nothing() -> None:
    with torch.device("meta"):
        model = Decoder(PRESETS["llama-70b"])
    assert all(parameter.is_meta for parameter in model.parameters())
    assert model.facts.parameters == sum(parameter.numel() for parameter in model.parameters())
