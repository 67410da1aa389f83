"""The only printer. stdout is data, stderr is talk.

A terminal gets rich tables and live bars; anything else gets aligned text (a bar says something every 10 % or 10 s).
Under --json stdout holds exactly one JSON document, written when the verb gives it, and tables and streams are left
out. NO_COLOR and TERM=dumb are honoured. rich is imported at first use, so that help answers quickly.
"""

from __future__ import annotations

import json
import math
import re
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TextIO

from lilliput.base import env
from lilliput.base.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console

EVERY_SECONDS, EVERY_SHARE = 10.0, 0.1  # how often a bar off a terminal says something


class Show:
    """Prints for one verb. `json` sends the one document to stdout and everything else to stderr, or nowhere."""

    def __init__(self, json: bool = False, out: TextIO | None = None, err: TextIO | None = None) -> None:
        self.json = json
        self.out, self.err = out or sys.stdout, err or sys.stderr
        self._live: Console | None = None  # the console of a running bar, which must draw the lines above it

    def line(self, text: str) -> None:
        """One line of talk, on stderr."""
        if self._live is not None:
            self._live.out(text, highlight=False)
        else:
            self._write(self.err, text + "\n")

    def stream(self, text: str) -> None:
        """A piece of an answer as it comes, on stdout, without a line end; nothing under --json."""
        if not self.json:
            self._write(self.out, text)

    def data(self, value: Any) -> None:
        """The one JSON document of a --json run, on stdout; nothing otherwise. NaN and infinities become null."""
        if self.json:
            self._write(self.out, json.dumps(_strict(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n")

    def table(self, rows: Sequence[Mapping[str, Any]], columns: Sequence[str], title: str = "") -> None:
        """Rows as a table on stdout (for machines there is --json); nothing under --json."""
        if self.json:
            return
        cells = [[_cell(row.get(column, "")) for column in columns] for row in rows]
        right = [bool(rows) and all(isinstance(row.get(c, ""), (int, float)) for row in rows) for c in columns]
        if not self.out.isatty():
            self._write(self.out, _plain_table(cells, columns, right, title))
            return
        from rich.table import Table

        table = Table(title=title or None, title_justify="left")
        for column, numeric in zip(columns, right, strict=True):
            table.add_column(column, justify="right" if numeric else "left", overflow="fold")
        for line in cells:
            table.add_row(*line)
        self._console(self.out).print(table)

    def error(self, error: UserError) -> None:
        """A fault on stderr: what, why, fix. Under --json also the document {"error": {...}} on stdout."""
        self.data({"error": {"what": error.what, "why": error.why, "fix": error.fix, "exit_code": error.exit_code}})
        color = self.err.isatty() and not env.no_color()
        parts = [("error", error.what, "31"), ("why", error.why, "33"), ("fix", error.fix, "32")]
        for label, text, code in parts:
            if text:
                label = f"{label}:".rjust(6)
                self.line((f"\x1b[1;{code}m{label}\x1b[0m" if color else label) + " " + text.replace("\n", "\n       "))

    @contextmanager
    def bar(self, total: int, label: str, done: int = 0) -> Iterator[Bar]:
        """A progress bar on stderr over `total` units of which `done` are there already; rate and ETA count the new ones."""
        if not self.err.isatty() or env.no_color():
            yield _Lines(self, total, label, done)
            return
        self._live = self._console(self.err)
        try:
            with _live(self._live, total, label, done) as bar:
                yield bar
        finally:
            self._live = None

    def _console(self, file: TextIO) -> Console:
        from rich.console import Console

        return Console(file=file, no_color=env.no_color(), highlight=False, markup=False, emoji=False)

    def _write(self, file: TextIO, text: str) -> None:
        try:
            print(text, end="", file=file, flush=True)
        except UnicodeEncodeError:  # a terminal that is not UTF-8
            print(text.encode(file.encoding, "replace").decode(file.encoding), end="", file=file, flush=True)


class Bar(ABC):
    """Progress of `total` units. `advance(n, text)` adds n and shows the text beside the rate and the time left."""

    def __init__(self, total: int, label: str, done: int) -> None:
        self.total, self.label, self.done = total, label, done
        self._first, self._begin = done, time.monotonic()

    def advance(self, count: int = 1, text: str = "") -> None:
        """Count more units as done."""
        self.done += count
        self._draw(text)

    def rate(self) -> float:
        """Units a second since this bar began."""
        return (self.done - self._first) / max(1e-9, time.monotonic() - self._begin)

    def left(self) -> float:
        """Seconds left at the present rate; infinite before the first unit."""
        return (self.total - self.done) / self.rate() if self.done > self._first else math.inf

    @abstractmethod
    def _draw(self, text: str) -> None: ...


class _Lines(Bar):
    """Off a terminal: a line for every tenth of the way, and at least one every ten seconds."""

    def __init__(self, show: Show, total: int, label: str, done: int) -> None:
        super().__init__(total, label, done)
        self._show, self._told, self._when = show, done, self._begin

    def _draw(self, text: str) -> None:
        now = time.monotonic()
        if self.done < self.total and self.done - self._told < EVERY_SHARE * self.total and now - self._when < EVERY_SECONDS:
            return
        self._told, self._when = self.done, now
        eta = f"ETA {duration(self.left())}" if self.done < self.total else f"took {duration(now - self._begin)}"
        self._show.line(
            f"{self.label} {self.done:,}/{self.total:,} ({self.done / max(1, self.total):.0%})  {count(self.rate())}/s  {eta}" + (f"  {text}" if text else "")
        )


class _Live(Bar):
    """On a terminal: a rich task."""

    def __init__(self, progress: Any, total: int, label: str, done: int) -> None:
        super().__init__(total, label, done)
        self._progress = progress
        self._task = progress.add_task(label, total=total, completed=done, text="", rate="", eta="")

    def _draw(self, text: str) -> None:
        self._progress.update(self._task, completed=self.done, text=text, rate=f"{count(self.rate())}/s", eta=f"ETA {duration(self.left())}")


@contextmanager
def _live(console: Console, total: int, label: str, done: int) -> Iterator[Bar]:
    from rich.progress import BarColumn, Progress, TextColumn

    columns = ["{task.description}", "{task.completed:,.0f}/{task.total:,.0f}", "{task.fields[rate]}", "{task.fields[eta]}", "{task.fields[text]}"]
    first, *rest = (TextColumn(column, markup=False) for column in columns)
    with Progress(first, BarColumn(), *rest, console=console) as progress:
        yield _Live(progress, total, label, done)


def duration(seconds: float) -> str:
    """Seconds in short words: 8 s, 3 min 20 s, 2 h 5 min."""
    if not math.isfinite(seconds):
        return "unknown"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def size(count: float) -> str:
    """Bytes in binary units with three digits: 512 B, 1.50 KiB, 27.1 GiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1023.5:
            return f"{count:.0f} B" if unit == "B" else f"{count:.{3 if abs(count) < 999.5 else 4}g} {unit}"
        count /= 1024
    return f"{count:.3g} TiB"


def parse_size(text: str) -> int:
    """The bytes of "600MB", "1.5 GiB", "4096": KB, MB, GB, TB count in thousands, KiB and so on in 1,024s. UserError for anything else."""
    found = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*(?:([KMGT]?)(i?)B)?\s*", text, re.IGNORECASE)
    if found is None:
        raise UserError(f"`{text}` is no number of bytes", fix="600MB, 1.5GiB or a plain number")
    number, unit, binary = found.groups()
    return round(float(number) * (1024 if binary else 1000) ** (1 + "KMGT".index(unit.upper()) if unit else 0))


def count(value: float) -> str:
    """A number with three digits and a unit: 950, 1.2k, 134M, 6.74B."""
    for unit in ("", "k", "M", "B"):
        if abs(value) < 999.5:
            return f"{value:.3g}{unit}"
        value /= 1000
    return f"{value:.3g}T"


def _plain_table(cells: list[list[str]], columns: Sequence[str], right: list[bool], title: str) -> str:
    lines = [list(columns), *([" ".join(cell.split()) for cell in line] for line in cells)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    padded = ["  ".join(cell.rjust(w) if r else cell.ljust(w) for cell, w, r in zip(line, widths, right, strict=True)).rstrip() for line in lines]
    return "\n".join([*([title] if title else []), *padded]) + "\n"


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value)


def _strict(value: Any) -> Any:
    """The value without what JSON cannot say: NaN and infinities become null, tuples lists."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(k): _strict(v) for k, v in value.items()}
    if isinstance(value, Iterable) and not isinstance(value, (str, bytes)):
        return [_strict(v) for v in value]
    return value
