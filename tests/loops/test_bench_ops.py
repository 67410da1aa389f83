"""The kernel benchmark: its sections, what a line says, and that both sides of a line compute the same."""

from __future__ import annotations

import pytest
import torch

from lilliput.base.errors import UserError
from lilliput.base.job import Job
from lilliput.base.show import Show
from lilliput.cli import bench as verb
from lilliput.loops import bench_ops
from lilliput.ops import native

pytestmark = pytest.mark.skipif(native.module() is None, reason=str(native.missing()))


def test_an_unknown_section_is_refused() -> None:
    with pytest.raises(UserError, match="no section `linaer`") as caught:
        verb.ops(Job.load(None, []), 1, Show(), ["linaer"])
    assert "linear" in str(caught.value.fix)


def test_sections_that_are_asked_for_and_no_others() -> None:
    said: list[str] = []
    limits, rows = bench_ops.measure(1, said.append, ["adapters"])
    assert [row["op"] for row in rows] == ["LoRA rows, 8 adapters, fp32", "LoRA rows, 8 adapters, fp16"] and len(said) == 3
    assert all(set(row) == set(bench_ops.COLUMNS) and row["us"] > 0 and row["best stock"] == "torch" for row in rows) and set(limits) == {"read", "fma", "int8"}


@pytest.mark.parametrize("section", ["cache", "rows"])
def test_both_sides_of_a_line_compute_the_same(section: str) -> None:
    torch.manual_seed(0)
    with torch.inference_mode():
        lines = [line for line in bench_ops.SECTIONS[section]() if line[0] != "bias + GELU"]  # that one is written over what it reads
        for op, _, _, _, ours, plain, _ in lines:
            got, want = ours(), plain()
            if isinstance(want, list):  # attention of each sequence, [1, H, T, D]
                want = torch.cat([part[0].transpose(0, 1) for part in want])
            pairs = zip(got, want) if isinstance(got, tuple) else [(got, want)]
            bound = 0.2 if "int4" in op else 0.02 if "int8" in op else 1e-3
            for a, b in pairs:
                assert float((a.float() - b.float()).norm() / b.float().norm()) < bound, op  # type: ignore[union-attr]
    assert len(lines) > 5
