"""Files in: paths and globs -> files -> text chunks or records, each fault named with its place.

.jsonl .ndjson   one JSON object a line          .json      a list of objects
.parquet         one object a row (an extra)     anything else is plain UTF-8 text, one document a file
Any of them may be gzipped (.gz). Plain text and JSON lines are streamed: memory does not grow with the file.
"""

from __future__ import annotations

import codecs
import glob
import gzip
import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from lilliput.base.errors import UserError, did_you_mean

Progress = Callable[[int, int], None]  # (bytes read, bytes in all)
BLOCK = 1 << 18  # bytes read at a time
KNOWN = (".txt", ".md", ".jsonl", ".ndjson", ".json", ".parquet")  # what a folder is searched for


def expand(paths: str | Path | Sequence[str | Path]) -> list[Path]:
    """The files that paths, globs and folders name, each once, sorted within each glob and folder."""
    given = [paths] if isinstance(paths, str | Path) else list(paths)
    if not any(str(path) for path in given):
        raise UserError("no data was given", "data.path is empty", "data.path=FILE, a glob like 'notes/*.txt', or data:shakespeare")
    files: dict[Path, None] = {}
    for path in given:
        files.update(dict.fromkeys(_matches(str(path))))
    return list(files)


def _matches(path: str) -> list[Path]:
    if path.startswith("data:"):
        raise UserError(f"data set `{path}` is not on this machine", "a data: name has to be fetched before it is read", f"lilliput pull {path}")
    if Path(path).is_file():
        return [Path(path)]
    if Path(path).is_dir():
        found = sorted(file for file in Path(path).rglob("*") if file.is_file() and _kind(file) in KNOWN and not file.name.startswith("."))
        if not found:
            raise UserError(f"the folder {path} has no data files", f"looked for {', '.join(KNOWN)}, also with .gz", f"data.path='{path}/*'")
        return found
    if not glob.has_magic(path):
        folder = Path(path).parent
        names = [file.name for file in folder.iterdir()] if folder.is_dir() else []
        why = f"{folder} has {len(names)} entries" if folder.is_dir() else f"there is no folder {folder}"
        near = did_you_mean(Path(path).name, names) if names else ""
        raise UserError(f"there is no data file {path}", why, near if near.startswith("did") else "data.path=FILE")
    found = sorted(Path(match) for match in glob.glob(path, recursive=True) if Path(match).is_file())
    if not found:
        raise UserError(f"no file matches {path}", f"looked from {Path.cwd()}", "quote the glob so that the shell leaves it alone, and check the folder")
    return found


def _kind(path: Path) -> str:
    """The ending that decides the format, below .gz."""
    return Path(path.stem).suffix.lower() if path.suffix.lower() == ".gz" else path.suffix.lower()


def is_text(path: Path) -> bool:
    """Is this plain text (one document), and not records?"""
    return _kind(path) not in (".jsonl", ".ndjson", ".json", ".parquet")


class Reader:
    """Reads files in turn and reports how many of their bytes on disk are done."""

    def __init__(self, files: Sequence[Path], progress: Progress | None = None) -> None:
        self.files, self._progress = files, progress
        self._done, self._total = 0, sum(file.stat().st_size for file in files)

    def chunks(self, path: Path) -> Iterator[str]:
        """A text file in pieces of about BLOCK bytes, exactly its characters (a byte order mark is dropped)."""
        decoder = codecs.getincrementaldecoder("utf-8")()
        offset, seen = 0, False
        for block in self._blocks(path):
            text = _decode(decoder, block, path, offset)
            text = text.removeprefix("\ufeff") if offset == 0 else text
            offset += len(block)
            seen = seen or bool(text.strip())
            if text:
                yield text
        _decode(decoder, b"", path, offset, final=True)
        if not seen:
            raise _empty(path)

    def records(self, path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
        """(place, record) of a file of records; the place names file and line for error messages."""
        kind = _kind(path)
        found = self._lines(path) if kind in (".jsonl", ".ndjson") else self._parquet(path) if kind == ".parquet" else self._list(path)
        count = 0
        for where, record in found:
            if not isinstance(record, dict):
                raise UserError(f"{where}: not a record", f"it is a {type(record).__name__}, wanted an object", '{"text": "..."}')
            count += 1
            yield where, record
        if not count:
            raise _empty(path)

    def _lines(self, path: Path) -> Iterator[tuple[str, Any]]:
        offset = 0
        for number, line in enumerate(self._blocks(path, by_line=True), 1):
            text = _decode(codecs.getincrementaldecoder("utf-8-sig" if number == 1 else "utf-8")(), line, path, offset, final=True)
            offset += len(line)
            if text.strip():
                yield f"{path} line {number}", _json(text, f"{path} line {number}", f"sed -n {number}p {path}")

    def _list(self, path: Path) -> Iterator[tuple[str, Any]]:
        content = b"".join(self._blocks(path))
        text = _decode(codecs.getincrementaldecoder("utf-8-sig")(), content, path, 0, final=True)
        if not text.strip():
            raise _empty(path)
        value = _json(text, str(path), f"if it has one record a line, name it {path.with_suffix('.jsonl').name}")
        if not isinstance(value, list):
            raise UserError(f"{path}: not a list of records", f"it holds one {type(value).__name__}", '[{"text": "..."}, ...]')
        yield from ((f"{path} record {number}", record) for number, record in enumerate(value, 1))

    def _parquet(self, path: Path) -> Iterator[tuple[str, Any]]:
        try:
            from pyarrow import ArrowException
            from pyarrow.parquet import ParquetFile
        except ModuleNotFoundError as error:
            raise UserError(f"{path}: reading parquet needs pyarrow", "it is an extra", "pip install 'lilliput[parquet]'") from error
        try:
            with ParquetFile(path) as table:
                rows = (row for batch in table.iter_batches(batch_size=256) for row in batch.to_pylist())
                yield from ((f"{path} row {number}", row) for number, row in enumerate(rows, 1))
        except (ArrowException, OSError) as error:
            raise UserError(f"{path} is not a parquet file", str(error), "fetch or convert it again") from error
        self._finish(path)

    def _blocks(self, path: Path, by_line: bool = False) -> Iterator[bytes]:
        """The content of a file, unzipped, in blocks or in lines."""
        shown = 0
        try:
            with path.open("rb") as raw:
                stream: IO[bytes] = gzip.GzipFile(fileobj=raw) if path.suffix.lower() == ".gz" else raw  # type: ignore[assignment]
                while block := stream.readline() if by_line else stream.read(BLOCK):
                    yield block
                    if self._progress is not None and raw.tell() - shown >= BLOCK:
                        shown = raw.tell()
                        self._progress(self._done + shown, self._total)
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise UserError(f"{path} is not a whole gzip file", str(error), f"gzip -t {path}") from error
        except OSError as error:
            raise UserError(f"cannot read {path}", error.strerror or str(error), f"ls -l {path}") from error
        self._finish(path)

    def _finish(self, path: Path) -> None:
        self._done += path.stat().st_size
        if self._progress is not None:
            self._progress(self._done, self._total)


def _empty(path: Path) -> UserError:
    return UserError(f"{path} is empty", f"{path.stat().st_size} bytes, nothing but blanks in them", "data.path=FILE with text in it")


def _json(text: str, where: str, fix: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise UserError(f"{where}: broken JSON", str(error), fix) from error
    except RecursionError as error:
        raise UserError(f"{where}: broken JSON", "nested too deeply", fix) from error


def _decode(decoder: codecs.IncrementalDecoder, block: bytes, path: Path, offset: int, final: bool = False) -> str:
    """Decode one block that starts at byte `offset` of the file."""
    pending = len(decoder.getstate()[0])
    try:
        return decoder.decode(block, final)
    except UnicodeDecodeError as error:
        at = offset - pending + error.start
        byte = f"byte 0x{error.object[error.start]:02x} at offset {at}: {error.reason}"
        guess = "UTF-16" if at == 0 and error.object[:2] in (b"\xff\xfe", b"\xfe\xff") else "ISO-8859-1"
        raise UserError(f"{path} is not UTF-8", byte, f"iconv -f {guess} -t UTF-8 {path} > {path.stem}.utf8{path.suffix}") from error


# ---- what a record is

SHAPES: dict[str, tuple[tuple[str, ...], ...]] = {
    "messages": (("messages",), ("conversations",)),
    "instruction": (("instruction", "output"), ("prompt", "completion"), ("prompt", "response"), ("question", "answer")),
    "text": (("text",),),
}


def shape(record: dict[str, Any], where: str, wanted: str = "auto") -> tuple[str, tuple[str, ...]]:
    """(shape, the keys that hold it) of a record: "text", "messages" or "instruction"; UserError when it has none of them."""
    for name in SHAPES if wanted == "auto" else (wanted,):
        for keys in SHAPES[name]:
            if all(key in record for key in keys):
                return name, keys
    known = "; ".join(f"{name}: {' or '.join('+'.join(keys) for keys in SHAPES[name])}" for name in (SHAPES if wanted == "auto" else (wanted,)))
    came = ", ".join(sorted(map(str, record))[:12]) or "none"
    raise UserError(f"{where}: unknown kind of record", f"keys that came: {came}; known: {known}", "rename the keys, or set data.format")
