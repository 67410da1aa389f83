"""Attention's front door against a loop over queries, over random shapes, for every backend."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lilliput.base.errors import UserError
from lilliput.ops import native
from lilliput.ops.attention import BACKENDS, attend, choose, visible


def naive(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, window: int | None, mask: torch.Tensor | None, scale: float) -> torch.Tensor:
    """One query of one head at a time, as the formula reads."""
    B, H, T, _ = q.shape
    G, S = k.shape[1:3]
    out = torch.zeros(B, H, T, v.shape[-1])
    for b in range(B):
        for h in range(H):
            for t in range(T):
                at = S - T + t
                keys = [s for s in range(S) if (not causal or s <= at) and (window is None or at - s < window) and (mask is None or bool(mask[b, 0, t, s]))]
                if keys:
                    weights = torch.softmax(torch.stack([q[b, h, t] @ k[b, h * G // H, s] * scale for s in keys]), 0)
                    out[b, h, t] = sum(w * v[b, h * G // H, s] for w, s in zip(weights, keys, strict=True))
    return out


def random(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


HERE = [name for name in BACKENDS if name != "flash" or native.module()]


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 2), st.sampled_from([(1, 1), (2, 1), (4, 2), (3, 3)]), st.integers(1, 7), st.integers(0, 6), st.sampled_from([2, 8]),
       st.booleans(), st.one_of(st.none(), st.integers(1, 9)), st.booleans(), st.sampled_from(HERE), st.integers(0, 1000))
def test_equals_the_formula(batch: int, heads: tuple[int, int], queries: int, before: int, dim: int, causal: bool, window: int | None, masked: bool,
                            backend: str, seed: int) -> None:
    window = window if causal else None
    q, k, v = random((batch, heads[0], queries, dim), seed), random((batch, heads[1], queries + before, dim), seed + 1), \
        random((batch, heads[1], queries + before, dim), seed + 2)
    mask = random((batch, 1, queries, queries + before), seed + 3) > -0.5 if masked and backend != "flash" else None
    if backend == "flash" and queries == 1:  # refused: see test_choice_has_a_reason_and_refusals_are_told
        backend = "auto"
    got = attend(q, k, v, causal=causal, window=window, mask=mask, backend=backend)
    torch.testing.assert_close(got, naive(q, k, v, causal, window, mask, 1 / math.sqrt(dim)), atol=2e-6, rtol=1e-5)


MASKED = [name for name in BACKENDS if name != "flash"]


@pytest.mark.parametrize("backend", MASKED)
def test_a_query_that_sees_nothing_answers_zero(backend: str) -> None:
    q, k, v = (random((1, 2, 3, 4), seed) for seed in range(3))
    mask = torch.ones(3, 3, dtype=torch.bool)
    mask[1] = False
    out = attend(q, k, v, causal=False, mask=mask, backend=backend)
    assert (out[:, :, 1] == 0).all() and out.isfinite().all()


@pytest.mark.parametrize("window", [None, 5])
def test_backends_agree_forward_and_backward(window: int | None, device: str) -> None:
    grads = []
    for backend in BACKENDS if device == "cpu" and native.module() else MASKED:
        q, k, v = (random(shape, seed).to(device).requires_grad_() for seed, shape in enumerate([(2, 6, 20, 16), (2, 2, 20, 16), (2, 2, 20, 16)]))
        out = attend(q, k, v, causal=True, window=window, backend=backend)
        out.backward(random(tuple(out.shape), 9).to(device))
        grads.append((out, q.grad, k.grad, v.grad))
    for one, other in ((one, other) for later in grads[1:] for one, other in zip(grads[0], later, strict=True)):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("backend", MASKED)
def test_added_masks_and_scale(backend: str) -> None:
    q, k, v = (random((1, 2, 4, 4), seed) for seed in range(3))
    bias = random((4, 4), 5)
    expected = ((q @ k.transpose(-1, -2)) * 0.3 + bias).masked_fill(torch.ones(4, 4).triu(1).bool(), float("-inf")).softmax(-1) @ v
    torch.testing.assert_close(attend(q, k, v, causal=True, mask=bias, scale=0.3, backend=backend), expected)


def test_one_token_with_a_window_reads_only_the_window() -> None:
    q, k, v = random((1, 1, 1, 4), 0), random((1, 1, 9, 4), 1), random((1, 1, 9, 4), 2)
    k[:, :, :6] = float("nan")
    assert attend(q, k, v, causal=True, window=3).isfinite().all()


def test_visible() -> None:
    assert visible(2, 4, None, "cpu").tolist() == [[True, True, True, False], [True, True, True, True]]
    assert visible(3, 3, 2, "cpu").tolist() == [[True, False, False], [True, True, False], [False, True, True]]


def test_choice_has_a_reason_and_refusals_are_told() -> None:
    q, k = random((1, 1, 2, 4), 0), random((1, 1, 2, 4), 1)
    name, reason = choose(q, k, k)
    assert (name, reason) == ("flash", "first choice") if native.module() else (name == "sdpa" and "not built" in reason)
    assert choose(q[:, :, :1], k, k) == ("sdpa", "flash works on tiles of queries, this is one")
    assert choose(q, k, k, mask=torch.zeros(2, 2))[0] == "sdpa"
    name, reason = choose(q, k.double(), k.double())
    assert name == "reference" and "float64" in reason
    with pytest.raises(UserError, match="sdpa"):
        attend(q, k.double(), k.double(), causal=True, backend="sdpa")


@pytest.mark.parametrize(("arguments", "word"), [({"backend": "flash3"}, "flash3"), ({"causal": False, "window": 3}, "window")])
def test_wrong_arguments(arguments: dict[str, object], word: str) -> None:
    q = random((1, 1, 2, 4), 0)
    with pytest.raises(UserError, match=word):
        attend(q, q, q, **({"causal": True} | arguments))  # type: ignore[arg-type]
    with pytest.raises(UserError, match="2 queries over 1 keys"):
        attend(q, q[:, :, :1], q[:, :, :1], causal=True)
