"""The boards of POET's paper, from the constants of its code: compute rate, SD-card links, watts. Torch-free.

Time of an operation = flops / rate; of a page = latency + bytes / throughput; joules = that times the lane's watts.
The Jetson TX2 is left out: no rate of it is stated there. The Raspberry Pi's page-out is with its file cache.
ShishirPatil/poet, poet/chipsets.py at 6e63098; Patil et al. 2022, arXiv 2207.07697, section 5.
"""

from __future__ import annotations

from dataclasses import dataclass

from lilliput.memory.simulate import Link, Rates


@dataclass(frozen=True)
class Board:
    """One device: flop/s, watts of computing, and the link to its storage."""

    name: str
    flops: float
    watts: float
    disk: Link

    def seconds(self, flops: float) -> float:
        """Of an operation."""
        return flops / self.flops

    def rates(self) -> Rates:
        """For the simulator."""
        return Rates({"disk": self.disk}, self.watts)


SD = {"write": 4.44e6, "read": 4.61651e6, "latency": 0.113e-3, "watts": 0.33}
BOARDS = {
    board.name: board
    for board in (
        Board("mkr1000", 2000 / 0.012, 0.066, Link(**SD)),  # Cortex-M0+, floats in software
        Board("m4f", 16283e5 / 255.6237, 3.328e-3 * 3.3, Link(**SD)),  # nRF52840
        Board("a72", 2e9, 3.0, Link(24.5e6, 45.5e6, 18.5314e-6, 0.15)),  # Raspberry Pi 4
    )
}
