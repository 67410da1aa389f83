"""RoPE: transformers' frequencies to the bit, and the property that makes it a position code."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lilliput.models.rope import frequencies, rotate, tables
from lilliput.models.spec import Rope

VARIANTS = {
    "none": (Rope(10000.0), {"rope_type": "default"}),
    "theta": (Rope(1e6), {"rope_type": "default"}),
    "linear": (Rope(10000.0, "linear", 4.0), {"rope_type": "linear", "factor": 4.0}),
    "llama3": (Rope(5e5, "llama3", 8.0, 8192), {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                                                "original_max_position_embeddings": 8192}),
    "yarn": (Rope(1e4, "yarn", 16.0, 4096, attention_factor=1.2772588722239782),
             {"rope_type": "yarn", "factor": 16.0, "original_max_position_embeddings": 4096}),
    "yarn untruncated": (Rope(1e6, "yarn", 4.0, 32768, beta_fast=20.0, beta_slow=2.0, truncate=False, attention_factor=1.0),
                         {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768, "beta_fast": 20.0, "beta_slow": 2.0,
                          "truncate": False, "attention_factor": 1.0}),
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("head_dim", [16, 64, 128])
def test_transformers_tables(variant: str, head_dim: int) -> None:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

    rope, scaling = VARIANTS[variant]
    config = LlamaConfig(hidden_size=head_dim * 2, num_attention_heads=2, max_position_embeddings=65536, rope_parameters=scaling | {"rope_theta": rope.theta})
    theirs = LlamaRotaryEmbedding(config)
    angles = frequencies(rope, head_dim)
    torch.testing.assert_close(torch.tensor(angles), theirs.inv_freq, rtol=2e-7, atol=0)
    positions = torch.tensor([[0, 1, 2, 100, 2047]])
    x = torch.randn(1, 5, 2, head_dim, generator=torch.Generator().manual_seed(head_dim))
    cos, sin = theirs(x, positions)
    expected, _ = apply_rotary_pos_emb(x.transpose(1, 2), x.transpose(1, 2), cos, sin)
    got = rotate(x, *tables(angles, positions, rope.attention_factor, torch.float32))
    torch.testing.assert_close(got.transpose(1, 2), expected, rtol=0, atol=1e-5 if variant == "none" else 2e-4)


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 500), st.integers(0, 500), st.integers(0, 500), st.integers(0, 2**31), st.sampled_from(list(VARIANTS)))
def test_scores_depend_on_the_distance_only(left: int, right: int, shift: int, seed: int, variant: str) -> None:
    rope = VARIANTS[variant][0]
    angles = frequencies(rope, 32)
    x = torch.randn(2, 32, generator=torch.Generator().manual_seed(seed))

    def score(at: int, to: int) -> torch.Tensor:
        cos, sin = tables(angles, torch.tensor([[at, to]]), rope.attention_factor, torch.float32)
        q, k = rotate(x[None, :, None], cos, sin)[0, :, 0]
        return q @ k

    torch.testing.assert_close(score(left, right), score(left + shift, right + shift), atol=5e-3, rtol=0)
    if rope.attention_factor == 1.0:
        torch.testing.assert_close(score(left, left), x[0] @ x[1], atol=5e-3, rtol=0)


def test_tables_are_all_that_autograd_keeps() -> None:
    cos, sin = tables(frequencies(Rope(), 8), torch.arange(5).unsqueeze(0), 1.0, torch.float32)
    assert cos.shape == sin.shape == (1, 5, 1, 8)
    kept: list[int] = []
    x = torch.randn(3, 5, 2, 8, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        rotate(x, cos, sin)
    assert set(kept) == {cos.data_ptr(), sin.data_ptr()}
