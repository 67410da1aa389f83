"""Safetensors: 8 bytes (header length N, little endian), N bytes of JSON {name: {dtype, shape, data_offsets}}, then the tensors.

The header says where every byte lies, so a file can be refused in milliseconds, before torch is imported and before
memory is asked for: a truncated download, a header that claims more than the file, tensors that overlap, leave holes or
disagree with their own shape. A large model is several such files and `model.safetensors.index.json`: {weight_map:
{name: file}}. Tensors are read through the safetensors package, which maps the file and touches only what is asked for.

Format: the safetensors repository's README, section Format (offsets count from the end of the header).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lilliput.base.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1,
         "F8_E4M3": 1, "F8_E5M2": 1}
FLOATS = ("F64", "F32", "F16", "BF16")
MAX_HEADER = 100_000_000  # bytes; the safetensors package's own limit
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


class Entry(NamedTuple):
    """One tensor of a file: bytes [start, end) counted from the end of the header."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def read_header(path: Path) -> dict[str, Entry]:
    """Name -> Entry of one file, every claim checked against its size. UserError for anything that is not so."""
    size = path.stat().st_size
    with path.open("rb") as file:
        first = file.read(8)
        if len(first) < 8:
            raise _broken(path, f"the file has {size} bytes; a header starts with 8")
        length = int.from_bytes(first, "little")
        if length > MAX_HEADER:
            raise _broken(path, f"it claims a header of {length:,} bytes; at most {MAX_HEADER:,} are allowed")
        if 8 + length > size:
            raise _broken(path, f"it claims a header of {length:,} bytes, the file has {size:,}")
        raw = file.read(length)
    if not raw.startswith(b"{"):
        raise _broken(path, "its header is not a JSON object")
    try:
        header = json.loads(raw, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise _broken(path, f"its header is not JSON: {error or 'nested too deeply'}") from error
    header.pop("__metadata__", None)
    entries = {name: _entry(path, name, value) for name, value in header.items()}
    _check_layout(path, entries, size - 8 - length)
    return entries


def shards(path: Path) -> dict[str, tuple[Path, Entry]]:
    """Name -> (file, Entry) of a .safetensors file or of a folder with one or with an index. A missing shard is named."""
    if path.is_file() or not (path / INDEX).is_file():
        single = path if path.is_file() else path / SINGLE
        return {name: (single, entry) for name, entry in read_header(single).items()}
    every = files(path)
    missing = [file.name for file in every if not file.is_file()]
    if missing:
        raise UserError(f"{path}: {len(missing)} of {len(every)} weight files are missing", f"{INDEX} names {', '.join(missing[:3])}",
                        "download the model again")
    weight_map = _weight_map(path / INDEX)
    headers = {file.name: read_header(file) for file in every}
    lost = [f"{name} (in {file})" for name, file in weight_map.items() if name not in headers[file]]
    if lost:
        raise UserError(f"{path}: {len(lost)} tensors are not where the index says", f"first: {', '.join(lost[:3])}", "download the model again")
    return {name: (path / file, headers[file][name]) for name, file in weight_map.items()}


def files(folder: Path) -> list[Path]:
    """The weight files that a folder should have: those its index names, or the single one."""
    if not (folder / INDEX).is_file():
        return [folder / SINGLE]
    return sorted(folder / name for name in set(_weight_map(folder / INDEX).values()))


def read(path: Path, name: str) -> Tensor:
    """One tensor of a file, in the dtype and shape it is stored in, without reading the others.

    A copy: the package hands out views of the mapped file at any alignment, kernels round by alignment, and a file that
    is overwritten in place would change the weights of a running model.
    """
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return file.get_tensor(name).clone()


def raw(path: Path, entry: Entry) -> np.ndarray:
    """The bytes of one tensor, mapped, without torch."""
    import numpy as np

    with path.open("rb") as handle:
        base = 8 + int.from_bytes(handle.read(8), "little")
    return np.memmap(path, mode="r", offset=base + entry.start, shape=(entry.end - entry.start,))


def _weight_map(path: Path) -> Mapping[str, str]:
    try:
        weight_map = json.loads(path.read_bytes(), object_pairs_hook=_unique)["weight_map"]
        names = {name: file for name, file in weight_map.items() if isinstance(file, str)}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _broken(path, f"it is not an index: {error or type(error).__name__}") from error
    outside = [str(file) for file in weight_map.values() if not isinstance(file, str) or Path(file).name != file]
    if outside or not names:
        raise _broken(path, f"it names `{outside[0]}`, which is not a file of its folder" if outside else "it names no file")
    return names


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = dict(pairs)
    if len(names) < len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise ValueError(f"the name `{twice}` stands twice")
    return names


def _entry(path: Path, name: str, value: Any) -> Entry:
    try:
        dtype, shape, (start, end) = value["dtype"], tuple(value["shape"]), value["data_offsets"]
    except (KeyError, TypeError, ValueError) as error:
        raise _broken(path, f"tensor `{name}` lacks dtype, shape or data_offsets") from error
    if not isinstance(dtype, str) or dtype not in BYTES:
        raise UserError(f"{path}: tensor `{name}` has the unknown type {dtype!r}", f"known: {', '.join(BYTES)}", "convert it to one of these")
    if not all(type(n) is int and 0 <= n < 1 << 63 for n in (*shape, start, end)):
        raise _broken(path, f"tensor `{name}` has sizes that are not whole numbers")
    needed = math.prod(shape) * BYTES[dtype]
    if end - start != needed:
        raise _broken(path, f"tensor `{name}` has {end - start:,} bytes; {dtype} of shape {list(shape)} needs {needed:,}")
    return Entry(dtype, shape, start, end)


def _check_layout(path: Path, entries: Mapping[str, Entry], size: int) -> None:
    """Tensors must fill the data without holes or overlap, to the last byte."""
    reached = 0
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].end)):
        if entry.start != reached:
            what = "overlaps the one before it" if entry.start < reached else "leaves a hole before it"
            raise _broken(path, f"tensor `{name}` starts at byte {entry.start:,} of the data and {what}, which ends at {reached:,}")
        reached = entry.end
    if reached > size:
        raise _broken(path, f"its tensors need {reached:,} bytes, the file has {size:,} after the header: it is truncated")
    if reached < size:
        raise _broken(path, f"its tensors end after {reached:,} bytes, the file goes on for {size - reached:,} more")


def _broken(path: Path, why: str) -> UserError:
    return UserError(f"{path} is damaged or not what its name says", why, "download or save it again")
