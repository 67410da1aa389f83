"""The fastest schedule of a chain under a byte budget, by dynamic programming: what to keep whole, what to run again, what to page.

    C(i, j, m) = least seconds to have stages i..j-1 forward and backward with m bytes, what enters stage i being there
        keep what stage i saves, or a part:    f_i + C(i+1, j, m - a_i) + b_i + seconds to have the rest of it again
        run forward to k, keep what enters k:  f_i..f_k-1 + C(k, j, m - x_k) + C(i, k, m)
        the same, what enters k paged:         ... + 2 x_k / bandwidth, and x_k stays out of m

a = bytes a stage saves, x = bytes that enter it, f and b = its seconds; a stage alone needs a_i and what lies beside it (gradients,
what operations pass on) at once. Optimal among schedules that keep what enters a stage as long as what it saved (checked against a search
over all states). Bytes are counted in `SLOTS` parts of the budget, rounded up. A paged boundary that is back is not counted: simulate judges.

Beaumont, Eyraud-Dubois, Herrmann, Joly, Shilova 2019 (rotor), arXiv 1911.13214, section 4; paging as in POET, arXiv 2207.07697.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np

from lilliput.memory.plan import Decision
from lilliput.memory.planners.chain import Chain, Layout

SLOTS = 200


@dataclass(frozen=True)
class Costs:
    """A chain in numbers. `page[k]`: seconds to page what enters stage k out and in, None = it cannot. `parts[i]`: (bytes, seconds) of keeping
    less of what stage i saves, seconds being those of running the rest again before its backward pass."""

    saved: tuple[int, ...]
    enters: tuple[int, ...]
    beside: tuple[int, ...]
    forward: tuple[float, ...]
    backward: tuple[float, ...]
    page: tuple[float | None, ...]
    parts: tuple[tuple[tuple[int, float], ...], ...] = ()

    def ways(self, stage: int) -> list[tuple[int, float]]:
        """(bytes, seconds) of keeping all of what a stage saves, and of each part."""
        return [(self.saved[stage], 0.0), *(self.parts[stage] if self.parts else ())]


@dataclass(frozen=True)
class Node:
    """A choice for stages first..end-1. `kind`: "save" (stage `first` whole, or its part number `part` - 1, then `right`) or "split" (at `at`: `right`,
    then `left`)."""

    first: int
    end: int
    kind: str
    at: int = 0
    paged: bool = False
    part: int = 0
    left: Node | None = None
    right: Node | None = None


def solve(costs: Costs, budget: int) -> tuple[float, Node] | None:
    """(seconds, choices) of the fastest schedule of the whole chain; None when none fits."""
    n = len(costs.saved)
    unit = max(1.0, budget / SLOTS)
    slots = lambda count: math.ceil(count / unit) if count else 0
    width = SLOTS + 1
    best = np.full((n + 1, n + 1, width), math.inf)  # best[i, j, m]
    pick = np.zeros((n + 1, n + 1, width), dtype=np.int32)  # -p = save part p, 0 = save whole; 2 k = split at k, 2 k + 1 = the same, paged
    sums = np.concatenate([[0.0], np.cumsum(costs.forward)])
    after = lambda row, gone: np.concatenate([np.full(min(gone, width), math.inf), row[: max(0, width - gone)]])
    for length in range(1, n + 1):
        for i in range(n - length + 1):
            j = i + length
            row, chosen = np.full(width, math.inf), np.zeros(width, dtype=np.int32)
            alone = np.arange(width) >= slots(costs.saved[i] + costs.beside[i])  # its own backward pass must fit, with all that it saves
            for part, (count, again) in enumerate(costs.ways(i)[: None if length > 1 else 1]):
                rest = after(best[i + 1, j], slots(count)) if length > 1 else np.zeros(width)
                cost = np.where(alone, rest + (costs.forward[i] + costs.backward[i] + again), math.inf)
                better = cost < row
                row, chosen = np.where(better, cost, row), np.where(better, -part, chosen)
            for k in range(i + 1, j):
                sweep = sums[k] - sums[i]
                options = [(2 * k, after(best[k, j], slots(costs.enters[k])) + best[i, k] + sweep)]
                if costs.page[k] is not None:
                    options.append((2 * k + 1, best[k, j] + best[i, k] + sweep + costs.page[k]))
                for code, cost in options:
                    better = cost < row
                    row, chosen = np.where(better, cost, row), np.where(better, code, chosen)
            best[i, j], pick[i, j] = row, chosen
    if not math.isfinite(best[0, n, width - 1]):
        return None

    def build(i: int, j: int, m: int) -> Node | None:
        if i == j:
            return None
        code = int(pick[i, j, m])
        if code <= 0:
            return Node(i, j, "save", part=-code, right=build(i + 1, j, m - slots(costs.ways(i)[-code][0])) if j > i + 1 else None)
        k, paged = divmod(code, 2)
        return Node(i, j, "split", k, bool(paged), 0, build(i, k, m), build(k, j, m if paged else m - slots(costs.enters[k])))

    node = build(0, n, width - 1)
    assert node is not None, "a chain has stages"
    return float(best[0, n, width - 1]), node


def costs(chain: Chain, seconds_per_byte: float | None = None) -> Costs:
    """A trace's chain in numbers; seconds_per_byte: of one direction to the tier that pages go to (None: no paging)."""
    stages = chain.stages
    page = tuple(None if seconds_per_byte is None or not s.crossing else 2 * s.crossing * seconds_per_byte for s in stages)
    return Costs(tuple(s.saved for s in stages), tuple(s.crossing for s in stages), tuple(s.other for s in stages), tuple(s.forward for s in stages),
                 tuple(s.backward for s in stages), page)  # fmt: skip


def decisions(chain: Chain, node: Node, tier: str = "host", parts: Sequence[Sequence[Collection[int]]] = ()) -> dict[int, Decision]:
    """The choices as decisions about the trace's tensors. parts: what is kept of each stage's members by each of its parts."""
    layout = Layout(chain)

    def place(here: Node | None, since: int | None) -> None:
        while here is not None:
            if here.kind == "save":
                stage = chain.stages[here.first]
                layout.keep(parts[here.first][here.part - 1] if here.part else stage.members, since)
                layout.again(stage)
                here = here.right
                continue
            layout.keep(chain.stages[here.at].boundary, since, "page" if here.paged else "keep", tier)
            place(here.right, since)
            stages = [s for s in chain.stages[here.first : here.at] if s.asked is not None]
            since = min(stages, key=lambda s: s.leaves).asked if stages else since
            here = here.left

    place(node, None)
    return layout.done()
