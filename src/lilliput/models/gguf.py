"""GGUF, llama.cpp's single-file format: magic, version, counts, key-value metadata, a table of tensors, aligned data.

Own header reader over mmap: 0.1 s for the default model, where gguf.GGUFReader takes 2 to 4 s (49,152 tokens and 48,900
merges become numpy views there). Every count, length and offset is compared with the file before it is believed, so a
lying header costs an error message and no memory. Blocks are dequantised by `gguf.quants.dequantize`.

Shapes: GGUF writes the fastest dimension first; here they are reversed, so a matrix is [out, in] as in torch.
Format: ggml/docs/gguf.md of llama.cpp.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lilliput.base.errors import UserError

if TYPE_CHECKING:
    import numpy as np

# type number -> (name, elements in a block, bytes of a block)
TYPES = {0: ("F32", 1, 4), 1: ("F16", 1, 2), 30: ("BF16", 1, 2), 2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22), 7: ("Q5_1", 32, 24),
         8: ("Q8_0", 32, 34), 10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110), 12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176), 14: ("Q6_K", 256, 210)}
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}  # value type -> struct code
STRING, ARRAY = 8, 9
SMALLEST_PAIR, SMALLEST_TENSOR = 8 + 4 + 1, 8 + 4 + 8 + 4 + 8  # bytes: what one metadata pair and one table row take at least
MAX_DIMS = 4
MAX_NUMBERS = 1 << 24  # numbers in one metadata list; a vocabulary of 300,000 is the longest in use


class Entry(NamedTuple):
    """One tensor: its type, shape as torch has it, and bytes [start, end) of the file."""

    type: int
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def dtype(self) -> str:
        """The type's name: F32, Q4_1 ..."""
        return TYPES[self.type][0]


@dataclass(frozen=True)
class Header:
    """What a GGUF file says before its data."""

    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, Entry]


def read_header(path: Path) -> Header:
    """Metadata and tensor table, every claim checked against the file's size. UserError for anything that is not so."""
    size = path.stat().st_size
    if size < 24:
        raise _broken(path, f"the file has {size} bytes; a header has at least 24")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        return _Reader(path, data).header()


def read(header: Header, name: str) -> np.ndarray:
    """One tensor dequantised to fp32, in its torch shape."""
    import numpy as np

    entry = header.tensors[name]
    _, block, block_bytes = TYPES[entry.type]
    raw = np.fromfile(header.path, dtype=np.uint8, count=entry.end - entry.start, offset=entry.start)
    if entry.dtype == "F32":
        return raw.view(np.float32).reshape(entry.shape)
    if entry.dtype == "F16":
        return raw.view(np.float16).astype(np.float32).reshape(entry.shape)
    import gguf

    rows = raw.reshape(-1, entry.shape[-1] // block * block_bytes)
    return gguf.quants.dequantize(rows, gguf.GGMLQuantizationType(entry.type)).reshape(entry.shape)


def read_blocks(header: Header, name: str) -> np.ndarray | None:
    """A quantised matrix as it is stored: uint8 [outputs, bytes of a row]. None for plain numbers and for vectors."""
    import numpy as np

    entry = header.tensors[name]
    _, block, block_bytes = TYPES[entry.type]
    if block == 1 or len(entry.shape) != 2:
        return None
    raw = np.fromfile(header.path, dtype=np.uint8, count=entry.end - entry.start, offset=entry.start)
    return raw.reshape(entry.shape[0], entry.shape[1] // block * block_bytes)


class _Reader:
    """A cursor over the mapped file that never reads past its end."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path, self.data, self.at, self.size = path, data, 0, len(data)

    def header(self) -> Header:
        magic, version = self.data[:4], self.number("I", 4)
        if magic != b"GGUF":
            raise _broken(self.path, f"it starts with {magic!r}, not with b'GGUF'")
        if version not in (2, 3):
            why = "it is big-endian" if version in (2 << 24, 3 << 24) else f"its version is {version}; read are 2 and 3"
            raise UserError(f"{self.path}: this GGUF cannot be read", why, "convert it again with a current llama.cpp")
        tensor_count, pair_count = self.number("Q"), self.number("Q")
        for count, smallest, what in ((tensor_count, SMALLEST_TENSOR, "tensors"), (pair_count, SMALLEST_PAIR, "metadata pairs")):
            self.need(count * smallest, f"{count:,} {what}")
        metadata: dict[str, Any] = {}
        for _ in range(pair_count):
            key = self.string()
            if key in metadata:
                raise _broken(self.path, f"the key `{key}` stands twice")
            metadata[key] = self.value(self.number("I"), key)
        alignment = metadata.get("general.alignment", 32)
        if type(alignment) is not int or not 8 <= alignment <= 1 << 16 or alignment & (alignment - 1):
            raise _broken(self.path, f"its alignment is {alignment!r}; it must be a power of two from 8 to 65,536")
        table = dict(self.rows(tensor_count))
        return Header(self.path, metadata, self.place(table, -(-self.at // alignment) * alignment, alignment))

    def rows(self, count: int) -> Iterator[tuple[str, tuple[int, tuple[int, ...], int]]]:
        """Name -> (type, shape, offset) as the table states them."""
        seen = set()
        for _ in range(count):
            name, dims = self.string(), self.number("I")
            if not 1 <= dims <= MAX_DIMS:
                raise _broken(self.path, f"tensor `{name}` has {dims:,} dimensions; 1 to {MAX_DIMS} are allowed")
            if name in seen:
                raise _broken(self.path, f"tensor `{name}` stands twice")
            seen.add(name)
            shape = tuple(self.number("Q") for _ in range(dims))[::-1]
            yield name, (self.number("I"), shape, self.number("Q"))

    def place(self, table: Mapping[str, tuple[int, tuple[int, ...], int]], data_start: int, alignment: int) -> dict[str, Entry]:
        """The tensors with their bytes in the file; they may neither overlap nor pass its end."""
        out: dict[str, Entry] = {}
        for name, (kind, shape, offset) in table.items():
            if kind not in TYPES:
                raise UserError(f"{self.path}: tensor `{name}` is stored as {_type_name(kind)}", f"read are {', '.join(t[0] for t in TYPES.values())}",
                                "take another quantisation of this model (Q4_K_M, Q8_0, F16)")
            _, block, block_bytes = TYPES[kind]
            if math.prod(shape) == 0 or shape[-1] % block:
                raise _broken(self.path, f"tensor `{name}` has shape {list(shape)}; {TYPES[kind][0]} needs rows of a multiple of {block}")
            start, length = data_start + offset, math.prod(shape) // block * block_bytes
            if offset % alignment:
                raise _broken(self.path, f"tensor `{name}` starts at offset {offset:,}, which is no multiple of the alignment {alignment}")
            if start + length > self.size:
                raise _broken(self.path, f"tensor `{name}` ends at byte {start + length:,}, the file has {self.size:,}: truncated, or a false header")
            out[name] = Entry(kind, shape, start, start + length)
        last_name, last_end = "", data_start
        for name, entry in sorted(out.items(), key=lambda item: item[1].start):
            if entry.start < last_end:
                raise _broken(self.path, f"tensors `{last_name}` and `{name}` overlap at byte {entry.start:,}")
            last_name, last_end = name, entry.end
        return out

    def value(self, kind: int, key: str) -> Any:
        if kind in SCALARS:
            return self.number(SCALARS[kind])
        if kind == STRING:
            return self.string()
        if kind != ARRAY:
            raise _broken(self.path, f"the key `{key}` has the unknown type {kind:,}")
        inner, count = self.number("I"), self.number("Q")
        if inner in SCALARS:
            code = f"<{count}{SCALARS[inner]}"
            if count > MAX_NUMBERS:
                raise _broken(self.path, f"the list `{key}` claims {count:,} numbers; at most {MAX_NUMBERS:,} are read")
            self.need(count * struct.calcsize(f"<{SCALARS[inner]}"), f"{count:,} values of `{key}`")
            values = struct.unpack_from(code, self.data, self.at)
            self.at += struct.calcsize(code)
            return list(values)
        if inner != STRING:
            raise _broken(self.path, f"the list `{key}` has elements of the {'nested' if inner == ARRAY else 'unknown'} type {inner:,}")
        self.need(count * 8, f"{count:,} texts of `{key}`")
        return [self.string() for _ in range(count)]

    def number(self, code: str, at: int | None = None) -> Any:
        if at is not None:
            self.at = at
        width = struct.calcsize(f"<{code}")
        self.need(width, "the next number")
        (value,) = struct.unpack_from(f"<{code}", self.data, self.at)
        self.at += width
        return value

    def string(self) -> str:
        length = self.number("Q")
        self.need(length, f"a text of {length:,} bytes")
        raw = self.data[self.at : self.at + length]
        self.at += length
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise _broken(self.path, f"a text before byte {self.at:,} is not UTF-8: {error.reason}") from error

    def need(self, count: int, what: str) -> None:
        if count > self.size - self.at:
            raise _broken(self.path, f"{what} would need {count:,} bytes from byte {self.at:,} on; the file has {self.size:,}")


def _type_name(kind: int) -> str:
    import gguf

    known = {member.value: member.name for member in gguf.GGMLQuantizationType}
    return known.get(kind, f"the unknown type {kind:,}")


def _broken(path: Path, why: str) -> UserError:
    return UserError(f"{path} is damaged or not a GGUF file", why, "download it again")
