"""Perplexity: which tokens are scored, and that the number is the plain one."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lilliput.base.errors import UserError
from lilliput.base.job import Eval
from lilliput.base.show import Show
from lilliput.data.tokenizer import Tokenizer
from lilliput.loops.evaluate import Perplexity, evaluate, open_tasks, perplexity, read_text, rows, spans, to_dict
from lilliput.models.load import load_model

WINO = {
    "instruction": "Please choose the correct answer to fill in the blank to complete the given sentence: Ann met Bo, so _ said hi.\n\n"
    "Option1: Ann Option2: Bo Answer format: option1/option2",
    "answer": "option2",
}


@pytest.fixture(scope="module")
def tiny() -> tuple:
    model, tokenizer, _ = load_model("lilliput-tiny", "cpu")
    return model, tokenizer


def tokens(count: int) -> list[int]:
    return torch.randint(0, 1000, (count,), generator=torch.Generator().manual_seed(1)).tolist()


@given(count=st.integers(2, 200), window=st.integers(2, 40), share=st.floats(0.01, 1))
@settings(deadline=None)
def test_sliding_windows_score_each_token_once(count: int, window: int, share: float) -> None:
    stride = max(1, min(window - 1, round(window * share)))
    found = list(spans(count, window, stride))
    scored = [t for _, first, end in found for t in range(first, end)]
    assert scored == list(range(1, count))
    assert all(begin < first < end <= begin + window for begin, first, end in found)
    assert all(first - begin >= min(window - stride, first) for begin, first, _ in found), "later windows have at least window - stride tokens before"


@given(count=st.integers(2, 200), window=st.integers(2, 40))
@settings(deadline=None)
def test_windows_side_by_side_leave_out_their_first_token_and_the_rest(count: int, window: int) -> None:
    found = list(spans(count, window, window))
    if count <= window:
        assert found == [(0, 1, count)]
    else:
        assert found == [(b, b + 1, b + window) for b in range(0, count - window + 1, window)]


@torch.inference_mode()
def plainly(model, ids: list[int], window: int, stride: int) -> float:  # type: ignore[no-untyped-def]
    """Mean NLL, one window after another, whole logits."""
    total, count = 0.0, 0
    for begin, first, end in spans(len(ids), window, stride):
        logprobs = model(torch.tensor([ids[begin:end]]))[0].double().log_softmax(-1)
        for at in range(first, end):
            total, count = total - float(logprobs[at - begin - 1, ids[at]]), count + 1
    return total / count


@pytest.mark.parametrize(("count", "window", "stride"), [(230, 32, 32), (230, 32, 8), (230, 32, 31), (20, 64, 64), (65, 64, 16)])
def test_equals_the_plain_computation(tiny, count: int, window: int, stride: int) -> None:  # type: ignore[no-untyped-def]
    ids = tokens(count)
    expected = plainly(tiny[0], ids, window, stride)
    for batch in (1, 3):
        result = perplexity(tiny[0], ids, window=window, stride=stride, batch=batch)
        assert result.nll == pytest.approx(expected, rel=1e-5) and result.perplexity == pytest.approx(math.exp(expected), rel=1e-4)
        assert result.scored == sum(end - first for _, first, end in spans(count, window, stride)) and result.tokens == count


def test_limit_and_progress(tiny) -> None:  # type: ignore[no-untyped-def]
    ids, err = tokens(200), io.StringIO()
    result = perplexity(tiny[0], ids, window=32, limit=2, batch=4, show=Show(out=io.StringIO(), err=err))
    assert (result.windows, result.scored) == (2, 62)
    assert result.nll == pytest.approx(plainly(tiny[0], ids[:64], 32, 32), rel=1e-5)
    assert "perplexity 2/2" in err.getvalue()


@pytest.mark.parametrize(
    ("ids", "options", "words"),
    [([1], {}, "too short"), ([1] * 9, {"window": 4, "stride": 5}, "skips tokens"), ([1] * 9, {"window": 99999}, "too long")],
)
def test_what_cannot_be_measured(tiny, ids: list[int], options: dict, words: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(UserError, match=words):
        perplexity(tiny[0], ids, **{"window": 4, **options})


def test_texts(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(" \n = A = \n \n one . \u2028 two \n")
    (tmp_path / "wiki.raw").write_text((tmp_path / "a.txt").read_text())
    (tmp_path / "r.jsonl").write_text('{"text": "x"}\n{"text": "y"}\n')
    assert read_text(tmp_path / "a.txt") == " \n = A = \n \n one . \u2028 two \n"
    assert read_text(tmp_path / "wiki.raw") == "\n\n" + " = A = \n" + "\n\n" + "\n\n" + " one . \u2028 two \n"
    assert read_text(tmp_path / "r.jsonl") == "x\n\ny"
    with pytest.raises(UserError, match="no data file"):
        read_text(tmp_path / "none.txt")


def test_files_are_checked_before_anything_is_measured(tmp_path: Path) -> None:
    (tmp_path / "winogrande.json").write_text(json.dumps([WINO] * 3))
    for fields, words in [
        ({"tasks": "perplexitee", "path": str(tmp_path)}, "unknown task"),
        ({"tasks": "winogrande"}, "nothing to measure winogrande on"),
        ({"tasks": ("winogrande", "piqa"), "path": str(tmp_path)}, "0 files for task piqa"),
        ({"tasks": " , ", "path": str(tmp_path)}, "no task"),
    ]:
        with pytest.raises(UserError, match=words):
            open_tasks(Eval(**fields))
    opened = open_tasks(Eval(tasks="winogrande", path=str(tmp_path), limit=2))
    assert opened.text is None and len(opened.questions["winogrande"][1]) == 2


def test_all_that_was_asked_in_order(tiny, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / "winogrande.json").write_text(json.dumps([WINO] * 3))
    (tmp_path / "text.txt").write_text("To be, or not to be, that is the question. " * 20)
    work = Eval(tasks="winogrande", path=str(tmp_path), window=64)
    both = open_tasks(work).__class__(read_text(tmp_path / "text.txt"), open_tasks(work).questions)
    first, second = results = evaluate(*tiny, both, work)
    assert isinstance(first, Perplexity) and 1 < first.perplexity < 2000 and second.task == "winogrande" and second.questions == 3
    assert [row["task"] for row in rows(results)] == ["perplexity", "winogrande"] and f"{first.scored:,} tokens" == rows(results)[0]["n"]
    assert json.loads(json.dumps(to_dict(results)))[1]["metrics"]["acc"][0] in (0.0, 1.0)


@pytest.mark.shared
def test_wikitext_gives_the_published_token_counts(shared_data: Path, smollm2: Path) -> None:
    from lilliput.models.checkpoints import open_checkpoint

    text = read_text(shared_data / "wikitext-2" / "wiki.test.raw")
    assert len(Tokenizer.from_folder(shared_data / "gpt2-tokenizer").encode(text)) == 287_644
    assert len(open_checkpoint(smollm2).tokenizer().encode(text)) == 304_978


@pytest.mark.slow
@pytest.mark.shared
def test_reference_perplexity(shared_data: Path, smollm2: Path) -> None:
    model, tokenizer, _ = load_model(smollm2)
    ids = tokenizer.encode(read_text(shared_data / "wikitext-2" / "wiki.test.raw"))
    ten = perplexity(model, ids, limit=10)
    assert ten.perplexity == pytest.approx(28.53, rel=1e-3) and ten.scored == 10_230
    forty = perplexity(model, ids, limit=40)
    assert forty.perplexity == pytest.approx(24.464, rel=1e-3) and forty.scored == 40_920
