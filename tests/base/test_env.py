"""Environment variables: what each function reads, in which order, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest

from lilliput.base import env
from lilliput.base.errors import UserError

ALL = ("LILLIPUT_CACHE", "XDG_CACHE_HOME", "LILLIPUT_OFFLINE", "HF_HUB_OFFLINE", "NO_COLOR", "TERM", "LILLIPUT_DEBUG", "LILLIPUT_TEST_DATA")
MORE = ("LILLIPUT_CPU_FLOPS", "CUDA_VISIBLE_DEVICES")


@pytest.fixture(autouse=True)
def empty(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ALL + MORE:
        monkeypatch.delenv(name, raising=False)


def test_cache_folder_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/gulliver")
    assert env.cache_dir() == Path("/home/gulliver/.cache/lilliput")
    monkeypatch.setenv("XDG_CACHE_HOME", "/var/caches")
    assert env.cache_dir() == Path("/var/caches/lilliput")
    monkeypatch.setenv("LILLIPUT_CACHE", "~/models")
    assert env.cache_dir() == Path("/home/gulliver/models")


@pytest.mark.parametrize("name", ["LILLIPUT_OFFLINE", "HF_HUB_OFFLINE"])
def test_offline_by_either_name(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    assert not env.offline()
    for text, wanted in (("1", True), ("True", True), ("0", False), ("", False)):
        monkeypatch.setenv(name, text)
        assert env.offline() is wanted
    monkeypatch.setenv(name, "perhaps")
    with pytest.raises(UserError, match=f"{name} cannot be 'perhaps'"):
        env.offline()


def test_colour_debug_and_data(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not env.no_color() and not env.debug() and env.test_data() is None
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("LILLIPUT_DEBUG", "yes")
    monkeypatch.setenv("LILLIPUT_TEST_DATA", "/data")
    assert env.no_color() and env.debug() and env.test_data() == Path("/data")
    monkeypatch.setenv("NO_COLOR", "")
    assert not env.no_color()
    monkeypatch.setenv("TERM", "dumb")
    assert env.no_color()


def test_cpu_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    assert env.cpu_flops() is None
    monkeypatch.setenv("LILLIPUT_CPU_FLOPS", "1.5e11")
    assert env.cpu_flops() == 1.5e11
    for text in ("fast", "-1", "0", "nan", "inf"):
        monkeypatch.setenv("LILLIPUT_CPU_FLOPS", text)
        with pytest.raises(UserError, match="LILLIPUT_CPU_FLOPS"):
            env.cpu_flops()


def test_visible_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    assert env.visible_gpus() is None
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1, 0,")
    assert env.visible_gpus() == ("1", "0")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert env.visible_gpus() == ()
