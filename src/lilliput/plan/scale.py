"""What a model of any size needs, by ZeRO-Infinity's closed forms: memory of each kind, and the efficiency that a bandwidth leaves.

Parameters are 12 x layers x hidden^2; model states are 20 bytes a parameter (mixed-precision Adam). A step that moves data at
`bandwidth` and does `intensity` flops for each byte runs at intensity x bandwidth / (intensity x bandwidth + peak) of its peak.

Rajbhandari et al. 2021, arXiv 2104.07857, sections 3 and 4.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Scale:
    """A transformer's size and the batch of one GPU. `interval`: blocks between two activation checkpoints."""

    layers: int
    hidden: int
    sequences: int = 32
    tokens: int = 1024
    heads: int = 16
    interval: int = 1

    @property
    def parameters(self) -> int:
        """Weights of the blocks."""
        return 12 * self.layers * self.hidden**2

    @property
    def states(self) -> int:
        """Bytes of parameters, gradients and optimizer."""
        return 20 * self.parameters

    @property
    def checkpoints(self) -> int:
        """Bytes of activation checkpoints."""
        return 2 * self.sequences * self.tokens * self.hidden * self.layers // self.interval

    @property
    def working_states(self) -> int:
        """Bytes of the largest operator's parameters and gradients, hidden to four times hidden."""
        return 4 * self.hidden * 4 * self.hidden

    @property
    def compute(self) -> int:
        """Flops of a step, with the forward pass run again."""
        return 2 * 4 * self.sequences * self.tokens * self.parameters

    @property
    def intensity(self) -> dict[str, float]:
        """Flops for each byte that is moved of parameters and gradients, of optimizer states, of activation checkpoints."""
        rows = self.sequences * self.tokens
        return {"parameters": float(rows), "optimizer": rows / 4, "activations": 24.0 * self.hidden * self.interval}


def efficiency(intensity: float, bandwidth: float, peak: float = 70e12) -> float:
    """Share of the peak (flop/s) that is reached when every byte comes at `bandwidth` (bytes/s) and nothing overlaps."""
    return intensity * bandwidth / (intensity * bandwidth + peak)
