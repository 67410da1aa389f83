"""Speeds of memory and disk: measured once, remembered for a week, nothing left behind; a plan's seconds follow them."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path

import pytest

from lilliput.base import speeds
from lilliput.base.hardware import declared, detect


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LILLIPUT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "speeds.json"


def test_a_disk_is_timed_in_a_moment_and_nothing_is_left(cache: Path, tmp_path: Path) -> None:
    folder = tmp_path / "scratch"
    folder.mkdir()
    begin = time.monotonic()
    found = speeds.disk(folder)
    assert time.monotonic() - begin < 5, "three passes of 0.2 s and the file's making; the machine may be busy"
    assert found.read > 1e6 and found.write > 1e6 and str(folder) in found.source and list(folder.iterdir()) == []


def test_figures_are_remembered_for_a_week(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Path] = []
    monkeypatch.setattr(speeds, "_timed", lambda folder: calls.append(folder) or {"read": 2e9, "write": 1e9, "direct": True})
    one = speeds.disk(tmp_path / "not" / "there")
    assert (one.read, one.write) == (2e9, 1e9) and speeds.disk(tmp_path / "elsewhere") == one and calls == [tmp_path], "the folder that exists is timed"
    known = json.loads(cache.read_text())
    ((name, entry),) = known.items()
    cache.write_text(json.dumps({name: {**entry, "when": entry["when"] - 8 * 86400}}))
    speeds.disk(tmp_path)
    cache.write_text("not json")
    speeds.disk(tmp_path)
    assert len(calls) == 3


def test_a_slow_disk_is_not_waited_for(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """20 MB/s: a pass of 0.2 s and not the seconds that all of the file would take."""
    write = speeds.os.pwritev

    def slowly(handle: int, buffers: list, at: int) -> int:
        time.sleep(0.2)
        return write(handle, buffers, at)

    monkeypatch.setattr(speeds.os, "pwritev", slowly)
    begin = time.monotonic()
    found = speeds.disk(tmp_path)
    assert time.monotonic() - begin < 4 and 5e6 < found.write < 25e6


def test_what_cannot_be_timed_has_no_speed_and_says_why(cache: Path) -> None:
    found = speeds.disk(Path("/proc/nothing"))
    assert found.read == found.write == 0 and "/proc" in found.source


def test_detected_links_are_measured_and_declared_ones_stay(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speeds, "_timed", lambda folder: {"read": 2e9 if folder.name == "fast" else 5e8, "write": 1e9, "direct": True})
    for name in ("fast", "slow"):
        (tmp_path / name).mkdir()
    here = replace(detect(), devices=(detect().host,))
    found = here.reaching([str(tmp_path / "fast"), str(tmp_path / "slow")])
    assert found.links.pcie == here.host.bandwidth / 2 and found.links.nvme_read == 5e8, "the slowest of several"
    assert any("measured in" in name for name in found.estimated)
    sheet = declared("laptop")
    assert sheet.reaching([str(tmp_path / "fast")]) == sheet
