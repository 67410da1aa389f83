import pytest
from hypothesis import given
from hypothesis import strategies as st

from lilliput.base.job import Train
from lilliput.loops.schedule import learning_rate


@given(st.integers(1, 300), st.integers(0, 50), st.sampled_from(["cosine", "wsd", "constant"]), st.floats(0, 1))
def test_never_above_the_peak_and_never_below_the_end(steps: int, warmup: int, schedule: str, end: float) -> None:
    train = Train(steps=steps, warmup=warmup, schedule=schedule, lr=1.0, lr_end=end)
    rates = [learning_rate(s, train) for s in range(steps)]
    assert max(rates) <= 1 + 1e-12
    assert all(r >= end - 1e-12 for r in rates[warmup:])


def test_shapes() -> None:
    rates = {s: [learning_rate(i, Train(steps=100, warmup=10, lr=1.0, lr_end=0.1, schedule=s)) for i in range(100)] for s in ("cosine", "wsd", "constant")}
    for values in rates.values():
        assert values[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert rates["cosine"][10] == pytest.approx(1.0) and rates["cosine"][99] == pytest.approx(0.1)
    assert rates["cosine"][10:] == sorted(rates["cosine"][10:], reverse=True)
    assert rates["wsd"][10:80] == [1.0] * 70 and rates["wsd"][99] == pytest.approx(0.1) and rates["wsd"][89] == pytest.approx(0.55)
    assert set(rates["constant"][10:]) == {1.0}
