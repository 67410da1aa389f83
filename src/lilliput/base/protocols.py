"""The contracts between floors. Rooms implement them; the rig, the engine and the planner know nothing else of a room.

Torch-free: annotations that name torch types are strings, so a room's file loads in milliseconds.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

from lilliput.base.errors import UserError
from lilliput.base.facts import Facts
from lilliput.base.hardware import Hardware
from lilliput.base.ledger import Ledger

if TYPE_CHECKING:
    from torch import Tensor

    from lilliput.parallel.rig import Rig


class Phase(enum.IntEnum):
    """The fixed order in which train rooms act (assemble's docstring lists what stands between them)."""

    CUT = 0  # split the model over pipeline stages; replaces the schedule
    SHARD = 1  # split modules over tensor/sequence axes
    SWAP = 2  # set slots on Linear (codec, product, deltas)
    REMAT = 3  # what is recomputed in the backward pass
    STORE = 4  # where parameters live between uses
    STEP = 5  # how the update is done


@dataclass(frozen=True)
class Site:
    """Where a job runs: mesh axis -> size, the device, and the shape of one micro-batch."""

    hardware: Hardware
    mesh: Mapping[str, int] = field(default_factory=dict)
    sequences: int = 1  # per micro-batch
    tokens: int = 1024  # per sequence
    element: int = 4  # bytes of a stored weight (4 fp32, 2 bf16); compute and activations are fp32 on CPUs
    micro_batches: int = 1  # of one optimizer step

    @property
    def computed(self) -> int:
        """Bytes of a computed number: CPUs compute in fp32 whatever weights are stored in."""
        return 4 if self.hardware.device.kind == "cpu" else max(2, self.element)


class Strategy(Protocol):
    """A train room: its fields are its config (a base.config.Section), its methods what it does and costs."""

    needs: tuple[str, ...]  # rooms that must act earlier in the same phase; ties by name. `after`, where it is stated: those that do if they are there

    def acts(self) -> Mapping[Phase, Callable[[Rig], Rig]]:
        """What it does in each phase; each act takes the rig and gives the next one."""
        ...

    def refuses(self, others: Mapping[str, Any], facts: Facts) -> str | None:
        """Why it cannot stand beside these rooms (name -> room) or on this model; None when it can."""
        ...

    def cost(self, ledger: Ledger, facts: Facts, site: Site) -> Ledger:
        """The ledger after this room, by arithmetic alone."""
        ...


def refusal(name: str, rooms: Mapping[str, Strategy], facts: Facts) -> str | None:
    """Why a room cannot stand on this model beside the others; None when it can."""
    return rooms[name].refuses({other: room for other, room in rooms.items() if other != name}, facts)


def in_order(rooms: Mapping[str, Strategy]) -> Iterator[tuple[str, Strategy]]:
    """(name, room) in the given order, but each after those of these rooms that it needs or names in `after`; UserError when they wait for each other.

    The rig orders acts with it and the planner costs, so that what is predicted is folded as it is run.
    """
    waiting = dict(rooms)
    while waiting:
        ready = next((n for n, room in waiting.items() if not any(other in waiting for other in (*room.needs, *getattr(room, "after", ())))), None)
        if ready is None:
            raise UserError(f"rooms wait for each other: {', '.join(waiting)}", fix="switch one of them off")
        yield ready, waiting.pop(ready)


class Backend(Protocol):
    """One implementation of an op. The front door asks `supports` in order and reports the reason of each refusal."""

    name: str

    def supports(self, **arguments: Any) -> str | None:
        """None when it can take these arguments, else the reason why not."""
        ...


class KVPolicy(Protocol):
    """WHICH tokens stay in the cache. Where they lie is blocks', how many bits is the codec's. Made from the text after its name and a colon."""

    wants_mass: bool  # needs the attention mass of each key
    evicts: bool
    positions: Literal["absolute", "in_cache"]  # in_cache: a key's position is its place among those that stayed
    size: int  # tokens a sequence holds at most, a multiple of a block; 0 = all

    def budget(self, prompt: int, max_new: int) -> int:
        """Tokens of cache a request of this length needs at most."""
        ...

    def keep(self, count: int, mass_LGT: Tensor | None, positions_LGT: Tensor | None) -> Tensor:
        """Which `count` of the places stay, in rising order: [count] where they are the same for all heads, else [layers, kv_heads, count].

        Asked when a sequence holds `size` tokens. mass: probability that each key got, over all queries since it came and the group;
        positions: of each key in the text. Both only with wants_mass."""
        ...


class Drafter(Protocol):
    """Guesses tokens for speculation. `plan` before blocks are given out, `fill` after that, since a model that guesses needs blocks too.
    Neither is called at steps where nothing is guessed. `late`: whether the last `fill` read much that it will not read again."""

    late: bool

    def plan(self, id: int, tokens: Sequence[int], gamma: int) -> list[int]:
        """At most gamma ids that may follow the known tokens of sequence `id`, or as many places for `fill`."""
        ...

    def fill(self, chunks: Sequence[Any], draw: Callable[[int, int], Any]) -> dict[int, Any]:
        """Write guesses into the chunks that have places. Sequence -> q [gamma, vocab] where they were drawn and are not certain."""
        ...

    def forget(self, id: int) -> None:
        """The sequence has ended."""
        ...


class Runner(Protocol):
    """Runs the model for the engine: token rows in, logits of the sampled rows out."""

    def forward(self, chunks: Sequence[Any], mass: Tensor | None = None) -> Tensor:
        """Logits [rows, vocab] of the last `wants` tokens of each chunk (serve.scheduler.Chunk), in their order.

        mass [layers, chunks, kv_heads, >= longest]: attention probabilities of each key are added, where a policy wants them."""
        ...

    def move(self, moves: Any) -> None:
        """Copy the blocks that serve.scheduler.Moves names, before the next forward."""
        ...

    def lower(self, pairs: Mapping[str, tuple[Tensor, Tensor]]) -> Any:
        """A LoRA adapter (canonical path of a Linear -> A [rank, in], B [out, rank], the scale in B) as `forward` takes it in a chunk's `adapter`."""
        ...
