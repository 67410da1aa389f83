"""Estimates in words, rows and JSON."""

from __future__ import annotations

import json

from boxes import machine

from lilliput.base.job import Job
from lilliput.models.facts import facts
from lilliput.models.sizes import PRESETS
from lilliput.plan import report
from lilliput.plan.estimate import Estimate, estimate_serving, estimate_training


def gpt2(gib: float) -> Estimate:
    return estimate_training(Job.load(None, ["data.sequence=1024", "train.tokens_per_step=8192", "train.micro_batch=8"]), facts(PRESETS["gpt2"]), machine(gib))


def test_rows_are_sorted_and_end_with_the_peak() -> None:
    estimate = gpt2(64)
    rows = report.rows(estimate)
    weights = [estimate.ledger.bytes(row["term"]) for row in rows[:-1]]
    assert weights == sorted(weights, reverse=True) and all(weights)
    assert rows[-1]["term"] == "PEAK" and rows[-1]["bar"] == "#" * report.WIDTH
    assert all(tuple(row) == report.COLUMNS and len(row["bar"]) <= report.WIDTH for row in rows)
    share = estimate.ledger.bytes("optimizer") / estimate.budget
    assert next(row for row in rows if row["term"] == "optimizer")["share"] == f"{share:.1%}"


def test_three_sentences_when_it_fits() -> None:
    estimate = gpt2(64)
    verdict, big, rest = report.sentences(estimate)
    assert verdict.startswith("Fits: ") and "GiB" in verdict
    assert [name for name, _ in estimate.biggest] == [
        part.rsplit(" ", 2)[0] for part in big.removeprefix("Biggest at the peak: ").rstrip(".").split(", ")[:1]
    ] + [n for n, _ in estimate.biggest[1:]]
    assert "1 x 8 sequences of 1024 tokens" in rest and "at least" in rest and "estimate" in rest


def test_three_sentences_when_it_does_not() -> None:
    estimate = gpt2(10)
    verdict, _, rest = report.sentences(estimate)
    assert verdict.startswith("Does not fit: ")
    assert rest.startswith(f"Nearest fix: {estimate.fixes[0].words} (peak ")
    assert all(fix.words in rest for fix in estimate.fixes)


def test_json_document() -> None:
    estimate = gpt2(10)
    document = json.loads(json.dumps(report.to_dict(estimate)))
    assert document["fits"] is False and document["peak_bytes"] == estimate.peak and document["moment"] == estimate.moment
    assert document["terms"]["gradients"] == {
        "bytes": estimate.ledger.bytes("gradients"), "tier": "device", "alive": ["backward", "update"], "flops": 0.0, "traffic": 0.0,
            "written": 0.0, "lane": "compute",
    }  # fmt: skip
    assert [fix["words"] for fix in document["fixes"]] == [fix.words for fix in estimate.fixes]
    assert document["seconds_at_least"]["compute"] > 0


def test_serving() -> None:
    estimate = estimate_serving(facts(PRESETS["llama-7b"]), machine(24, "cuda"), 4, 1024, 2)
    document = json.loads(json.dumps(report.to_dict(estimate)))
    assert document["max_sequences"] == estimate.max_sequences and document["tokens_per_second_at_most"] > 0
    assert f"{estimate.max_sequences:,} sequences of 1,024" in report.sentences(estimate)[2]
    assert "kv" in [row["term"] for row in report.rows(estimate)]


def test_a_device_without_room() -> None:
    rows = report.rows(gpt2(0.25))
    assert rows[0]["share"] == "no room"
