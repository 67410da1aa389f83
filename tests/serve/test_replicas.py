"""Replicas for real, through Ray Serve: conversations that stay, one killed in the middle of answers, more of them under load, two nodes."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from http_server import longer

pytest.importorskip("fastapi", reason="needs the extra `serve`")
SCRIPT = Path(__file__).parents[1] / "replicas_run.py"


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs the extra `ray`"),
    pytest.mark.skipif(os.geteuid() != 0 or shutil.which("unshare") is None, reason="needs root and unshare: replicas get a network of their own"),
]


def seen_of(part: str, folder: Path) -> dict[str, Any]:
    """What a part of the script saw; one to three minutes on two cores. Ray opens wildcard ports, so it runs where nobody can reach it."""
    environment = {**os.environ, "HOME": str(folder), "RAY_AUTH_MODE": "disabled", "OMP_NUM_THREADS": "1"}
    inside = f"ip link set lo up; exec {sys.executable} {SCRIPT} {part} {longer(folder / 'tiny')}"
    done = subprocess.run(["unshare", "-n", "sh", "-c", inside], stdout=subprocess.PIPE, text=True, timeout=400, env=environment)
    assert done.returncode == 0, done.stdout
    seen: dict[str, Any] = json.loads(done.stdout)
    assert seen["exit"] == 0 and seen["left"] == []
    return seen


def test_two_replicas_survive_the_kill_of_one(tmp_path: Path) -> None:
    seen = seen_of("kill", tmp_path)
    assert seen["statuses"] == [200] * 24 and seen["greedy answers"] == 1
    assert len(seen["answered"]) == 2 and all(seen["answered"].values()), "both replicas answer"
    assert sum(seen["hits"].values()) > 0.5 * sum(seen["looked for"].values()), "conversations went elsewhere"
    assert seen["replicas"] == 2 and seen["wholes"] == [200] * 6 and seen["later"] == [200] * 6, "a request of which nothing was sent is asked again"
    assert set(seen["streams"]) <= {"whole", "error"} and "whole" in seen["streams"], seen["streams"]
    assert (seen["again"], seen["new"]) == (2, 1) and seen["after"] == [200] * 6


def test_replicas_come_and_go_with_the_load(tmp_path: Path) -> None:
    seen = seen_of("scale", tmp_path)
    assert seen["first"] == 1 and seen["grown after"] >= 0 and seen["shrunk after"] >= 0, seen
    assert seen["statuses"] == [200] and seen["answered"] == 2 and seen["after"] == 200, seen


def test_two_nodes_survive_the_loss_of_one(tmp_path: Path) -> None:
    seen = seen_of("nodes", tmp_path)
    assert seen["nodes"] == 2 and seen["statuses"] == [200] * 8 and all(seen["answered"].values()) and len(seen["answered"]) == 2, seen
    assert seen["after"] == [200] * 16 and seen["gone after"] >= 0, seen
