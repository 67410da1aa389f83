"""Chosen rows and pruned tiles against dense float64 products, at every level; a row's bits in any company and for any number of threads."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lilliput.base.errors import UserError
from lilliput.ops import native, sparse

compiled = pytest.mark.skipif(native.module() is None, reason=str(native.missing()))
LEVELS = native.levels() or ("none",)


def chosen(count: int) -> Tensor:
    return torch.randperm(count)[: random.randint(0, count)].to(torch.int32)


def same_with_threads(run: Callable[[], Tensor]) -> bool:
    native.threads(1)
    one = run()
    native.threads(3)
    try:
        return torch.equal(one, run())
    finally:
        native.threads(2)


@compiled
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("seed", range(8))
def test_chosen_rows(seed: int, half: bool, level: str) -> None:
    random.seed(seed)
    torch.manual_seed(seed)
    count, width, rows = random.choice([1, 40, 300]), random.choice([1, 7, 16, 67, 576]), random.choice([1, 2, 5, 17])
    data = torch.randn(count, width).to(torch.float16 if half else torch.float32)
    matrix, ids = sparse.RowMatrix(data), chosen(count)
    x, start = torch.randn(rows, width), torch.randn(rows, width)
    picked = data[ids.long()].double()
    with native.using(level):
        a = matrix.dots(x, ids)
        y = matrix.add(a, ids, start.clone())
        torch.testing.assert_close(a.double(), x.double() @ picked.t(), rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(y.double(), start.double() + a.double() @ picked, rtol=1e-5, atol=2e-3)
        for r in range(rows):
            assert torch.equal(a[r : r + 1], matrix.dots(x[r : r + 1].contiguous(), ids)), "a row depends on itself alone"
            assert torch.equal(y[r : r + 1], matrix.add(a[r : r + 1].contiguous(), ids, start[r : r + 1].clone()))
        assert same_with_threads(lambda: matrix.dots(x, ids)) and same_with_threads(lambda: matrix.add(a, ids))


@compiled
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("seed", range(8))
def test_pruned_tiles(seed: int, level: str) -> None:
    random.seed(seed)
    torch.manual_seed(seed)
    outputs, inputs, rows = random.choice([1, 16, 30, 200]), 16 * random.choice([1, 3, 12]), random.choice([0, 1, 3, 21, 150])
    keep = torch.rand(-(-outputs // 16), inputs // 16) < random.choice([0.0, 0.2, 0.6, 1.0])
    weight, bias = torch.randn(outputs, inputs), torch.randn(outputs) if seed % 2 else None
    matrix = sparse.prune_tiles(weight, keep)
    mask = keep.repeat_interleave(16, 0)[:outputs].repeat_interleave(16, 1)
    assert torch.equal(matrix.dense(), weight * mask)
    assert matrix.density == pytest.approx(keep.float().mean().item())
    assert matrix.data.nbytes == int(keep.sum()) * 1024, "only what stays takes memory"
    x = torch.randn(rows, inputs)
    want = torch.nn.functional.linear(x.double(), (weight * mask).double(), None if bias is None else bias.double())
    with native.using(level):
        got = matrix.product(x, bias)
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-4)
        for r in range(min(rows, 9)):
            assert torch.equal(got[r], matrix.product(x[r], bias)), "a row depends on itself alone"
        assert same_with_threads(lambda: matrix.product(x, bias))


def test_without_kernels_the_references_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "module", lambda: None)
    torch.manual_seed(0)
    data, ids, x = torch.randn(20, 32), torch.tensor([3, 1, 19], dtype=torch.int32), torch.randn(2, 32)
    matrix = sparse.RowMatrix(data)
    torch.testing.assert_close(matrix.dots(x, ids), x @ data[[3, 1, 19]].t())
    torch.testing.assert_close(matrix.add(matrix.dots(x, ids), ids), x @ data[[3, 1, 19]].t() @ data[[3, 1, 19]])
    tiles = sparse.prune_tiles(data, torch.tensor([[True, False], [False, True]]))
    torch.testing.assert_close(tiles.product(x), x @ tiles.dense().t())


def test_bad_input_is_refused() -> None:
    with pytest.raises(UserError, match="contiguous fp32 or fp16"):
        sparse.RowMatrix(torch.zeros(4, 8, dtype=torch.float64))
    with pytest.raises(UserError, match="ids go from 0 to 3"):
        sparse.RowMatrix(torch.zeros(4, 8)).dots(torch.zeros(1, 8), torch.tensor([4], dtype=torch.int32))
    with pytest.raises(UserError, match="no whole tiles"):
        sparse.prune_tiles(torch.zeros(16, 24), torch.ones(1, 1))


@compiled
def test_the_ops_are_good_torch_citizens() -> None:
    data, ids, x = torch.randn(20, 32), torch.tensor([3, 1, 19], dtype=torch.int32), torch.randn(2, 32)
    torch.library.opcheck(sparse.DOTS, (data, ids, x))
    torch.library.opcheck(sparse.ADD, (data, ids, torch.randn(2, 3), torch.zeros(2, 32)))
    tiles = sparse.prune_tiles(data, torch.ones(2, 2))
    torch.library.opcheck(sparse.TILES, (x, tiles.starts, tiles.blocks, tiles.data, 20, None))
