"""Adapters: LoRA updates that requests name, many in one batch, loaded and unloaded while the engine runs.

    read      a folder in peft's layout becomes an Adapter in the runner's form (any thread; nothing has changed yet)
    put       its name is known; a request that names it carries the Adapter, so one that is replaced or removed ends with its last request
    remove    the name is gone, and so are the blocks that were computed under it

Keys and values depend on the adapter, so each has a salt of its own: the same prompt under two adapters shares no block, and one that
is loaded again under its old name starts cold.

Folders are taken from one place alone (`Library`): what lies elsewhere, also behind a symbolic link, is refused before it is opened.

Cost: see ops/low_rank.py; memory, the matrices (plan/serving.py counts them). Hu et al. 2021, arXiv 2106.09685; Chen et al. 2023 (Punica), arXiv 2310.18547.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lilliput.base.errors import DoesNotFit, UserError, did_you_mean
from lilliput.models.adapters import CONFIG, WEIGHTS, read_adapter
from lilliput.serve.blocks import salted

if TYPE_CHECKING:
    from torch import Tensor

    from lilliput.models.spec import DecoderSpec
    from lilliput.serve.scheduler import Chunk, Group


@dataclass(frozen=True, eq=False)
class Adapter:
    """One loaded adapter. `number`: never given twice; `lowered`: what the runner made of it."""

    name: str
    number: int
    rank: int
    lowered: Any

    @property
    def salt(self) -> bytes:
        """Of its blocks."""
        return salted(f"adapter {self.number}")


class Adapters:
    """The adapters of one engine, by name."""

    def __init__(self, spec: DecoderSpec, lower: Callable[[Mapping[str, tuple[Tensor, Tensor]]], Any], most: int) -> None:
        """`lower`: the runner's; `most`: adapters that may be loaded at once."""
        self.spec, self.most = spec, most
        self._lower, self._numbers = lower, itertools.count(1)
        self._loaded: dict[str, Adapter] = {}

    @property
    def names(self) -> tuple[str, ...]:
        """Of those that are loaded."""
        return tuple(self._loaded)

    def find(self, name: str) -> Adapter | None:
        """The adapter of a request; None for the model's own weights. UserError for one that is not loaded."""
        if not name:
            return None
        if name not in self._loaded:
            raise UserError(f"no adapter is named `{name}`", f"loaded: {', '.join(self.names) or 'none'}", did_you_mean(name, self.names))
        return self._loaded[name]

    def read(self, name: str, folder: Path) -> Adapter:
        """Read and lower a folder. UserError where it holds no plain LoRA of this model."""
        if not name:
            raise UserError("an adapter needs a name", "requests ask for it by its name", "name=french")
        pairs = read_adapter(folder, self.spec, 1.0)
        return Adapter(name, next(self._numbers), max(a.shape[0] for a, _ in pairs.values()), self._lower(pairs))

    def put(self, adapter: Adapter, replace: bool = False) -> Adapter | None:
        """Make it known; the one that had its name before. UserError where that may not be replaced, DoesNotFit when there are too many."""
        if adapter.name in self._loaded and not replace:
            raise UserError(f"an adapter named `{adapter.name}` is loaded already", fix="another name, or unload it first")
        if adapter.name not in self._loaded and len(self._loaded) >= self.most:
            raise DoesNotFit(f"adapter `{adapter.name}` is one too many", f"{len(self._loaded)} are loaded, at most {self.most} may be",
                             f"unload one, or serve.max_adapters={self.most + 1}")  # fmt: skip
        before = self._loaded.get(adapter.name)
        self._loaded[adapter.name] = adapter
        return before

    def remove(self, name: str) -> Adapter:
        """Its name is free. UserError where it is not loaded."""
        found = self.find(name)
        assert found is not None, "the base has no name"
        del self._loaded[name]
        return found


def together(chunks: list[Chunk]) -> list[Chunk]:
    """The same chunks, those of an adapter side by side, the model's own first."""
    return sorted(chunks, key=lambda chunk: chunk.adapter.number if chunk.adapter else 0) if any(chunk.adapter for chunk in chunks) else chunks


def names(groups: Iterable[Group]) -> tuple[str, ...]:
    """Of the adapters that these run under, in order."""
    return tuple(sorted({group.adapter.name for group in groups if group.adapter}))


def segments(chunks: Sequence[Chunk]) -> list[tuple[int, int, Any]]:
    """(first row, row after the last, lowered) of the packed rows of these chunks, neighbours of one adapter in one segment."""
    found: list[tuple[int, int, Any]] = []
    at = 0
    for adapter, group in itertools.groupby(chunks, lambda chunk: chunk.adapter):
        rows = sum(len(chunk.ids) for chunk in group)
        if adapter:
            found.append((at, at + rows, adapter.lowered))
        at += rows
    return found


class Library:
    """The one folder that adapters are loaded from."""

    def __init__(self, folder: str) -> None:
        """UserError where there is no such folder."""
        self.folder = Path(folder).expanduser().resolve()
        if not self.folder.is_dir():
            raise UserError(f"serve.adapters={folder} is no folder", fix="serve.adapters=FOLDER, with one folder for each adapter in it")

    def found(self) -> dict[str, Path]:
        """Name -> folder of the adapters that lie in it, or that it is. UserError for one that is a link to elsewhere."""
        found = sorted(path.parent for pattern in (CONFIG, f"*/{CONFIG}") for path in self.folder.glob(pattern))
        return {folder.name: self.place(str(folder)) for folder in found}

    def place(self, path: str) -> Path:
        """The folder that `path` (in the library, or absolute) names. UserError for one that is not inside, or whose files are not."""
        outside = UserError(f"`{path}` is not in the folder of adapters", "adapters are taken from there alone", "give a path inside it")
        try:
            place = (self.folder / path).resolve()
            inside = [place, *((place / name).resolve() for name in (CONFIG, WEIGHTS))]
            place.is_dir()
        except (OSError, ValueError, RuntimeError) as error:  # a loop of links, a null byte, a name that is too long
            raise outside from error
        if not all(one.is_relative_to(self.folder) for one in inside):
            raise outside
        return place
