"""Files in: every fault is named with its place, and nothing of the text is lost."""

from __future__ import annotations

import gzip
import json
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lilliput.base.errors import UserError
from lilliput.data import sources
from lilliput.data.sources import Reader, expand, is_text, shape


def chunks(path):
    return "".join(Reader([path]).chunks(path))


def records(path):
    return [record for _, record in Reader([path]).records(path)]


def test_expand_files_globs_folders(tmp_path, monkeypatch):
    for name in ("b.txt", "a.txt", "c.jsonl", "d.bin", ".hidden.txt", "sub/e.txt.gz"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    names = lambda paths: [str(path.relative_to(tmp_path)) for path in expand(paths)]
    assert names(tmp_path / "d.bin") == ["d.bin"]
    assert names(str(tmp_path / "*.txt")) == ["a.txt", "b.txt"]
    assert names([str(tmp_path / "b.txt"), str(tmp_path / "*.txt")]) == ["b.txt", "a.txt"]
    assert names(str(tmp_path / "**/*.gz")) == ["sub/e.txt.gz"]
    assert names(str(tmp_path)) == ["a.txt", "b.txt", "c.jsonl", "sub/e.txt.gz"]


def test_expand_faults(tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "empty").mkdir()
    cases = {
        "": "no data was given",
        "data:shakespeare": "not on this machine",
        str(tmp_path / "*.json"): "no file matches",
        str(tmp_path / "nots.txt"): "there is no data file",
        str(tmp_path / "no" / "notes.txt"): "there is no data file",
        str(tmp_path / "empty"): "has no data files",
    }
    errors = {}
    for path, message in cases.items():
        with pytest.raises(UserError, match=message) as error:
            expand(path)
        errors[message] = error.value
    with pytest.raises(UserError, match="nots") as error:
        expand(str(tmp_path / "nots.txt"))
    assert error.value.fix == "did you mean `notes.txt`?"
    with pytest.raises(UserError) as error:
        expand("data:shakespeare")
    assert error.value.fix == "lilliput pull data:shakespeare"


@settings(deadline=None, max_examples=100)
@given(text=st.text(min_size=1, max_size=200).map(lambda text: text.lstrip("\ufeff")).filter(str.strip), block=st.integers(1, 9), zipped=st.booleans())
def test_text_comes_through_any_block_size(tmp_path_factory, text, block, zipped):
    path = tmp_path_factory.mktemp("text") / ("a.txt.gz" if zipped else "a.txt")
    path.write_bytes(gzip.compress(text.encode()) if zipped else text.encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "BLOCK", block)
        assert chunks(path) == text


@settings(deadline=None, max_examples=100)
@given(
    rows=st.lists(st.dictionaries(st.text(max_size=5), st.text(max_size=20), min_size=1), min_size=1, max_size=8),
    block=st.integers(1, 30),
    suffix=st.sampled_from([".jsonl", ".jsonl.gz", ".json"]),
)
def test_records_come_through_any_block_size(tmp_path_factory, rows, block, suffix):
    path = tmp_path_factory.mktemp("rows") / f"a{suffix}"
    content = json.dumps(rows) if suffix == ".json" else "\r\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    path.write_bytes(gzip.compress(content.encode()) if suffix.endswith(".gz") else content.encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "BLOCK", block)
        assert records(path) == rows


def test_parquet(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet", reason="needs the extra `parquet`")
    import pyarrow

    rows = [{"text": f"row {i}", "n": i} for i in range(600)]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert records(tmp_path / "a.parquet") == rows
    (tmp_path / "b.parquet").write_bytes(b"PAR1 nonsense")
    with pytest.raises(UserError, match=r"b\.parquet is not a parquet file"):
        records(tmp_path / "b.parquet")


def test_parquet_without_the_extra(tmp_path, monkeypatch):
    (tmp_path / "a.parquet").write_bytes(b"x")
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(UserError) as error:
        records(tmp_path / "a.parquet")
    assert error.value.fix == "pip install 'lilliput[parquet]'"


@pytest.mark.parametrize("block", [3, 1 << 18])
@pytest.mark.parametrize(
    ("name", "content", "what", "why"),
    [
        ("a.txt", b"", "is empty", "0 bytes"),
        ("a.txt", b" \n\t\n", "is empty", "4 bytes"),
        ("a.jsonl", b"\n\n", "is empty", "2 bytes"),
        ("a.json", b"", "is empty", "0 bytes"),
        ("a.json", b"[]", "is empty", "2 bytes"),
        ("a.txt", b"good \xc3\xa9 bad \xff after", "is not UTF-8", "byte 0xff at offset 12"),
        ("a.txt", b"cut short \xe6\x97", "is not UTF-8", "at offset 10"),
        ("a.txt", "hi".encode("utf-16"), "is not UTF-8", "at offset 0"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n', "is not UTF-8", "byte 0xff at offset 24"),
        ("a.json", b'[{"text": "\xff"}]', "is not UTF-8", "at offset 11"),
        ("a.jsonl", b'{"text": "a"}\n\n{"text": \n{"text": "b"}', "line 3: broken JSON", "Expecting value"),
        ("a.json", b'[{"text": "a"},\n', "a.json: broken JSON", "line 2"),
        ("a.json", b'{"text": "a"}', "not a list", "one dict"),
        ("a.jsonl", b'{"text": "a"}\n[1]', "line 2: not a record", "a list"),
        ("a.jsonl", b"[" * 100000, "line 1: broken JSON", ""),
        ("a.txt.gz", b"not gzip", "not a whole gzip file", "gzipped"),
        ("a.txt.gz", gzip.compress(b"hello" * 100, mtime=0)[:-12], "not a whole gzip file", ""),
    ],
)
def test_faults_in_files(tmp_path, monkeypatch, name, content, what, why, block):
    monkeypatch.setattr(sources, "BLOCK", block)
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError, match=what) as error:
        chunks(path) if is_text(path) else records(path)
    assert why in error.value.why and str(path) in error.value.what


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_no_permission(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("x")
    path.chmod(0)
    with pytest.raises(UserError, match="cannot read") as error:
        chunks(path)
    assert "Permission denied" in error.value.why


def test_a_file_that_cannot_be_read(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    path.write_text("x")
    reader = Reader([path])
    path.unlink()
    with pytest.raises(UserError, match="cannot read") as error:
        list(reader.chunks(path))
    assert "No such file" in error.value.why


def test_byte_order_mark_is_dropped(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfhello")
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "a"}\n')
    assert chunks(tmp_path / "a.txt") == "hello" and records(tmp_path / "a.jsonl") == [{"text": "a"}]


def test_progress_counts_bytes_on_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "BLOCK", 10)
    paths = [tmp_path / "a.txt", tmp_path / "b.jsonl"]
    paths[0].write_text("x" * 25)
    paths[1].write_text('{"text": "y"}\n' * 2)
    seen = []
    reader = Reader(paths, lambda done, total: seen.append((done, total)))
    list(reader.chunks(paths[0])), list(reader.records(paths[1]))
    assert [total for _, total in seen] == [53] * len(seen)
    assert [done for done, _ in seen] == [10, 20, 25, 39, 53, 53]


def test_shapes():
    assert shape({"text": "a", "id": 1}, "f line 1") == ("text", ("text",))
    assert shape({"prompt": "a", "messages": []}, "") == ("messages", ("messages",))
    assert shape({"instruction": "a", "input": "", "output": "b"}, "") == ("instruction", ("instruction", "output"))
    assert shape({"question": "a", "answer": "b", "text": "c"}, "", "text") == ("text", ("text",))
    with pytest.raises(UserError, match="f line 7: unknown kind of record") as error:
        shape({"prompt": "a", "chosen": "b"}, "f line 7")
    assert "chosen, prompt" in error.value.why and "prompt+completion" in error.value.why and "messages or conversations" in error.value.why
    with pytest.raises(UserError) as error:
        shape({"text": "a"}, "", "messages")
    assert "known: messages: messages or conversations" in error.value.why
