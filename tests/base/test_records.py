"""Records: files and folders are whole or absent, whatever the disk or the power does; one process writes a run."""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lilliput.base import records
from lilliput.base.errors import UserError


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def run_python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=60, check=False)


# -- files


@given(st.binary() | st.text(st.characters(exclude_categories=["Cs"])))
@settings(deadline=None, max_examples=25)
def test_a_file_comes_back(tmp_path_factory, data: bytes | str) -> None:
    path = tmp_path_factory.mktemp("files") / "deep" / "er" / "file"
    records.atomic_write(path, b"old")
    records.atomic_write(path, data)
    assert path.read_bytes() == (data if isinstance(data, bytes) else data.encode()) and names(path.parent) == ["file"]


def test_a_file_has_the_usual_mode_and_links_are_followed(tmp_path: Path) -> None:
    mask = os.umask(0o027)
    try:
        records.atomic_write(tmp_path / "real", "1")
    finally:
        os.umask(mask)
    assert stat.S_IMODE((tmp_path / "real").stat().st_mode) == 0o640
    (tmp_path / "link").symlink_to(tmp_path / "real")
    records.atomic_write(tmp_path / "link", "2")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real").read_text() == "2"


@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize(
    ("number", "what"),
    [
        (errno.ENOSPC, "disk full while writing"),
        (errno.EDQUOT, "disk full while writing"),
        (errno.EACCES, "may not write"),
        (errno.EROFS, "may not write"),
        (errno.EIO, "cannot write"),
    ],
)
def test_a_refused_file_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, number: int, what: str) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def refuse(*arguments: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, call, refuse)
    with pytest.raises(UserError, match=what) as caught:
        records.atomic_write(path, b"new" * 1000)
    assert str(path) in caught.value.what and os.strerror(number) in caught.value.why and caught.value.fix
    if number == errno.ENOSPC:
        assert "needs 3,000 bytes" in caught.value.why and "bytes are free" in caught.value.why
    assert path.read_text() == "old" and names(tmp_path) == ["file"]


def test_a_real_limit_on_the_file_size(tmp_path: Path) -> None:
    code = """
import resource, signal, sys
from lilliput.base import records
from lilliput.base.errors import UserError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
records.atomic_write(sys.argv[1], b"x" * 1000)
try:
    records.atomic_write(sys.argv[1], b"y" * 1001)
except UserError as error:
    sys.exit(error.what + error.why)
"""
    path = tmp_path / "file"
    answer = run_python(code, str(path))
    assert f"disk full while writing {path}" in answer.stderr and "needs 1,001 bytes" in answer.stderr
    assert path.read_bytes() == b"x" * 1000 and names(tmp_path) == ["file"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_no_permission_for_real(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match="may not write"):
        records.atomic_write(tmp_path / "file", "x")


def test_a_path_through_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="cannot write"):
        records.atomic_write(tmp_path / "file" / "below", "x")
    with pytest.raises(UserError, match="cannot write"):
        records.atomic_write(tmp_path, "x")


def test_leftovers_of_dead_processes_are_swept(tmp_path: Path) -> None:
    code = "import sys, os, signal\nfrom lilliput.base import records\nos.replace = lambda *a: os.kill(os.getpid(), signal.SIGKILL)\n"
    code += "records.atomic_write(sys.argv[1], 'x')"
    assert run_python(code, str(tmp_path / "file")).returncode == -signal.SIGKILL
    assert len(names(tmp_path)) == 1 and names(tmp_path)[0].startswith(".file.")
    host = socket.gethostname()
    kept = [f".file.{host}-{os.getppid()}-abcd-1.tmp", ".file.elsewhere-1-abcd-1.tmp"]  # of a live process, and of another machine
    for name in [*kept, f".file.{host}-{os.getpid()}-abcd-1.tmp"]:  # the last one is of a dead process that had our number
        (tmp_path / name).write_text("x")
    records.atomic_write(tmp_path / "file", "new")
    assert names(tmp_path) == sorted([*kept, "file"])


def test_errors_of_other_languages_and_other_errors(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="disk full"), records.disk_errors(tmp_path / "x"):
        raise RuntimeError("I/O error: No space left on device (os error 28)")
    with pytest.raises(KeyError), records.disk_errors(tmp_path):
        raise KeyError("os")
    with pytest.raises(UserError, match=r"^mine"), records.disk_errors(tmp_path):
        raise UserError("mine", "os error 28")


# -- folders


def build(path: Path, text: str = "one") -> None:
    with records.atomic_folder(path) as folder:
        (folder / "a").write_text(text)
        (folder / "deep").mkdir()
        (folder / "deep" / "b").write_bytes(b"\x00" * 1000)


def test_a_folder_is_built_verified_and_replaced(tmp_path: Path) -> None:
    path = tmp_path / "model"
    build(path)
    records.verify(path)
    assert json.loads((path / "checksums.json").read_text())["files"]["deep/b"] == {"sha256": records.sha256(path / "deep" / "b"), "bytes": 1000}
    build(path, "two")
    records.verify(path)
    assert (path / "a").read_text() == "two" and names(tmp_path) == ["model"]


def test_replacing_works_where_names_cannot_be_exchanged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build(tmp_path / "model")
    monkeypatch.setattr(sys, "platform", "other")
    build(tmp_path / "model", "two")
    assert (tmp_path / "model" / "a").read_text() == "two" and names(tmp_path) == ["model"]


@pytest.mark.parametrize("fault", [ValueError("mine"), KeyboardInterrupt(), FileNotFoundError(2, "a file the caller reads", "x")])
def test_a_fault_while_building_leaves_the_old_folder(tmp_path: Path, fault: BaseException) -> None:
    build(tmp_path / "model")
    with pytest.raises(type(fault)), records.atomic_folder(tmp_path / "model") as folder:
        (folder / "a").write_text("half")
        raise fault
    records.verify(tmp_path / "model")
    assert (tmp_path / "model" / "a").read_text() == "one" and names(tmp_path) == ["model"]


@pytest.mark.parametrize("place", ["body", "seal"])
def test_a_full_disk_leaves_the_old_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    build(tmp_path / "model")

    def refuse(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(UserError, match="disk full while writing"), records.atomic_folder(tmp_path / "model") as folder:
        (folder / "a").write_text("half")
        if place == "body":
            refuse()
        monkeypatch.setattr(os, "fsync", refuse)
    records.verify(tmp_path / "model")
    assert (tmp_path / "model" / "a").read_text() == "one" and names(tmp_path) == ["model"]


KILLED = """
import os, signal, sys
from pathlib import Path
from lilliput.base import records
point, count = sys.argv[2], int(sys.argv[3])
def die_at(name, module):
    real = getattr(module, name)
    def call(*arguments, **keywords):
        global count
        count -= 1
        if count < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*arguments, **keywords)
    setattr(module, name, call)
die_at(point, os)
with records.atomic_folder(sys.argv[1]) as folder:
    (folder / "a").write_text("two")
    (folder / "deep").mkdir()
    (folder / "deep" / "b").write_bytes(bytes(1000))
"""


@pytest.mark.parametrize(("call", "count"), [("fsync", n) for n in range(6)])
def test_a_kill_at_any_sync_leaves_a_whole_folder(tmp_path: Path, call: str, count: int) -> None:
    build(tmp_path / "model")
    killed = run_python(KILLED, str(tmp_path / "model"), call, str(count)).returncode == -signal.SIGKILL
    records.verify(tmp_path / "model")
    assert (tmp_path / "model" / "a").read_text() in (("one", "two") if killed else ("two",))
    build(tmp_path / "model", "three")
    assert names(tmp_path) == ["model"] and (tmp_path / "model" / "a").read_text() == "three"


def test_what_lilliput_did_not_write_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years")
    (tmp_path / "file").write_text("years")
    for name in ("mine", "file"):
        with pytest.raises(UserError, match="is in the way"), records.atomic_folder(tmp_path / name):
            pass
    assert (tmp_path / "mine" / "thesis.txt").read_text() == (tmp_path / "file").read_text() == "years"
    (tmp_path / "empty").mkdir()
    build(tmp_path / "empty")


def test_damage_is_named(tmp_path: Path) -> None:
    path = tmp_path / "model"
    for damage, what in [
        (lambda: (path / "a").write_text("ono"), "a is damaged"),
        (lambda: (path / "a").write_text("longer"), "a is damaged"),
        (lambda: (path / "deep" / "b").unlink(), "b is missing"),
        (lambda: (path / "checksums.json").unlink(), "has no checksums.json"),
        (lambda: (path / "checksums.json").write_text("{"), "is not JSON"),
        (lambda: (path / "checksums.json").write_text("[]"), "is damaged"),
    ]:
        build(path)
        damage()
        with pytest.raises(UserError, match=what):
            records.verify(path)
        (path / "checksums.json").write_text("{}")


# -- JSON


def test_json_comes_back_or_says_why(tmp_path: Path) -> None:
    records.write_json(tmp_path / "x.json", {"ä": [1, None]})
    assert records.read_json(tmp_path / "x.json") == {"ä": [1, None]}
    with pytest.raises(UserError, match="cannot read"):
        records.read_json(tmp_path / "none.json")
    (tmp_path / "x.json").write_bytes(b'{"a": 1,\n"b": }')
    with pytest.raises(UserError, match="is not JSON") as caught:
        records.read_json(tmp_path / "x.json")
    assert "line 2" in caught.value.why
    (tmp_path / "x.json").write_bytes(b"\xff")
    with pytest.raises(UserError, match="is not JSON"):
        records.read_json(tmp_path / "x.json")


# -- runs


@given(
    rows=st.lists(st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), st.integers() | st.floats(allow_nan=False)), max_size=5),
    cut=st.integers(0, 200),
)
@settings(deadline=None, max_examples=60)
def test_a_torn_last_line_is_dropped_and_the_rest_is_exact(tmp_path_factory, rows: list[dict], cut: int) -> None:
    run = records.Run(tmp_path_factory.mktemp("run"))
    with run:
        for row in rows:
            run.metrics(row)
        assert run.read_metrics() == rows
    file = run.folder / "metrics.jsonl"
    content = file.read_bytes() if rows else b""
    content = content[: max(0, len(content) - cut)]
    file.write_bytes(content)
    whole = content.count(b"\n")
    assert run.read_metrics() == rows[:whole] and file.read_bytes() == content  # reading changes nothing
    with run:
        run.metrics({"new": 1})
    assert run.read_metrics() == [*rows[:whole], {"new": 1}]


def test_a_line_of_zeros_after_a_power_cut_is_dropped(tmp_path: Path) -> None:
    with records.Run(tmp_path) as run:
        run.metrics({"step": 1})
    with open(tmp_path / "metrics.jsonl", "ab") as file:
        file.write(b"\x00" * 40 + b"\n")
    with records.Run(tmp_path) as run:
        assert run.read_metrics() == [{"step": 1}] and (tmp_path / "metrics.jsonl").read_bytes() == b'{"step": 1}\n'


def test_a_broken_line_in_the_middle_is_named(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step"\n{"step": 3}\n')
    with pytest.raises(UserError, match=r"metrics.jsonl:2 is not JSON"):
        records.Run(tmp_path).read_metrics()


def test_metrics_are_cut_at_a_step(tmp_path: Path) -> None:
    with records.Run(tmp_path / "new" / "run") as run:
        for step in (0, 1, 2, 2, 3):
            run.metrics({"step": step, "loss": step / 3})
        run.truncate_metrics(2)
        assert [r["step"] for r in run.read_metrics()] == [0, 1, 2, 2]
        run.metrics({"step": 3, "loss": float("nan")})
        assert run.read_metrics()[3:][0]["loss"] == 2 / 3 and run.read_metrics()[-1]["loss"] != run.read_metrics()[-1]["loss"]
        run.truncate_metrics(-1)
        assert run.read_metrics() == []


def test_a_full_disk_leaves_no_half_line(tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    with records.Run(tmp_path) as run:
        run.metrics({"step": 1})
        resource.setrlimit(resource.RLIMIT_FSIZE, (20, before[1]))
        try:
            with pytest.raises(UserError, match="disk full"):
                run.metrics({"step": 2})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
            signal.signal(signal.SIGXFSZ, handler)
        assert (tmp_path / "metrics.jsonl").read_bytes() == b'{"step": 1}\n'


def test_writing_needs_the_lock(tmp_path: Path) -> None:
    run = records.Run(tmp_path)
    with pytest.raises(AssertionError, match="inside"):
        run.metrics({})
    assert run.read_metrics() == [] and run.pointer() is None and run.finished() is None and names(tmp_path) == []


HOLDER = (
    "import sys, time\nfrom lilliput.base import records\nwith records.Run(sys.argv[1]):\n    sys.stdout.write('locked\\n'); sys.stdout.flush(); time.sleep(60)"
)


def test_two_processes_cannot_write_one_run(tmp_path: Path) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "locked\n"
        with pytest.raises(UserError, match="is in use") as caught, records.Run(tmp_path):
            pass
        assert f"process {holder.pid} is writing" in caught.value.why
        holder.kill()
        holder.wait()
        with records.Run(tmp_path) as run:  # the lock dies with its holder
            run.metrics({"step": 1})
    finally:
        holder.kill()
        holder.wait()
    with records.Run(tmp_path), pytest.raises(UserError, match="is in use"), records.Run(tmp_path):
        pass


def test_locks_without_fcntl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "fcntl", None)
    with records.Run(tmp_path), pytest.raises(UserError, match=f"process {os.getpid()}"), records.Run(tmp_path):
        pass
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    (tmp_path / ".lock").write_text(str(dead.pid))
    with records.Run(tmp_path):
        assert (tmp_path / ".lock").read_text() == str(os.getpid())


def test_pointer_result_and_environment(tmp_path: Path) -> None:
    with records.Run(tmp_path) as run:
        run.point("step-000010")
        run.point("step-000020")
        run.finish({"steps": 20})
        assert run.note_environment() == []
        stored = records.read_json(tmp_path / "environment.json")
        assert set(stored) == {"lilliput", "torch", "python", "system", "isa", "threads"}
        records.write_json(tmp_path / "environment.json", stored | {"threads": 999})
        assert run.note_environment() == [f"threads: 999 -> {stored['threads']}"]
    assert (run.pointer(), run.finished()) == ("step-000020", {"steps": 20})


def test_environment_imports_no_torch() -> None:
    code = "import sys\nfrom lilliput.base import records\nrecords.environment()\nsys.exit('torch' in sys.modules)"
    assert run_python(code).returncode == 0
