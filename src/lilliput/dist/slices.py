"""Bandwidth-centric partitioning: every tensor is split over all ranks, so that a fetch uses every rank's link to its store at once.

Where one rank owns a tensor and broadcasts it, a fetch takes as long as one link needs for the whole of it, however many ranks there are. Here a
rank's tier holds 1 / n of each tensor; all read their slices at the same time and gather them over the network between ranks, which is many
times quicker than a link to a host or a disk. Reading slices ahead needs no other rank; gathering is in one order on all of them.
Cost: n - 1 parts of n of each tensor cross the network, on every rank, as a broadcast's do.

Nothing trains over several ranks yet; this is measured by itself (benchmarks/infinity.md).
Rajbhandari et al. 2021, arXiv 2104.07857, section 6.1.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future

import torch
import torch.distributed as torch_dist
from torch import Tensor

from lilliput.dist.tiers import Tier


class Slices:
    """shapes: name -> numbers and dtype of the whole tensors, the same on all ranks; make: this rank's tier for its parts of them."""

    def __init__(self, make: Callable[[Mapping[str, tuple[int, torch.dtype]]], Tier], shapes: Mapping[str, tuple[int, torch.dtype]],
                 group: torch_dist.ProcessGroup | None = None) -> None:  # fmt: skip
        self.group, self.shapes = group, dict(shapes)
        self.ranks, self.rank = torch_dist.get_world_size(group), torch_dist.get_rank(group)
        self.parts = {name: -(-count // self.ranks) for name, (count, _) in self.shapes.items()}
        self.tier = make({name: (self.parts[name], dtype) for name, (_, dtype) in self.shapes.items()})
        self.coming: dict[str, tuple[Tensor, Future[None]]] = {}

    def write(self, name: str, whole: Tensor) -> None:
        """Keep this rank's part of a flat tensor that every rank has. The last part ends with zeros where it is not full."""
        part, mine = self.parts[name], torch.zeros(self.parts[name], dtype=whole.dtype)
        kept = whole[self.rank * part : (self.rank + 1) * part]
        mine[: kept.numel()].copy_(kept)
        self.tier.write(name, mine).result()
        self.tier.turn(name)

    def begin(self, name: str) -> None:
        """Begin to read this rank's part, if that was not done yet."""
        if name not in self.coming:
            mine = torch.empty(self.parts[name], dtype=self.shapes[name][1])
            self.coming[name] = mine, self.tier.read(name, mine)

    def gather(self, name: str) -> Tensor:
        """The whole flat tensor, on every rank; all of them have to ask for it."""
        self.begin(name)
        mine, ready = self.coming.pop(name)
        ready.result()
        whole = torch.empty(self.ranks * mine.numel(), dtype=mine.dtype)
        torch_dist.all_gather_into_tensor(whole, mine, group=self.group)
        return whole[: self.shapes[name][0]]

    def close(self) -> None:
        """Let go of the tier."""
        self.tier.close()
