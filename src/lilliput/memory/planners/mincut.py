"""ZeRO-Offload's placement from first principles: cut the data-flow graph of mixed-precision Adam in two, device and host.

    p16 --4M--> FWD-BWD --2M--> g16 --2M--> update <--4M--> p32, m32, v32       bytes a step for M parameters; p16 is read
    p16 <--2M-- float2half <--4M-- p32                                          by the forward and by the backward pass

FWD-BWD stays on the device: its work grows with M x batch, a host's share must not. Each other node lies on a cycle, so
what moves anything out cuts two edges at least: 4M bytes. The cuts that move no more are the paper's table 1; the one that
frees most is unique: gradients, master weights, both moments, the update and the rounding go to the host. Found by trying all.

Ren et al. 2021, arXiv 2101.06840, section 3 and table 1.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

STATES: Mapping[str, int] = {"p16": 2, "g16": 2, "p32": 4, "m32": 4, "v32": 4}  # bytes a parameter
WORK = ("FWD-BWD", "update", "float2half")
EDGES: tuple[tuple[str, str, int], ...] = (  # (from, to, bytes a parameter and step)
    ("p16", "FWD-BWD", 4),
    ("FWD-BWD", "g16", 2),
    ("g16", "update", 2),
    *((state, "update", 4) for state in ("p32", "m32", "v32")),
    *(("update", state, 4) for state in ("p32", "m32", "v32")),
    ("p32", "float2half", 4),
    ("float2half", "p16", 2),
)


@dataclass(frozen=True)
class Cut:
    """A partition by what lies on the host; bytes are for one parameter."""

    host: frozenset[str]

    @property
    def traffic(self) -> int:
        """Bytes that cross the link in a step."""
        return sum(weight for a, b, weight in EDGES if (a in self.host) != (b in self.host))

    @property
    def device(self) -> int:
        """Bytes of states that stay on the device."""
        return sum(count for state, count in STATES.items() if state not in self.host)

    @property
    def saving(self) -> float:
        """How many times more parameters fit on the device than with everything there."""
        return sum(STATES.values()) / self.device if self.device else float("inf")


def cuts() -> Iterator[Cut]:
    """Every partition with the forward and backward pass on the device."""
    free = [node for node in (*STATES, *WORK) if node != "FWD-BWD"]
    for size in range(len(free) + 1):
        yield from (Cut(frozenset(chosen)) for chosen in itertools.combinations(free, size))


def cheapest() -> list[Cut]:
    """The partitions that move something out at the least traffic, those that free most first."""
    moved = [cut for cut in cuts() if cut.host]
    least = min(cut.traffic for cut in moved)
    return sorted((cut for cut in moved if cut.traffic == least), key=lambda cut: cut.device)


def best() -> Cut:
    """The one that frees most of them."""
    return cheapest()[0]
