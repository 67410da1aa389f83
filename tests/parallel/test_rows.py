"""The memory plan shows every tensor: what each room does to parameters, gradients and moments is its claim, and two that change one thing are refused."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
from rigs import make_rig

from lilliput.base.errors import UserError
from lilliput.base.protocols import Phase
from lilliput.memory.plan import Decision, MemoryPlan, Row
from lilliput.parallel.rig import Rig
from lilliput.train.fp8 import Fp8
from lilliput.train.infinity import Infinity
from lilliput.train.offload import Offload
from lilliput.train.paged import Paged
from lilliput.train.qlora import Qlora
from lilliput.train.remat import Remat

MUCH = {"device": 1 << 40}
Q = "layers.1.attn.q_proj"


def plan(**rooms: Any) -> MemoryPlan:
    return make_rig(rooms, budget=MUCH).plan


def test_every_tensor_has_its_row_and_the_bytes_add_up() -> None:
    rig = make_rig({}, budget=MUCH)
    kinds: dict[str, int] = {}
    for name, row in rig.plan.rows.items():
        kind = name.partition(" ")[0]
        kinds[kind] = kinds.get(kind, 0) + row.bytes
    count = sum(p.numel() for p in rig.model.parameters())
    assert (kinds["parameter"], kinds["gradient"], kinds["moments"]) == (4 * count, 4 * count, 8 * count)
    assert not any(row.claims for row in rig.plan.rows.values()) and MemoryPlan.from_json(rig.plan.to_json()) == rig.plan


@pytest.mark.parametrize(
    ("rooms", "name", "decision", "claims"),
    [
        ({"offload": Offload()}, f"parameter {Q}.weight", Decision(codec="bf16"), {"codec": "offload"}),
        ({"offload": Offload()}, f"moments {Q}.weight", Decision(tier="host"), {"tier": "offload"}),
        ({"infinity": Infinity()}, f"gradient {Q}.weight", Decision(tier="host"), {"tier": "infinity"}),
        ({"infinity": Infinity(), "qlora": Qlora(rank=4)}, f"parameter {Q}.weight", Decision(tier="host", codec="codes"),
         {"tier": "infinity", "codec": "qlora"}),
        ({"paged": Paged(budget="1GB")}, f"moments {Q}.weight", Decision("page"), {"place": "paged"}),
        ({"fp8": Fp8()}, f"buffer {Q}.product.codes", Decision(), {"row": "fp8"}),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, Mapping) and "tier" not in value else None,
)
def test_what_a_room_does_is_its_claim(rooms: dict, name: str, decision: Decision, claims: dict) -> None:
    row = plan(**rooms).rows[name]
    assert row.decision == decision and dict(row.claims) == claims


def test_codes_and_adapters() -> None:
    found = plan(qlora=Qlora(rank=4), remat=Remat(), paged=Paged(budget="1GB"))
    brought = [name for name, row in found.rows.items() if ("row", "qlora") in row.claims]
    assert any(name.startswith("moments ") and ".deltas." in name for name in brought), "the adapter's"
    assert f"gradient {Q}.weight" not in found.rows and found.rows[f"parameter {Q}.weight"].bytes < 0.3 * 64 * 64 * 4
    assert any(dict(row.claims) == {"row": "qlora", "place": "paged"} for row in found.rows.values()), "who brings a row does not own its place"
    assert any(("place", "remat") in row.claims and row.decision.place == "recompute" for row in found.rows.values())
    assert set(found.decisions()) == {int(name.split()[0]) for name in found.rows if name.split()[0].isdigit()}


class Mover:
    """A room that sends all parameters to a tier."""

    needs: tuple[str, ...] = ()

    def __init__(self, tier: str) -> None:
        self.tier = tier

    def acts(self) -> dict:
        return {Phase.SWAP: lambda rig: replace(rig, homes=(*rig.homes, ("*", replace(rig.homes[0][1], tier=self.tier))))}

    def refuses(self, others: Any, facts: Any) -> None:
        return None


def test_two_rooms_that_place_one_tensor_are_refused_by_name() -> None:
    with pytest.raises(UserError, match=r"`one` and `two` both decide the tier of parameter embed\.weight") as refused:
        make_rig({"one": Mover("host"), "two": Mover("disk")})
    assert "one: host; two: disk" in refused.value.why


def test_a_run_that_goes_on_keeps_its_activations_and_writes_its_rows_anew() -> None:
    first = make_rig({"remat": Remat()}, budget=MUCH)
    stale = replace(first.plan, rows={**first.plan.rows, "parameter gone": Row(1)})
    again = make_rig({"remat": Remat()}, budget=MUCH, plans={stale.trace: stale})
    assert again.plan.rows == first.plan.rows and isinstance(again, Rig)


@pytest.mark.parametrize("micros", [1, 2])
@pytest.mark.parametrize("room", [Offload(), Offload(delay=2), Offload(tile=4096)], ids=["plain", "delayed", "tiles"])
def test_offloads_rows_are_what_the_host_holds(room: Offload, micros: int) -> None:
    rig = make_rig({"offload": room}, budget=MUCH, micro_batches=micros)
    host = [(name, row) for name, row in rig.plan.rows.items() if row.decision.tier == "host"]
    assert sum(row.bytes for _, row in host) == sum(t.nbytes for t in rig.optimizer.held())
    masters = [row for name, row in host if name.startswith("master ")]
    assert len(masters) == len(rig.trainable()) and all(dict(row.claims) == {"row": "offload"} for row in masters)
    count = rig.model.get_parameter(f"{Q}.weight").numel()
    assert rig.plan.rows[f"gradient {Q}.weight"].bytes == (4 if micros > 1 else 2) * (2 if room.delay == 2 else 1) * count
    rig.close(rig)


@pytest.mark.parametrize("rooms", [{"fp8": Fp8()}, {"fp8": Fp8(forward="e5m2")}, {"fp8": Fp8(), "remat": Remat(budget="100MB")}], ids=["e4m3", "e5m2", "remat"])
def test_activations_in_eight_bits_are_fp8s(rooms: dict) -> None:
    rig = make_rig(rooms, budget=MUCH)
    coded = {name: row for name, row in rig.plan.rows.items() if name[0].isdigit() and ("row", "fp8") in row.claims}
    dim, ffn, layers = rig.model.spec.dim, rig.model.spec.ffn, rig.model.spec.layers
    assert sum(row.bytes for row in coded.values()) == 2 * 32 * layers * (3 * dim + ffn), "a byte a number of what q, k, v; o; gate, up; down read"
    kinds = {row.dtype for row in coded.values()}
    assert kinds == {"float8_" + rooms["fp8"].forward} and MemoryPlan.from_json(rig.plan.to_json()) == rig.plan
    assert not any(("row", "fp8") in row.claims for name, row in rig.plan.rows.items() if name[0].isdigit() and name not in coded)
