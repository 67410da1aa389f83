"""A job's data section becomes streams; what is held out is never trained on."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lilliput.base.errors import UserError
from lilliput.base.job import Data
from lilliput.data import load
from lilliput.data.calibration import calibration_batches
from lilliput.data.load import form_of, open_data, texts
from lilliput.data.tokenizer import Tokenizer

BYTES = Tokenizer.bytes_()


def drain(stream, rows):
    """All inputs and scored targets of one epoch, as byte strings."""
    batches = [stream.next(1) for _ in range(rows)]
    return {bytes(i for i in batch.tokens_BT[0].tolist() if i < 256) for batch in batches}


@settings(deadline=None, max_examples=50)
@given(tokens=st.integers(40, 400), sequence=st.integers(2, 12), holdout=st.floats(0.05, 0.5), seed=st.integers(0, 3))
def test_text_is_split_without_overlap(tmp_path_factory, tokens, sequence, holdout, seed):
    path = tmp_path_factory.mktemp("load") / "a.txt"
    path.write_bytes(bytes(33 + i % 90 for i in range(tokens - 1)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(load, "read_tokens", lambda *_: np.arange(tokens))  # every token a number of its own
        train, held = open_data(Data(path=str(path), holdout=holdout, sequence=sequence), BYTES, 512, seed)
    trained = {i for _ in range(train.rows) for b in [train.next(1)] for x in (b.tokens_BT, b.targets_BT) for i in x.flatten().tolist()}
    evaluated = {i for b in held.eval_batches(4, 10_000) for x in (b.tokens_BT, b.targets_BT) for i in x.flatten().tolist()}
    assert not trained & evaluated
    assert len(evaluated) == round(tokens * holdout) and max(trained) < min(evaluated) and max(evaluated) == tokens - 1


def test_every_kth_conversation_is_held_out(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"prompt": "p", "completion": f"answer {i:03}"}) + "\n" for i in range(50)))
    train, held = open_data(Data(path=str(path), holdout=0.1), BYTES, 512, 0)
    trained, evaluated = drain(train, 45), drain(held, 5)
    number = lambda row: int(row.split(b"answer ")[1][:3])
    assert sorted(map(number, evaluated)) == [9, 19, 29, 39, 49]
    assert len(trained) == 45 and not trained & evaluated
    train, held = open_data(Data(path=str(path), holdout=0), BYTES, 512, 0)
    assert held is None and train.summary()["rows"] == 50
    with pytest.raises(UserError, match="cannot hold out conversations") as error:
        open_data(Data(path=str(path), holdout=0.01), BYTES, 512, 0)
    assert "50 conversations is 0" in error.value.why


def test_eval_path_leaves_the_data_whole(tmp_path):
    (tmp_path / "a.txt").write_text("a" * 99)
    (tmp_path / "b.txt").write_text("b" * 20)
    train, held = open_data(Data(path=str(tmp_path / "a.txt"), eval_path=str(tmp_path / "b.txt"), sequence=10), BYTES, 512, 0)
    assert train.summary() == {"tokens": 100, "rows": 9, "left over": 9}
    assert held.summary()["tokens"] == 21
    train, held = open_data(Data(path=str(tmp_path / "a.txt"), holdout=0, sequence=10), BYTES, 512, 0)
    assert held is None


def test_sequences_that_do_not_fit(tmp_path):
    (tmp_path / "a.txt").write_text("a" * 99)
    with pytest.raises(UserError, match="longer than the model") as error:
        open_data(Data(path=str(tmp_path / "a.txt"), sequence=1024), BYTES, 512, 0)
    assert error.value.fix == "data.sequence=512"
    with pytest.raises(UserError, match="shorter than one sequence of 200") as error:
        open_data(Data(path=str(tmp_path / "a.txt"), sequence=200), BYTES, 512, 0)
    open_data(Data(path=str(tmp_path / "a.txt"), sequence=int(error.value.fix.partition("=")[2])), BYTES, 512, 0)
    with pytest.raises(UserError, match="held-out text is too short") as error:
        open_data(Data(path=str(tmp_path / "a.txt"), sequence=10, holdout=0.01), BYTES, 512, 0)
    assert "1 of 100 tokens" in error.value.why


def test_the_form_is_read_from_the_first_record(tmp_path):
    files = {"a.txt": "text", "b.jsonl": "text", "c.jsonl": "messages", "d.jsonl": "instruction"}
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "b.jsonl").write_text('{"text": "x"}')
    (tmp_path / "c.jsonl").write_text('{"messages": []}')
    (tmp_path / "d.jsonl").write_text('{"instruction": "x", "output": "y"}')
    for name, form in files.items():
        assert form_of([tmp_path / name], "auto") == form
    with pytest.raises(UserError, match="is plain text"):
        form_of([tmp_path / "a.txt"], "messages")
    with pytest.raises(UserError, match="unknown kind of record"):
        open_data(Data(path=str(tmp_path / "d.jsonl"), format="messages"), BYTES, 512, 0)


def test_texts_to_learn_a_tokenizer_from(tmp_path):
    (tmp_path / "a.txt").write_text("some text")
    (tmp_path / "b.jsonl").write_text('{"instruction": "ask", "output": "answer"}')
    assert list(texts(Data(path=str(tmp_path / "a.txt")))) == ["some text"]
    assert list(texts(Data(path=str(tmp_path / "b.jsonl")))) == ["ask", "answer"]


def test_progress_reaches_the_end(tmp_path):
    (tmp_path / "a.txt").write_text("a" * 1000)
    seen = []
    open_data(Data(path=str(tmp_path / "a.txt"), sequence=10), BYTES, 512, 0, lambda done, total: seen.append((done, total)))
    assert seen[-1] == (1000, 1000)


# ---- calibration


@settings(deadline=None, max_examples=50)
@given(tokens=st.integers(20, 200), length=st.integers(1, 20), seed=st.integers(0, 5), data=st.data())
def test_calibration_rows_do_not_overlap(tokens, length, seed, data):
    sequences = data.draw(st.integers(1, tokens // length))
    rows = calibration_batches(np.arange(tokens, dtype=np.uint16), BYTES, sequences, length, seed)
    assert len(rows) == sequences and all(row.shape == (1, length) for row in rows)
    seen = [i for row in rows for i in row[0].tolist()]
    assert len(set(seen)) == sequences * length and all(row[0].tolist() == list(range(row[0, 0], row[0, 0] + length)) for row in rows)
    again = calibration_batches(np.arange(tokens, dtype=np.uint16), BYTES, sequences, length, seed)
    assert all((a == b).all() for a, b in zip(rows, again))


def test_calibration_from_files(tmp_path):
    (tmp_path / "a.txt").write_text("abcdefgh" * 10)
    rows = calibration_batches(str(tmp_path / "a.txt"), BYTES, 4, 8, 0)
    assert [row[0].tolist() for row in rows] == [list(b"abcdefgh")] * 4
    assert len({tuple(r[0, 0].item() for r in calibration_batches(np.arange(999), BYTES, 9, 9, seed)) for seed in range(4)}) == 4
    with pytest.raises(UserError, match="too little text for 20 calibration rows") as error:
        calibration_batches(str(tmp_path / "a.txt"), BYTES, 20, 8, 0)
    assert "81 tokens give 10 rows of 8" in error.value.why
