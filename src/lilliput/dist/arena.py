"""An arena: named tensors of one kind in one preallocated file, two places each, so that a crash leaves the older generation whole.

What is written after a commit goes to the place that the committed generation does not use; `commit` has the disk hold it and then
writes one of two indexes at the file's beginning: generation, tag, which place each tensor is in, a checksum of every block. A process
killed at any moment leaves the last commit and the one before it readable, each by its tag, until new writes take the older one's
places. A tensor that was never written reads as zeros, without the disk. Every block that comes back is held against its checksum: a
damaged one is named. Cost: twice the bytes on disk, checked to be free before anything is written; `generations=1` for what need not last.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from lilliput.base.errors import UserError
from lilliput.base.show import size
from lilliput.dist.engine import BLOCK, Engine, File, aligned, settled, whole_pages

if TYPE_CHECKING:
    from torch import Tensor

HEAD = 40  # bytes before an index: its length and its sha256


def require(folder: Path, files: Mapping[Path, int]) -> None:
    """UserError when files of so many bytes do not fit on the disk of `folder`; what they have already counts."""
    folder.mkdir(parents=True, exist_ok=True)
    needed = sum(max(0, count - (path.stat().st_blocks * 512 if path.exists() else 0)) for path, count in files.items())
    free = shutil.disk_usage(folder).free
    if free < needed:
        why = f"{size(needed)} ({needed:,} bytes) are needed, {size(free)} ({free:,}) are free"
        raise UserError(f"no room in {folder}", why, "another folder, or a smaller model")


def layout(sizes: Mapping[str, int], generations: int = 2) -> tuple[int, dict[str, list[int]], int]:
    """(bytes of an index, name -> its places in the file, bytes of the file) of an arena."""
    slot = aligned(HEAD + 256 + sum(len(json.dumps(n)) + 8 + 20 * -(-count // BLOCK) for n, count in sizes.items()))
    places, end = {}, 2 * slot if generations > 1 else 0
    for name, count in sizes.items():
        places[name] = [end + copy * aligned(count) for copy in range(generations)]
        end += generations * aligned(count)
    return slot, places, end


class Arena:
    """sizes: name -> bytes. Blank until `back`, whatever the file holds. Flat tensors of any dtype; offsets are multiples of BLOCK."""

    def __init__(self, engine: Engine, path: Path, sizes: Mapping[str, int], generations: int = 2) -> None:
        assert engine.block % BLOCK == 0, "an engine's block is made of checksummed blocks"
        self.engine, self.path, self.sizes = engine, path, dict(sizes)
        self.layout = hashlib.sha256(json.dumps([generations, self.sizes]).encode()).hexdigest()[:16]
        self.slot, self.places, self.bytes = layout(self.sizes, generations)
        require(path.parent, {path: self.bytes})
        self.file = File(path, self.bytes, alone=True)
        self.generation, self.index = 0, 1  # of the last commit, and the slot that it is in
        self.at = dict.fromkeys(self.sizes, 0)  # the place that is read
        self.changed: set[str] = set()  # since the last commit: those are written where they are read
        self.sums: dict[str, list[dict[int, int]]] = {n: [{} for _ in p] for n, p in self.places.items()}
        self.pending: dict[str, list[tuple[int, int, int, Future[None]]]] = {}  # writes under way: place, from, to

    # ---- tensors

    def read(self, name: str, into: Tensor, start: int = 0) -> Future[None]:
        """Begin to fill a flat tensor with the bytes from `start` on, after writes to them that are under way."""
        place, flat = self.at[name], into.view(torch.uint8)
        self.wait(name, place, start, start + flat.numel())
        sums = self.sums[name][place]
        if not sums:
            flat.zero_()
            return settled()

        def check(begin: int, came: list[int]) -> None:
            for number, found in enumerate(came, (start + begin) // BLOCK):
                if found != sums.get(number):
                    first = self.places[name][place] + number * BLOCK
                    why = f"block {number} (from byte {first} of {self.path}) has checksum {found:x}, written was {sums.get(number, 0):x}"
                    raise UserError(f"{name} is damaged on disk", why, "go on from another checkpoint, and test the disk")

        return self.engine.read(self.file, flat, self.places[name][place] + start, check)

    def write(self, name: str, flat: Tensor, start: int = 0) -> Future[None]:
        """Begin to write from byte `start` on. The tensor must stay as it is until the future is done; `turn` when all of it has been asked for."""
        place, pages = self._target(name), flat.view(torch.uint8)
        self.wait(name, place, start, start + pages.numel())
        sums = self.sums[name][place]

        def note(begin: int, leave: list[int]) -> None:
            sums.update(enumerate(leave, (start + begin) // BLOCK))

        future = self.engine.write(self.file, pages, self.places[name][place] + start, note)
        self.pending.setdefault(name, []).append((place, start, start + pages.numel(), future))
        return future

    def turn(self, name: str) -> None:
        """From now on what was written is what is read."""
        self.at[name] = self._target(name)
        self.changed.add(name)

    def wait(self, name: str, place: int, start: int, end: int) -> None:
        """Until no write to these bytes is under way. Raises what such a write raised."""
        for entry in list(self.pending.get(name, ())):
            where, first, last, future = entry
            if future.done() or (where == place and first < end and start < last):
                future.result()
                self.pending[name].remove(entry)

    def _target(self, name: str) -> int:
        return self.at[name] if name in self.changed or len(self.places[name]) == 1 else 1 - self.at[name]

    # ---- generations

    def settle(self) -> None:
        """Until nothing is under way, and the disk holds it."""
        for name in self.sizes:
            for place in range(len(self.places[name])):
                self.wait(name, place, 0, self.sizes[name])
        self.file.settle()

    def commit(self, tag: str) -> None:
        """Make what is read now a generation that outlives the process. The one before stays readable until new writes."""
        self.settle()
        sums = {n: [format(self.sums[n][self.at[n]][k], "016x") for k in sorted(self.sums[n][self.at[n]])] for n in self.sizes}
        places = "".join(str(self.at[n]) for n in self.sizes)
        text = json.dumps({"generation": self.generation + 1, "tag": tag, "layout": self.layout, "places": places, "sums": sums}).encode()
        whole = len(text).to_bytes(8, "little") + hashlib.sha256(text).digest() + text
        assert len(whole) <= self.slot, f"an index of {len(whole)} bytes in a slot of {self.slot}"
        buffer = whole_pages(self.slot)
        buffer.numpy()[: len(whole)] = np.frombuffer(whole, np.uint8)
        self.file.write(buffer, self.slot * (1 - self.index))
        self.file.settle()
        self.generation, self.index = self.generation + 1, 1 - self.index
        self.changed.clear()

    def tags(self) -> list[str]:
        """Tags of the generations that the file holds, the newest first."""
        return [index["tag"] for _, index in sorted(self._indexes().items(), key=lambda pair: -pair[1]["generation"])]

    def back(self, tag: str) -> None:
        """Read the generation of this tag from now on. UserError when the file does not hold it."""
        found = self._indexes()
        slot = next((s for s, index in found.items() if index["tag"] == tag), None)
        if slot is None:
            there = ", ".join(index["tag"] for index in found.values()) or "none of this model"
            raise UserError(f"{self.path} does not hold {tag}", f"generations there: {there}", "choose another out folder to start over")
        index = found[slot]
        self.generation, self.index = max(i["generation"] for i in found.values()), slot
        self.at = {n: int(place) for n, place in zip(self.sizes, index["places"], strict=True)}
        self.changed.clear()
        self.sums = {n: [{} for _ in p] for n, p in self.places.items()}
        for name, sums in index["sums"].items():
            self.sums[name][self.at[name]] = {k: int(text, 16) for k, text in enumerate(sums)}

    def close(self) -> None:
        """Finish and close the file."""
        try:
            self.settle()
        finally:
            self.file.close()

    def _indexes(self) -> dict[int, dict[str, Any]]:
        """Slot -> index, of those that are whole and of this layout."""
        found: dict[int, dict[str, Any]] = {}
        buffer = whole_pages(self.slot)
        for slot in range(2):
            self.file.read(buffer, slot * self.slot)
            whole = buffer.numpy().tobytes()
            text = whole[HEAD : HEAD + int.from_bytes(whole[:8], "little")]
            if hashlib.sha256(text).digest() == whole[8:HEAD] and (index := json.loads(text))["layout"] == self.layout:
                found[slot] = index
        return found
