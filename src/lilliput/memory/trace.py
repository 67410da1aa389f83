"""Trace: what one forward and backward does to memory, storage by storage, in the order of the eager run. No torch.

    OP i        operation i ran and made its new storages          FREE s      Python let go of storage s
    PACK k      autograd saves its k-th tensor                     UNPACK k    the backward pass asks for it
    DONE k      ... and has let go of what it was given            RELEASE k   autograd forgets the k-th saved tensor

FREE is told as if autograd kept nothing: how long a storage really lives follows from the plan. Views are their storage.
Storages that were there before (parameters, inputs, constants) are external: they cost nothing here and are never freed.
A storage is written by the operation that makes it and by every one that changes it in place; whoever reads it in between
reads a version that is gone later, so it can be recomputed only by running those writers again (`closure`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from lilliput.base.errors import UserError

OP, FREE, PACK, UNPACK, DONE, RELEASE = "op", "free", "pack", "unpack", "done", "release"


@dataclass
class Storage:
    """One piece of memory. `writers`: operations that made or changed it, in order; none: it is external."""

    index: int
    bytes: int
    name: str = ""  # parameter or input name of an external one; module path and operation of the others
    writers: list[int] = field(default_factory=list)
    packs: list[int] = field(default_factory=list)  # saved tensors that lie in it
    readers: list[int] = field(default_factory=list)  # forward operations that read it
    kind: str = "activation"  # activation | parameter | input | gradient
    dtype: str = ""  # of what an operation made it for

    @property
    def external(self) -> bool:
        """Whether it was there before the run."""
        return not self.writers


@dataclass
class Op:
    """One operation. `reads` and `writes` name a storage for each tensor argument that it reads or changes in place."""

    index: int
    name: str
    reads: tuple[int, ...]
    writes: tuple[int, ...]
    news: tuple[int, ...]
    forward: bool
    module: str = ""
    flops: float = 0.0
    traffic: int = 0  # bytes of the tensors that it reads and writes
    seconds: float = 0.0
    random: bool = False  # draws from the default generator
    replayable: bool = True  # may run again: changes nothing external, reads nothing that is hidden

    @property
    def view(self) -> bool:
        """It makes and changes nothing."""
        return not self.news and not self.writes


@dataclass
class Trace:
    """All of it. `forwards` is the number of operations of the forward pass: they come first."""

    storages: list[Storage]
    ops: list[Op]
    events: list[tuple[str, int]]
    packs: list[int]  # storage of each saved tensor
    forwards: int
    blocks: tuple[int, ...] = ()  # where blocks of the model begin: operation indices

    def digest(self) -> str:
        """Names the trace: operations, sizes and events. A plan belongs to one digest."""
        told = repr([(o.name, o.reads, o.writes, o.news) for o in self.ops]) + repr([s.bytes for s in self.storages]) + repr(self.events)
        return hashlib.sha256(told.encode()).hexdigest()[:16]

    def saved(self) -> list[Storage]:
        """Storages that autograd keeps and a plan decides about: saved in the forward pass, not external."""
        return [s for s in self.storages if s.packs and not s.external]

    def version(self, storage: int, op: int) -> bool:
        """Whether what `op` reads of a storage is its last version."""
        writers = self.storages[storage].writers
        return not writers or writers[-1] < op or writers[-1] == op

    def order(self) -> dict[int, int]:
        """k of each UNPACK -> its place among the events."""
        return {k: at for at, (kind, k) in enumerate(self.events) if kind == UNPACK}


def closure(trace: Trace, targets: Iterable[int], available: Callable[[int], bool], strict: bool = True) -> tuple[list[int], set[int]]:
    """(operations to run again in order, storages they read from what is there) to have the targets again.

    available(s): the last version of s is in memory. strict: UserError when an operation on the way cannot run again.
    """
    needed, sources, stack, seen = set(), set(), [(t, len(trace.ops)) for t in targets], set()
    while stack:
        storage, before = stack.pop()
        if (storage, before) in seen:
            continue
        seen.add((storage, before))
        for writer in trace.storages[storage].writers:
            if writer >= before or writer in needed:
                continue
            op = trace.ops[writer]
            if strict and not op.replayable:
                raise UserError(f"{trace.storages[storage].name} cannot be recomputed", f"operation {writer} ({op.name}) cannot run twice", "keep it")
            needed.add(writer)
            for read in (*op.reads, *op.writes):
                if trace.storages[read].external or (trace.version(read, writer) and read not in op.writes and available(read)):
                    sources.add(read)
                else:
                    stack.append((read, writer))
    return sorted(needed), sources
