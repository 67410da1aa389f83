"""The POET room: its program's solution is executed to the byte and to the bit, pages to memory or to a file, and holds its budget."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rigs import make_rig, random_batch

from lilliput.base.errors import DoesNotFit
from lilliput.base.hardware import Links
from lilliput.data.batch import MicroBatch
from lilliput.memory.capture import capture
from lilliput.memory.meter import Meter, storage_bytes
from lilliput.memory.trace import Trace
from lilliput.models.sizes import PRESETS
from lilliput.parallel.rig import Rig
from lilliput.train.poet import Poet

SPEC = replace(PRESETS["llama-3m"], layers=4)
SHAPE = {"sequences": 4, "tokens": 128}
BATCH = random_batch(65, micros=1, **SHAPE)


def stepped(rig: Rig) -> tuple[int, list[torch.Tensor]]:
    """(metered peak above weights and optimizer, gradients) of one micro-batch."""
    with Meter(known=[*rig.model.parameters(), BATCH[0].tokens_BT, BATCH[0].targets_BT]) as meter:
        rig.schedule(rig, BATCH, BATCH[0].weight)
    return meter.peak, [p.grad for p in rig.model.parameters()]


@pytest.mark.parametrize("where", ["host", "disk"])
def test_a_budget_between_is_met_with_pages_and_the_same_bits(where: str, tmp_path: Path) -> None:
    plain = make_rig({}, SPEC, **SHAPE)
    state = storage_bytes([*plain.model.parameters(), *plain.optimizer.state().values()])
    peak, expected = stepped(plain)
    budget = state + round(0.85 * peak)
    scratch = str(tmp_path) if where == "disk" else ""
    rig = make_rig({"poet": Poet(budget=f"{budget}B", scratch=scratch, stages=6)}, SPEC, **SHAPE)
    used, gradients = stepped(rig)
    assert "POET" in rig.plan.planner and used + state <= budget + 64  # 64: the schedule's own scalars
    assert all(torch.equal(a, b) for a, b in zip(gradients, expected, strict=True))
    store = next(iter(rig.objective.ready.values())).executor.stores[where]
    simulated = next(iter(rig.objective.ready.values())).simulation
    assert store.written == store.read_back == simulated.moved.get(where, 0) > 0, "bytes really went there and came back"
    if where == "disk":
        assert sum(f.stat().st_size for f in tmp_path.iterdir()) == store.bytes >= store.written


def test_what_is_impossible_or_contradictory_is_refused() -> None:
    facts = make_rig({}).facts
    with pytest.raises(DoesNotFit, match="no schedule fits in 1MB") as refused:
        make_rig({"poet": Poet(budget="1MB", stages=4)}, SPEC, **SHAPE)
    assert refused.value.needs > 0 and f"poet.budget={refused.value.needs}B" in refused.value.fix
    assert "remat" in Poet(budget="1GB").refuses({"remat": None}, facts)
    assert "board" in Poet(budget="1GB", objective="energy").refuses({}, facts)
    assert "poet.budget" in Poet().refuses({}, facts)


def test_joules_of_the_board_decide_what_pays() -> None:
    """Software floats (M0+) cost more joules than a page, an M4F's fewer: the same budget is met by paging there and mostly by running again here."""
    plain = make_rig({}, SPEC, **SHAPE)
    state = storage_bytes([*plain.model.parameters(), *plain.optimizer.state().values()])
    budget = state + round(0.85 * stepped(plain)[0])
    paged = {}
    for board in ("mkr1000", "m4f"):
        rig = make_rig({"poet": Poet(budget=f"{budget}B", objective="energy", board=board, stages=6)}, SPEC, **SHAPE)
        paged[board] = rig.plan.predicted.get("host peak", 0)
    assert paged["mkr1000"] > paged["m4f"]


def test_pages_to_a_disk_take_its_time() -> None:
    """The same budget, a fast and a slow disk behind the page file: what is paged there is run again here, and takes longer."""
    plain = make_rig({}, SPEC, **SHAPE)
    state = storage_bytes([*plain.model.parameters(), *plain.optimizer.state().values()])
    room = Poet(budget=f"{state + round(0.85 * stepped(plain)[0])}B", scratch="unused", stages=6)
    trace, found = traced(plain), {}
    for speed in (1e12, 1e6):
        hardware = replace(plain.site.hardware, links=Links(nvme_read=speed, nvme_write=speed))
        _, decisions = room.choose(trace, replace(plain, site=replace(plain.site, hardware=hardware)), plain.standing())
        found[speed] = sum(trace.storages[s].bytes for s, d in decisions.items() if d.place == "page")
    assert found[1e12] > 0 == found[1e6], found


def test_a_deadline_is_kept_at_the_fewest_joules() -> None:
    """By a board's seconds: what is chosen within a deadline between the quickest and the thriftiest schedule meets it; an earlier one is refused."""
    plain = make_rig({}, SPEC, **SHAPE)
    budget = plain.standing() + round(0.85 * stepped(plain)[0])
    knobs = {"budget": f"{budget}B", "objective": "energy", "board": "mkr1000", "stages": 6}
    free = make_rig({"poet": Poet(**knobs)}, SPEC, **SHAPE).objective.ready.popitem()[1]
    seconds = free.simulation.seconds
    assert make_rig({"poet": Poet(**knobs, deadline=seconds * 1.001)}, SPEC, **SHAPE).plan.predicted["seconds"] <= seconds * 1.001
    with pytest.raises(DoesNotFit, match="no schedule") as refused:
        make_rig({"poet": Poet(**knobs, deadline=seconds / 50)}, SPEC, **SHAPE)
    assert "poet.deadline=" in refused.value.fix


def traced(rig: Rig) -> Trace:
    step = lambda model, tokens, targets: rig.objective(model, MicroBatch(tokens, targets, BATCH[0].weight))[0]
    return capture(rig.model, step, [BATCH[0].tokens_BT, BATCH[0].targets_BT], then=lambda loss: loss / BATCH[0].weight)[0]
