"""Chen's planner: walk the chain and begin a new segment whenever the stages since the last one keep more than b bytes.

The paper tries b on a grid between B/sqrt(2) and sqrt(2) B around the geometric mean of what crosses the cuts and of the largest segment,
and takes the best. Fits chains whose stages differ.   Chen et al. 2016, arXiv 1604.06174, algorithm 3.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Split:
    """Segments by the stage each begins with, and the algorithm's own two sums: bytes that cross the cuts, largest segment."""

    starts: tuple[int, ...]
    crossing: int
    segment: int


def split(saved: list[int], crossing: list[int], b: float) -> Split:
    """Algorithm 3 on bytes kept by each stage and crossing into each stage (crossing[0] counts for nothing)."""
    starts, temp, most, over = [0], 0, 0, 0
    for stage, kept in enumerate(saved):
        if stage and temp + kept > b:
            starts.append(stage)
            over += crossing[stage]
            most, temp = max(most, temp), 0
        temp += kept
    return Split(tuple(starts), over, max(most, temp))


def grid(saved: list[int], crossing: list[int], points: int = 6) -> Iterator[Split]:
    """The paper's search: split with a first guess, take B = sqrt(x y) from what comes out, then `points` values around it."""
    guess = split(saved, crossing, math.sqrt(sum(saved) * max(saved)))
    around = math.sqrt(max(1, guess.crossing) * max(1, guess.segment))
    for i in range(points):
        yield split(saved, crossing, around * 2 ** (i / (points - 1) - 0.5))
    yield from (split(saved, crossing, max(saved) * factor) for factor in (1, 2, 4))


def best(saved: list[int], crossing: list[int], cost: Callable[[Split], float] = lambda s: s.crossing + s.segment) -> Split:
    """The split of the grid with the lowest cost (default: the paper's own estimate)."""
    return min(grid(saved, crossing), key=cost)
