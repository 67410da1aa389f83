"""Files that are whole or absent, and the folder of one run.

A file is written beside its place, synced, and renamed over it; a folder is built beside its place, gets checksums.json
(sha256 and bytes a file) last, and is swapped in. A crash at any moment leaves the old one or the new one. What a killed
process left beside (`.name.HOST-PID-...tmp`) is swept by the next write. A full disk or a missing permission is a
UserError with numbers. One process at a time writes a run: the kernel's lock on `.lock` goes when its holder dies.

    run/  job.toml  metrics.jsonl (a line an event)  latest (pointer)  environment.json  result.json  checkpoints/  model/
"""

from __future__ import annotations

import errno
import hashlib
import importlib.metadata
import io
import json
import os
import platform
import re
import shutil
import socket
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

from lilliput.base import hardware
from lilliput.base.errors import UserError
from lilliput.base.version import __version__

try:
    import fcntl
except ImportError:  # not POSIX
    fcntl = None  # type: ignore[assignment]

CHECKSUMS = "checksums.json"
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
TOKEN = os.urandom(4).hex()  # tells this process from a dead one that had its pid
DENIED = {errno.EACCES, errno.EPERM, errno.EROFS}


@contextmanager
def disk_errors(path: str | Path, size: int | None = None) -> Iterator[None]:
    """Turn the system's refusals while writing `path` (of `size` bytes, where known) into a UserError with numbers.

    Knows OSError, and libraries in other languages that put `(os error N)` into their message.
    """
    try:
        yield
    except Exception as fault:
        number = _refused(fault)
        if number is None:
            raise
        raise _disk_error(Path(path), number, size) from fault


def atomic_write(path: str | Path, data: bytes | str) -> None:
    """Write a file whole or not at all (text as UTF-8); folders are made. A link is followed. UserError when the disk refuses."""
    target = Path(os.path.realpath(path))
    content = data.encode("utf-8") if isinstance(data, str) else data
    with disk_errors(target, len(content)):
        target.parent.mkdir(parents=True, exist_ok=True)
        _sweep(target)
        temporary = _beside(target)
        try:
            with open(temporary, "xb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, target)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        _sync(target.parent)


def picture(path: str | Path, figure: Any) -> None:
    """Write a matplotlib figure whole or not at all; the suffix says of what kind."""
    drawn = io.BytesIO()
    figure.savefig(drawn, format=Path(path).suffix[1:], dpi=120)
    atomic_write(path, drawn.getvalue())


@contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """Build a folder in the yielded place; on leaving it gets its checksums and takes the place of `path` in one step.

    An exception leaves the older folder as it was. UserError when the disk refuses, or when `path` holds something that
    was not written this way (no checksums.json): it is never replaced.
    """
    target = Path(os.path.realpath(path))
    building = _beside(target)
    with disk_errors(target):
        if target.exists() and not (target / CHECKSUMS).is_file() and (not target.is_dir() or any(target.iterdir())):
            raise UserError(
                f"{target} is in the way", why="it was not written by Lilliput (no checksums.json), so it is not replaced", fix=f"mv {target} {target}.old"
            )
        target.parent.mkdir(parents=True, exist_ok=True)
        _sweep(target)
        building.mkdir()
    try:
        yield building
        with disk_errors(target):
            _seal(building)
            _swap(building, target)
            _sync(target.parent)
    except Exception as fault:
        if (number := _refused(fault)) in FULL:  # other faults of the caller's block may be of files it reads: they pass as they are
            raise _disk_error(target, number, None) from fault
        raise
    finally:
        shutil.rmtree(building, ignore_errors=True)  # after a swap this is the older folder


def verify(folder: str | Path) -> None:
    """Check every file of a folder against its checksums (about 1 s a GB); UserError names the first missing or damaged one."""
    folder = Path(folder)
    if not (folder / CHECKSUMS).is_file():
        raise UserError(f"{folder} has no {CHECKSUMS}", why="it is incomplete, or was not written by Lilliput", fix="write it again")
    table = read_json(folder / CHECKSUMS)
    if not isinstance(table, dict) or not isinstance(table.get("files"), dict):
        raise UserError(f"{folder / CHECKSUMS} is damaged", why="it has no table of files", fix="write the folder again")
    for name, told in table["files"].items():
        file = folder / name
        if not file.is_file():
            raise UserError(f"{file} is missing", why=f"{CHECKSUMS} lists it with {told['bytes']} bytes", fix="restore it or write the folder again")
        if (size := file.stat().st_size) != told["bytes"]:
            raise UserError(f"{file} is damaged", why=f"it has {size} bytes, {CHECKSUMS} says {told['bytes']}", fix="restore it or write the folder again")
        if (found := sha256(file)) != told["sha256"]:
            why = f"sha256 is {found[:16]}..., {CHECKSUMS} says {told['sha256'][:16]}..."
            raise UserError(f"{file} is damaged", why=why, fix="restore it or write the folder again")


def sha256(path: str | Path) -> str:
    """Hex digest of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: str | Path, value: Any) -> None:
    """A plain value as an indented JSON file, atomically."""
    atomic_write(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: str | Path) -> Any:
    """The value of a JSON file; UserError when it cannot be read or is not JSON."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as fault:
        raise UserError(f"cannot read {path}", why=fault.strerror or str(fault), fix="check the path") from None
    except ValueError as fault:  # not UTF-8, or not JSON
        raise UserError(f"{path} is not JSON", why=str(fault), fix="restore the file, or delete it to write it again") from None


def environment() -> dict[str, Any]:
    """What bitwise equality depends on: versions, vector units and threads. torch's threads are known once it is loaded."""
    torch = sys.modules.get("torch")
    return {
        "lilliput": __version__,
        "torch": importlib.metadata.version("torch"),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "isa": list(hardware.isa()),
        "threads": torch.get_num_threads() if torch is not None else hardware.cpus(),
    }


class Run:
    """The folder of one run. Reading needs nothing; `with Run(folder) as run:` locks it for writing."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._metrics = self.folder / "metrics.jsonl"
        self._lock: int | None = None

    def __enter__(self) -> Run:
        """Make the folder and lock it; UserError names the process that holds it. A torn last line of the metrics is dropped."""
        with disk_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = _lock(self.folder / ".lock")
            if self._metrics.exists():
                whole = sum(len(line) for line in self._lines())
                if whole < self._metrics.stat().st_size:
                    os.truncate(self._metrics, whole)
        return self

    def __exit__(self, kind: type[BaseException] | None, fault: BaseException | None, trace: TracebackType | None) -> None:
        """Release the lock."""
        assert self._lock is not None, "the run was entered"
        _unlock(self._lock, self.folder / ".lock")
        self._lock = None

    def metrics(self, row: Mapping[str, Any]) -> None:
        """Append one event as a line of metrics.jsonl, at once visible to readers. NaN is written as NaN (Python's JSON)."""
        assert self._lock is not None, "metrics are written inside `with Run(...)`"
        line = (json.dumps(dict(row)) + "\n").encode()
        with disk_errors(self._metrics, len(line)):
            place = os.open(self._metrics, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
            try:
                size = os.fstat(place).st_size
                try:
                    if os.write(place, line) < len(line):
                        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                except OSError:
                    os.ftruncate(place, size)
                    raise
            finally:
                os.close(place)

    def read_metrics(self) -> list[dict[str, Any]]:
        """All whole lines; a torn last one is left out. UserError names a broken line before it."""
        rows = []
        for number, line in enumerate(self._lines(), 1):
            try:
                rows.append(json.loads(line))
            except ValueError as fault:
                raise UserError(f"{self._metrics}:{number} is not JSON", why=str(fault), fix=f"sed -i {number}d {self._metrics}") from None
        return rows

    def truncate_metrics(self, step: int) -> None:
        """Drop events after `step` (their `step` is larger), so that a resumed run writes them once. -1 drops all."""
        assert self._lock is not None, "metrics are cut inside `with Run(...)`"
        lines = self._lines()
        kept = [line for line, row in zip(lines, self.read_metrics(), strict=True) if row.get("step", 0) <= step]
        if len(kept) < len(lines):
            atomic_write(self._metrics, b"".join(kept))

    def point(self, name: str) -> None:
        """Move the pointer `latest` to a checkpoint's folder name, atomically."""
        atomic_write(self.folder / "latest", name + "\n")

    def pointer(self) -> str | None:
        """The name `latest` holds; None where there is none."""
        file = self.folder / "latest"
        return file.read_text(encoding="utf-8").strip() or None if file.exists() else None

    def finish(self, result: Mapping[str, Any]) -> None:
        """Write result.json: the run is done."""
        write_json(self.folder / "result.json", dict(result))

    def finished(self) -> dict[str, Any] | None:
        """The result of a run that is done; None while it is not."""
        file = self.folder / "result.json"
        return read_json(file) if file.exists() else None

    def note_environment(self) -> list[str]:
        """Write environment.json; returns what changed since the run last wrote it ("torch: 2.13.0 -> 2.14.0")."""
        file, now = self.folder / "environment.json", environment()
        before = read_json(file) if file.exists() else now
        write_json(file, now)
        return [f"{k}: {before.get(k)} -> {v}" for k, v in now.items() if before.get(k) != v]

    def _lines(self) -> list[bytes]:
        """Lines of the metrics with their ends; a last one that is torn (no end, or not JSON) is left out."""
        lines = self._metrics.read_bytes().splitlines(keepends=True) if self._metrics.exists() else []
        if lines and not (lines[-1].endswith(b"\n") and _is_json(lines[-1])):
            lines.pop()
        return lines


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True


def _refused(fault: Exception) -> int | None:
    """The errno behind an exception; None when the system refused nothing."""
    if isinstance(fault, OSError):
        return fault.errno
    told = None if isinstance(fault, UserError) else re.search(r"os error (\d+)", str(fault))
    return int(told[1]) if told else None


def _disk_error(path: Path, number: int, size: int | None) -> UserError:
    message = os.strerror(number)
    if number in FULL:
        free = shutil.disk_usage(next(p for p in (path, *path.parents) if p.exists())).free
        needs = f"needs {size:,} bytes, " if size is not None else ""
        return UserError(f"disk full while writing {path}", why=f"{message}; {needs}{free:,} bytes are free", fix="free some space, or choose another folder")
    if number in DENIED:
        return UserError(f"may not write {path}", why=message, fix=f"choose another folder, or chmod u+w {path.parent}")
    return UserError(f"cannot write {path}", why=message, fix="choose another path")


def _seal(folder: Path) -> None:
    """Write the checksums of a finished folder and have the disk hold all of it."""
    inside = sorted(folder.rglob("*"))
    files = [p for p in inside if p.is_file()]
    table = {p.relative_to(folder).as_posix(): {"sha256": sha256(p), "bytes": p.stat().st_size} for p in files}
    write_json(folder / CHECKSUMS, {"files": table})
    for file in files:  # some libraries write files that only their owner may read
        shutil.copymode(folder / CHECKSUMS, file)
    for place in (*inside, folder):
        _sync(place)


def _beside(target: Path) -> Path:
    return target.with_name(f".{target.name}.{socket.gethostname()}-{os.getpid()}-{TOKEN}-{threading.get_ident()}.tmp")


def _sweep(target: Path) -> None:
    """Remove what dead processes of this machine left beside the target; a process that reused our pid had another token."""
    pattern = re.compile(rf"\.{re.escape(target.name)}\.{re.escape(socket.gethostname())}-(\d+)-(\w+)-\d+\.tmp")
    for name in os.listdir(target.parent):
        found = pattern.fullmatch(name)
        if found and (found[2] != TOKEN if int(found[1]) == os.getpid() else not _alive(int(found[1]))):
            stale = target.parent / name
            shutil.rmtree(stale) if stale.is_dir() else stale.unlink()


def _alive(pid: int) -> bool:
    import psutil

    return psutil.pid_exists(pid)


def _sync(path: Path) -> None:
    """Have the disk hold a file's bytes or a folder's names. Where folders cannot be opened (not POSIX) names are synced with files."""
    if path.is_dir() and os.name != "posix":
        return
    place = os.open(path, os.O_RDONLY)
    try:
        os.fsync(place)
    finally:
        os.close(place)


def _swap(new: Path, target: Path) -> None:
    """Put `new` in the place of `target`; an older folder ends up in the place of `new`.

    Linux exchanges both names in one call. Elsewhere there are two renames, and a crash between them leaves both folders
    complete under the names `.NAME...tmp` and `.NAME...tmp.older`.
    """
    if not target.exists():
        os.rename(new, target)
        return
    if sys.platform == "linux":
        import ctypes

        exchange = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
        here, flag = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
        if exchange is not None and exchange(here, os.fsencode(new), here, os.fsencode(target), flag) == 0:
            return
    older = new.with_name(new.name + ".older")
    os.rename(target, older)
    os.rename(new, target)
    os.rename(older, new)


def _lock(path: Path) -> int:
    """An open descriptor that holds the lock, with our pid in the file. UserError names the holder."""
    place = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        holder = os.read(place, 100).decode(errors="replace").strip()
        if fcntl is not None:
            if not locked(place):
                raise _held(path, holder)
        elif holder.isdigit() and _alive(int(holder)):  # without kernel locks: by the pid alone
            raise _held(path, holder)
        os.ftruncate(place, 0)
        os.pwrite(place, str(os.getpid()).encode(), 0) if hasattr(os, "pwrite") else os.write(place, str(os.getpid()).encode())
    except BaseException:
        os.close(place)
        raise
    return place


def locked(place: int) -> bool:
    """Take the kernel's lock on an open file; False when another process has it. Where there are no such locks it is always taken."""
    try:
        if fcntl is not None:
            fcntl.flock(place, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _held(path: Path, holder: str) -> UserError:
    return UserError(f"{path.parent} is in use", why=f"process {holder or 'unknown'} is writing this run", fix="wait for it, or choose another out folder")


def _unlock(place: int, path: Path) -> None:
    os.ftruncate(place, 0)  # the file stays: removing it would let two holders lock two files of one name
    os.close(place)
