"""The ledger's algebra, held against published memory tables (ZeRO, arXiv 1910.02054, figure 1)."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lilliput.base.ledger import MOMENTS, Ledger, Term


def mixed_precision_adam(parameters: float) -> Ledger:
    sizes = {"parameters": 2 * parameters, "gradients": 2 * parameters, "optimizer": 12 * parameters}
    return Ledger({n: Term(size=round(s)) for n, s in sizes.items()})


@pytest.mark.parametrize(("stage", "gigabytes"), [(0, 120.0), (1, 31.4), (2, 16.6), (3, 1.9)])
def test_zero_figure_1(stage: int, gigabytes: float) -> None:
    ledger = mixed_precision_adam(7.5e9)
    for name in ("optimizer", "gradients", "parameters")[:stage]:
        ledger = ledger.shard(name, axis="dp", by=64)
    assert ledger.peak()[0] / 1e9 == pytest.approx(gigabytes, abs=0.05)


def test_edits_leave_the_old_ledger_alone() -> None:
    before = mixed_precision_adam(1e6)
    after = before.move("optimizer", to="host").scale("gradients", 0.5).drop("parameters")
    assert before.peak() == (16_000_000, "load")
    assert after.peak("host")[0] == 12_000_000 and after.peak()[0] == 1_000_000
    assert after.bytes("parameters") == 0


def test_peak_is_the_largest_moment_not_the_sum() -> None:
    ledger = Ledger({"a": Term(size=10, moments=("forward",)), "b": Term(size=7, moments=("backward", "update")), "c": Term(size=1)})
    assert ledger.peak() == (11, "forward")
    assert ledger.biggest(2) == [("a", 10), ("c", 1)]


@given(st.lists(st.tuples(st.integers(0, 10**12), st.integers(1, 4096)), min_size=1, max_size=6))
def test_sharding_never_loses_bytes(terms: list[tuple[int, int]]) -> None:
    for size, by in terms:
        ledger = Ledger({"t": Term(size=size)}).shard("t", axis="dp", by=by)
        assert size <= ledger.bytes("t") * by < size + by
        assert ledger.peak()[1] in MOMENTS
