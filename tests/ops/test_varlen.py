"""Packing padded batches: every valid row once, in order, and back; attention over the packed rows."""

from __future__ import annotations

import pytest
import torch

from lilliput.base.errors import UserError
from lilliput.ops.varlen import Packing, attention_reference


def masks() -> list[torch.Tensor]:
    torch.manual_seed(0)
    lengths = torch.tensor([3, 0, 7, 1])
    ragged = torch.arange(7)[None] < lengths[:, None]
    return [ragged, torch.ones(2, 5), torch.zeros(2, 5), (torch.rand(3, 9) < 0.5).int(), torch.ones(1, 1), torch.zeros(0, 4)]


@pytest.mark.parametrize("mask", masks(), ids=range(6))
def test_there_and_back(mask: torch.Tensor) -> None:
    x = torch.randn(*mask.shape, 3)
    packing = Packing(mask)
    rows = packing.pack(x)
    assert torch.equal(rows, x[mask.bool()]), "valid rows in their order"
    assert packing.count == int(mask.bool().sum()) == int(packing.cu[-1])
    assert torch.equal(packing.cu[1:] - packing.cu[:-1], packing.lengths)
    assert torch.equal(packing.unpack(rows), x * mask.bool()[..., None])


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("mask", masks(), ids=range(6))
def test_attention_sees_its_own_sequence_alone(mask: torch.Tensor, causal: bool) -> None:
    packing = Packing(mask)
    q, k, v = torch.randn(packing.count, 4, 8), torch.randn(packing.count, 2, 8), torch.randn(packing.count, 2, 8)
    got = packing.attention(q, k, v, causal=causal)
    torch.testing.assert_close(got, attention_reference(q, k, v, packing.cu, causal=causal), rtol=1e-5, atol=1e-5)
    if packing.count:  # what another sequence holds changes nothing, bit for bit
        first = packing.cu[: 1 + int((packing.cu == 0).sum())].tolist()[-1]
        other = [t.clone() for t in (q, k, v)]
        for t in other:
            t[first:] += 1
        assert torch.equal(packing.attention(*other, causal=causal)[:first], got[:first])


def test_a_mask_of_another_shape() -> None:
    with pytest.raises(UserError, match="3 dimensions"):
        Packing(torch.ones(2, 1, 5))
