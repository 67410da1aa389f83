"""The loss in chunks against torch's cross-entropy over whole logits: numbers, bytes, products, and what it refuses."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from lilliput.memory.meter import Meter
from lilliput.ops.chunked import linear_cross_entropy
from lilliput.ops.linear import linear


def case(seed: int, stored: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    rows, width, vocab = (int(torch.randint(low, high, (), generator=draw)) for low, high in ((1, 90), (1, 40), (2, 300)))
    h, weight = torch.randn(rows, width, generator=draw), torch.randn(vocab, width, generator=draw).to(stored)
    targets = torch.randint(0, vocab, (rows,), generator=draw).masked_fill(torch.rand(rows, generator=draw) < 0.3, -100)
    return h.requires_grad_(), weight.requires_grad_(), targets


def outcome(loss: torch.Tensor, *leaves: torch.Tensor) -> list[torch.Tensor]:
    (loss / 7).backward()
    found = [loss.detach(), *(leaf.grad for leaf in leaves)]
    for leaf in leaves:
        leaf.grad = None
    return found


@pytest.mark.parametrize("chunk", [1, 7, 32, 1000])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_against_whole_logits(chunk: int, stored: torch.dtype) -> None:
    for seed in range(12):
        h, weight, targets = case(seed, stored)
        whole = F.cross_entropy(linear(h, weight).float(), targets, ignore_index=-100, reduction="sum")
        for got, expected in zip(outcome(linear_cross_entropy(h, weight, targets, chunk), h, weight), outcome(whole, h, weight), strict=True):
            assert got.dtype == expected.dtype and got.shape == expected.shape
            relative = 1e-5 if got.dtype == torch.float32 else 2e-2
            torch.testing.assert_close(got, expected, rtol=relative, atol=1e-5, msg=lambda m: f"seed {seed}: {m}")  # noqa: B023


def test_rows_of_any_shape_and_nothing_scored() -> None:
    h, weight, targets = case(3)
    flat, tall = (outcome(linear_cross_entropy(x, weight, targets, 5), h, weight) for x in (h, h.unsqueeze(0)))
    assert all(torch.equal(a, b) for a, b in zip(flat, tall, strict=True))
    loss, dh, dw = outcome(linear_cross_entropy(h, weight, torch.full_like(targets, -100), 5), h, weight)
    assert loss == 0 and not dh.any() and not dw.any()


@pytest.mark.parametrize("learns", ["both", "head frozen", "input frozen", "nothing"])
def test_bytes_and_products(learns: str) -> None:
    """What is made is what learns and two chunks' numbers; no product more than the plain loss has."""
    rows, width, vocab, chunk = 64, 8, 500, 16
    h, weight, targets = torch.randn(rows, width), torch.randn(vocab, width), torch.randint(0, vocab, (rows,))
    h.requires_grad_(learns in ("both", "head frozen"))
    weight.requires_grad_(learns in ("both", "input frozen"))
    with Meter(known=[h, weight, targets]) as meter:
        loss = linear_cross_entropy(h, weight, targets, chunk)
        kept = meter.live - loss.nbytes
    gradients = sum(t.nbytes for t in (h, weight) if t.requires_grad)
    assert gradients <= kept <= gradients + 16
    two = 2 * chunk * vocab * 4
    assert gradients + two <= meter.peak <= gradients + two + rows * 32
    assert meter.calls["mm"] + meter.calls.get("addmm_", 0) == rows // chunk * (1 + h.requires_grad + weight.requires_grad)


def test_without_gradients_none_are_made() -> None:
    h, weight, targets = case(1)
    expected = linear_cross_entropy(h, weight, targets, 4).detach()
    with torch.no_grad(), Meter() as meter:
        loss = linear_cross_entropy(h, weight, targets, 4)
    assert torch.equal(loss, expected) and "addmm_" not in meter.calls and meter.calls["mm"] == -(-len(targets) // 4)


def test_a_second_backward_pass_is_refused() -> None:
    h, weight, targets = case(2)
    loss = linear_cross_entropy(h, weight, targets, 4)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
