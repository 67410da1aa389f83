from __future__ import annotations

import pytest

from lilliput.base.errors import UserError
from lilliput.memory.plan import Decision, MemoryPlan, Row

PLAN = MemoryPlan("0" * 16, "sqrt", {"3 block tanh": Row(4096), "4 block mul": Row(128, Decision("recompute", spans=((7, None), (9, 12)))),
                                     "optimizer w": Row(64)}, {"device": 9}, {"seconds": 1.5})  # fmt: skip


def test_two_claims_on_one_axis_name_both_rooms() -> None:
    claimed = PLAN.claim("qlora", "optimizer *", place="page", tier="host").claim("fp8", "optimizer *", codec="bf16")
    assert claimed.rows["optimizer w"].decision == Decision("page", "host", "bf16")
    with pytest.raises(UserError, match=r"`qlora` and `offload` both decide the tier of optimizer w") as refused:
        claimed.claim("offload", "*", tier="disk")
    assert "qlora: host; offload: disk" in refused.value.why
    assert claimed.claim("qlora", "optimizer w", tier="disk").rows["optimizer w"].decision.tier == "disk", "a room may change its own mind"
    with pytest.raises(UserError, match="claims `nothing`"):
        PLAN.claim("qlora", "nothing", place="keep")


def test_json_round_trip_and_a_diff_of_one_line() -> None:
    plan = PLAN.claim("fp8", "3 *", codec="bf16")
    assert MemoryPlan.from_json(plan.to_json()) == plan
    assert MemoryPlan.from_json(PLAN.to_json()).decisions() == PLAN.decisions() == {3: Decision(), 4: Decision("recompute", spans=((7, None), (9, 12)))}
    changed = [(a, b) for a, b in zip(PLAN.to_json().splitlines(), plan.to_json().splitlines(), strict=True) if a != b]
    assert len(changed) == 1
