"""The only reader of environment variables: one typed function each, read when asked so that tests can set them."""

from __future__ import annotations

import os
from pathlib import Path

from lilliput.base.errors import UserError

_TRUE, _FALSE = {"1", "true", "yes", "on"}, {"", "0", "false", "no", "off"}


def cache_dir() -> Path:
    """Where pulled models and data lie: LILLIPUT_CACHE, else XDG_CACHE_HOME/lilliput, else ~/.cache/lilliput."""
    if own := os.environ.get("LILLIPUT_CACHE"):
        return Path(own).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base).expanduser() if base else Path.home() / ".cache") / "lilliput"


def offline() -> bool:
    """Whether the network is forbidden: LILLIPUT_OFFLINE or HF_HUB_OFFLINE."""
    return _flag("LILLIPUT_OFFLINE") or _flag("HF_HUB_OFFLINE")


def no_color() -> bool:
    """NO_COLOR set to anything but the empty text (no-color.org), or a dumb terminal."""
    return bool(os.environ.get("NO_COLOR")) or os.environ.get("TERM") == "dumb"


def debug() -> bool:
    """LILLIPUT_DEBUG: show tracebacks of our own faults."""
    return _flag("LILLIPUT_DEBUG")


def api_keys() -> tuple[str, ...]:
    """LILLIPUT_API_KEY: keys that clients of `lilliput serve` must show, separated by commas; empty when unset."""
    return tuple(key.strip() for key in os.environ.get("LILLIPUT_API_KEY", "").split(",") if key.strip())


def test_data() -> Path | None:
    """LILLIPUT_TEST_DATA: folder of extra real data for tests and papers; None when unset."""
    folder = os.environ.get("LILLIPUT_TEST_DATA")
    return Path(folder) if folder else None


def cpu_flops() -> float | None:
    """LILLIPUT_CPU_FLOPS: peak fp32 flop/s of this CPU over all cores, in place of the estimate; None when unset."""
    text = os.environ.get("LILLIPUT_CPU_FLOPS")
    if not text:
        return None
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise UserError(f"LILLIPUT_CPU_FLOPS cannot be {text!r}", why="wanted a number of fp32 flop/s above 0", fix="export LILLIPUT_CPU_FLOPS=1.5e11")
    return value


def isa() -> str | None:
    """LILLIPUT_ISA: the instruction set of the native kernels (scalar, avx2, avx512), or `none` for the references; None when unset."""
    return os.environ.get("LILLIPUT_ISA") or None


def native_path() -> Path | None:
    """LILLIPUT_NATIVE: a build of the native kernels to load in place of the installed one (sanitizers, experiments); None when unset."""
    path = os.environ.get("LILLIPUT_NATIVE")
    return Path(path) if path else None


def visible_gpus() -> tuple[str, ...] | None:
    """CUDA_VISIBLE_DEVICES: indices or UUIDs of the GPUs that may be used, in order; None when unset (all of them)."""
    text = os.environ.get("CUDA_VISIBLE_DEVICES")
    return None if text is None else tuple(part.strip() for part in text.split(",") if part.strip())


def default(name: str, value: str) -> None:
    """Set a variable for libraries and processes that start later, unless the user has set it."""
    os.environ.setdefault(name, value)


def child(**extra: str) -> dict[str, str]:
    """The environment of a child process: this one's, with some variables set."""
    return {**os.environ, **extra}


def _flag(name: str) -> bool:
    text = os.environ.get(name, "").strip().lower()
    if text not in _TRUE | _FALSE:
        raise UserError(f"{name} cannot be {text!r}", why="wanted 1 or 0", fix=f"export {name}=1")
    return text in _TRUE
