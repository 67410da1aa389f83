"""The paper's table of memory needs to two decimals, and its four bandwidths to three."""

from __future__ import annotations

import pytest

from lilliput.plan.scale import Scale, efficiency

TABLE = [  # layers, hidden, parameters in 1e12, states in TiB, checkpoints in TiB, largest operator in GiB
    (80, 10240, 0.10, 1.83, 0.05, 1.56),
    (100, 20480, 0.50, 9.16, 0.12, 6.25),
    (128, 25600, 1.01, 18.31, 0.20, 9.77),
    (195, 65536, 10.05, 182.81, 0.76, 64.00),
    (315, 163840, 101.47, 1845.70, 3.08, 400.00),
]


@pytest.mark.parametrize("row", TABLE, ids=lambda row: f"{row[2]}T")
def test_memory_table(row: tuple) -> None:
    scale = Scale(*row[:2])
    found = (scale.parameters / 1e12, scale.states / 2**40, scale.checkpoints / 2**40, scale.working_states / 2**30)
    assert [f"{x:.2f}" for x in found] == [f"{x:.2f}" for x in row[2:]]


@pytest.mark.parametrize(
    ("kind", "bandwidth", "scale", "expected"),
    [
        ("parameters", 70e9, Scale(1, 1024, sequences=1), 0.506),
        ("optimizer", 1.5e12, Scale(1, 1024, sequences=2), 0.916),
        ("activations", 2e9, Scale(1, 2048), 0.584),
        ("activations", 1e9, Scale(1, 8192), 0.737),
    ],
)
def test_efficiency(kind: str, bandwidth: float, scale: Scale, expected: float) -> None:
    assert f"{efficiency(scale.intensity[kind], bandwidth):.3f}" == f"{expected:.3f}"


def test_work() -> None:
    scale = Scale(2, 64, sequences=3, tokens=5, heads=4, interval=2)
    assert scale.compute == 8 * 15 * scale.parameters
