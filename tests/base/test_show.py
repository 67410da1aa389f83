"""Show: stdout is data, stderr is talk; on a terminal and off it."""

from __future__ import annotations

import io
import json
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lilliput.base import show as module
from lilliput.base.errors import DoesNotFit, UserError
from lilliput.base.show import Show, count, duration, parse_size, size


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")


def shows(json: bool = False, terminal: bool = False) -> tuple[Show, io.StringIO, io.StringIO]:
    out, err = (Terminal(), Terminal()) if terminal else (io.StringIO(), io.StringIO())
    return Show(json, out, err), out, err


def test_data_goes_to_stdout_and_talk_to_stderr() -> None:
    show, out, err = shows()
    show.line("hello")
    show.stream("Par")
    show.stream("is")
    show.data({"never": 1})
    assert (out.getvalue(), err.getvalue()) == ("Paris", "hello\n")


def test_json_puts_one_document_on_stdout() -> None:
    show, out, err = shows(json=True)
    show.line("hello")
    show.stream("Paris")
    show.table([{"a": 1}], ("a",), "t")
    show.data({"a": (1, 2), "nan": float("nan"), "inf": [float("-inf")], "text": "ä", "none": None})
    assert json.loads(out.getvalue()) == {"a": [1, 2], "nan": None, "inf": [None], "text": "ä", "none": None} and "ä" in out.getvalue()
    assert err.getvalue() == "hello\n"


def test_plain_table_is_aligned() -> None:
    show, out, _ = shows()
    show.table([{"name": "a", "bytes": 1}, {"name": "long\nname", "bytes": 12345}, {"name": True, "bytes": 0.123456}], ("name", "bytes", "none"), "title")
    assert out.getvalue() == "title\nname        bytes  none\na               1\nlong name   12345\nyes        0.1235\n"
    show, out, _ = shows()
    show.table([], ("a", "b"))
    assert out.getvalue() == "a  b\n"


def test_terminal_table_takes_text_as_it_is() -> None:
    show, out, _ = shows(terminal=True)
    show.table([{"a": "[bold]x[/bold] :smile:", "b": 3}], ("a", "b"), "title")
    assert "[bold]x[/bold] :smile:" in out.getvalue() and "─" in out.getvalue() and "title" in out.getvalue()


def test_an_error_says_what_why_fix() -> None:
    show, out, err = shows()
    show.error(UserError("it broke", "needs 2,\nhas 1", "x=1"))
    assert (out.getvalue(), err.getvalue()) == ("", "error: it broke\n  why: needs 2,\n       has 1\n  fix: x=1\n")
    show, _, err = shows()
    show.error(UserError("it broke"))
    assert err.getvalue() == "error: it broke\n"
    show, out, err = shows(json=True)
    show.error(DoesNotFit("too big", "27 > 24", "micro_batch=4"))
    assert json.loads(out.getvalue()) == {"error": {"what": "too big", "why": "27 > 24", "fix": "micro_batch=4", "exit_code": 3}}
    assert err.getvalue().startswith("error: too big\n")


def test_colour_only_on_terminals_that_want_it(monkeypatch: pytest.MonkeyPatch) -> None:
    show, _, err = shows(terminal=True)
    show.error(UserError("it broke"))
    assert "\x1b[1;31merror:\x1b[0m it broke" in err.getvalue()
    monkeypatch.setenv("NO_COLOR", "1")
    show, out, err = shows(terminal=True)
    show.error(UserError("it broke"))
    show.table([{"a": 1}], ("a",))
    with show.bar(3, "work") as bar:
        bar.advance(3)
    assert "\x1b[3" not in err.getvalue() + out.getvalue() and "\x1b[1;3" not in err.getvalue()


def test_bar_off_a_terminal_says_something_every_tenth(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    show, out, err = shows()
    with show.bar(100, "train") as bar:
        for step in range(100):
            now[0] += 0.5
            bar.advance(1, f"loss {step}")
    lines = err.getvalue().splitlines()
    assert len(lines) == 10 and out.getvalue() == ""
    assert lines[0] == "train 10/100 (10%)  2/s  ETA 45 s  loss 9"
    assert lines[-1] == "train 100/100 (100%)  2/s  took 50 s  loss 99"


def test_bar_off_a_terminal_says_something_every_ten_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    show, _, err = shows()
    with show.bar(10_000, "pull", done=5000) as bar:
        for _ in range(12):
            now[0] += 5
            bar.advance(1)
    lines = err.getvalue().splitlines()
    assert len(lines) == 6 and lines[0] == "pull 5,002/10,000 (50%)  0.2/s  ETA 6 h 56 min"  # 4998 / 0.2 s: what was there at first is not counted


def test_bar_on_a_terminal_lets_lines_pass_above_it() -> None:
    show, out, err = shows(terminal=True)
    with show.bar(2, "[train]") as bar:
        bar.advance(1, "loss [b]1")
        show.line("a note [x]")
        bar.advance(1)
    assert "\x1b[2Ka note [x]\n" in err.getvalue() and "[train]" in err.getvalue() and "2/2" in err.getvalue() and out.getvalue() == ""
    show.line("after")
    assert err.getvalue().endswith("after\n")


def test_a_terminal_that_is_not_utf8() -> None:
    raw = io.BytesIO()
    out = io.TextIOWrapper(raw, encoding="ascii")
    Show(out=out, err=io.StringIO()).stream("Zürich")
    assert raw.getvalue() == b"Z?rich"


def test_plain_output_loads_no_rich() -> None:
    code = "import sys; from lilliput.base.show import Show; s = Show(); s.line('x'); s.table([{'a': 1}], ('a',)); sys.exit('rich' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0 s"), (59.4, "59 s"), (59.6, "1 min 0 s"), (200, "3 min 20 s"), (7500, "2 h 5 min"), (float("inf"), "unknown")]
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("number", "bytes_", "units"),
    [(0, "0 B", "0"), (512, "512 B", "512"), (1536, "1.5 KiB", "1.54k"), (1023.9, "1 KiB", "1.02k"),
     (134_515_008, "128 MiB", "135M"), (27.1 * 2**30, "27.1 GiB", "29.1B"),     (2**50, "1.02e+03 TiB", "1.13e+03T")],
)  # fmt: skip
def test_sizes_and_counts(number: float, bytes_: str, units: str) -> None:
    assert (size(number), count(number)) == (bytes_, units)


@given(st.recursive(st.none() | st.booleans() | st.floats() | st.text(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)))
def test_any_plain_value_becomes_strict_json(value: object) -> None:
    show, out, _ = shows(json=True)
    show.data(value)
    json.loads(out.getvalue(), parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))


@pytest.mark.parametrize(("text", "count"), [("600MB", 600_000_000), ("1.5 GiB", 3 << 29), ("4096", 4096), ("2kb", 2000), ("7B", 7), ("0.5KiB", 512)])
def test_sizes_are_read(text: str, count: int) -> None:
    assert parse_size(text) == count


def test_what_is_no_size_is_refused() -> None:
    with pytest.raises(UserError, match="`600 apples` is no number of bytes"):
        parse_size("600 apples")
