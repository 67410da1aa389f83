"""The picture of a step's memory: its line is the metered one, its peak the plan's, and only two kinds of file are drawn."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from lilliput.base import hardware
from lilliput.base.errors import UserError
from lilliput.base.job import Job
from lilliput.memory.meter import Meter
from lilliput.models.facts import facts
from lilliput.models.sizes import PRESETS
from lilliput.plan import picture
from lilliput.plan.estimate import estimate_training

SPEC = PRESETS["tiny"]
WORDS = ["model=tiny", "data.sequence=64", "train.micro_batch=2", "train.tokens_per_step=128"]


def drawn(*words: str) -> tuple[picture.Timeline, picture.Timeline]:
    job = Job.load(None, [*WORDS, *words])
    return picture.timelines(job, SPEC, estimate_training(job, facts(SPEC), hardware.detect()))


@pytest.mark.parametrize("words", [(), ("remat.every=1",), ("remat.plan=sqrt", "offload.states=optimizer")], ids=lambda w: "+".join(w) or "plain")
def test_the_line_has_the_metered_peak(words: tuple[str, ...]) -> None:
    from rigs import make_rig, random_batch

    planned, plain = drawn(*words)
    job = Job.load(None, [*WORDS, *words])
    for line, rooms in ((planned, job.rooms), (plain, {n: r for n, r in job.rooms.items() if n == "offload"})):
        rig = make_rig(rooms, SPEC, sequences=2, tokens=64)
        batch = random_batch(SPEC.vocab, micros=1, sequences=2, tokens=64)
        host = rig.optimizer.held() if "offload" in rooms else []
        with Meter(known=[*rig.model.parameters(), *host, batch[0].tokens_BT, batch[0].targets_BT]) as meter:
            loss, _ = rig.objective(rig.model, batch[0])
            (loss / batch[0].weight).backward()
        assert line.peak - line.standing == meter.peak
        count = sum(p.numel() for p in rig.model.parameters())
        assert line.standing == count * (2 if host else 12) + 16 * 128 + 8, "weights and moments, tokens and loss; gradients come with the line"
        assert 0 < line.forwards < len(line.line)
    assert (planned.peak < plain.peak) == any("remat" in word for word in words)


def test_two_kinds_of_files(tmp_path: Path) -> None:
    planned, plain = drawn("remat.every=1")
    for kind in picture.KINDS:
        path = picture.draw(planned, plain, tmp_path / "deep" / f"memory{kind}", "tiny")
        assert path.stat().st_size > 5000 and [p.name for p in path.parent.iterdir() if p.suffix == ".tmp"] == []
    with pytest.raises(UserError, match="cannot draw") as fault:
        picture.check(tmp_path / "memory.pdf")
    assert fault.value.fix.endswith("memory.svg")


def test_what_was_chosen_is_drawn() -> None:
    """A budget chooses sections; the picture is of those, not of the job without them."""
    plain = drawn()[0]
    limit = plain.peak * 9 // 10
    assert drawn(f"memory.device={limit}B", "memory.host=1GB")[0].peak <= limit


def test_a_picture_makes_no_files(tmp_path: Path) -> None:
    pages = f"poet.scratch={tmp_path / 'pages'}", "poet.budget=1GB"
    for words in (("infinity.parameters=disk", "infinity.optimizer=disk", f"infinity.folder={tmp_path / 'scratch'}"), pages):
        planned, _ = drawn(*words)
        assert planned.peak > 0 and list(tmp_path.iterdir()) == []


def test_moments_that_leave_are_seen_leaving() -> None:
    """A paged optimizer's line stays below its budget, by no more than a page."""
    plain = drawn()[0]
    page = 8 * max(math.prod(shape) for shape in facts(SPEC).shapes.values())
    limit = plain.peak - 2 * page
    paged, kept = drawn(f"paged.budget={limit}B")
    assert limit - page < paged.peak <= limit < kept.peak == plain.peak and paged.line[-1] < kept.line[-1]
