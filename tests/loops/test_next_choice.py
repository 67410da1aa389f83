"""Where the plan to the byte refuses the sections that closed forms chose, the next set is taken, and each refusal is said."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from lilliput.base import hardware
from lilliput.base.errors import DoesNotFit
from lilliput.base.job import Job
from lilliput.base.show import Show
from lilliput.loops.train import train
from lilliput.models.facts import facts
from lilliput.models.load import resolve_spec
from lilliput.plan.estimate import estimate_training
from lilliput.plan.ledgers import training_ledger


class Said(Show):
    """What a run tells its user."""

    def __init__(self) -> None:
        super().__init__(json=True)
        self.lines: list[str] = []

    def line(self, text: str) -> None:
        self.lines.append(text)


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    (tmp_path / "text.txt").write_text("the giant sleeps on the small sand\n" * 200)
    return ["model=tiny", "threads=1", f"data.path={tmp_path / 'text.txt'}", "data.tokenizer=bytes", "data.sequence=64", "train.init=scratch", "train.steps=2",
            "train.tokens_per_step=256", "train.micro_batch=4", "train.eval_tokens=256", "memory.host=1GB"]  # fmt: skip


def closed_form(words: list[str]) -> int:
    """Bytes that the plain step takes by arithmetic: a few less than by its plan."""
    known = facts(replace(resolve_spec("tiny")[0], vocab=259))
    site = estimate_training(Job.load(overrides=words), known, hardware.detect()).site
    return training_ledger(known, site, {}, "fp32", 1).peak()[0]


def test_the_next_set_is_tried_and_the_refusal_is_said(words: list[str], tmp_path: Path) -> None:
    said = Said()
    result = train(Job.load(overrides=[*words, f"memory.device={closed_form(words)}B"]), tmp_path / "run", said)
    pinned = json.loads((tmp_path / "run" / "rooms.json").read_text())
    assert result.steps == 2 and len(pinned) == 1, said.lines
    refusal = "not nothing more: planned to the byte: a step does not fit in "
    assert any(line.startswith(refusal) and "bytes are the least" in line for line in said.lines), said.lines
    plan = json.loads((tmp_path / "run" / "memory.json").read_text().replace("\n", " "))
    assert plan["measured"]["device"] <= plan["predicted"]["bytes"] <= plan["budget"]["device"]


def test_where_every_set_is_refused_the_least_is_said(words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []

    def refuse(rig, evicts):
        tried.append(rig)
        raise DoesNotFit("a step does not fit in it", "it is the test's", "more", 123_456_789)

    monkeypatch.setattr("lilliput.parallel.rig.planned", refuse)
    with pytest.raises(DoesNotFit) as refused:
        train(Job.load(overrides=[*words, "memory.device=100MB"]), tmp_path / "run", Said())
    assert len(tried) > 5 and "memory.device=123456789B" in refused.value.fix
    assert not (tmp_path / "run" / "rooms.json").exists()
