"""Two levels: an integer program says what to keep of each block, a dynamic program over the chain which of these plans each block gets.

    inside a block    min  seconds of operations that run again      x_o <= 1: operation o runs again, k_v in {0, 1}: tensor v is kept
                      a dropped tensor's writers run again: x_w >= 1 - k_v; so do those of what an operation reads and is not kept: x_w >= x_o - k_u
                      bytes kept <= M, for several M: the corners of seconds over bytes are the block's plans
    over the chain    chain_dp, each stage with these parts of what it saves beside "all" and "again from a boundary"

A whole network is too large for one program (poet closes some 48 nodes in minutes); blocks are small and alike: one that repeats, operation by
operation and byte by byte, is solved once. What enters the next stage always stays in a part, so that the levels do not depend on each other. What
a part drops comes back in one run at the first of its tensors that the backward pass asks for. Simulate judges the whole.

As Rockmate: Zhao, Le Hellard, Eyraud-Dubois, Gusak, Beaumont 2023, arXiv 2307.01236; the program is Checkmate's without its time axis.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from lilliput.memory.plan import Decision
from lilliput.memory.planners import chain_dp
from lilliput.memory.planners.chain import Chain, Stage
from lilliput.memory.trace import Trace

LEVELS = 6  # bounds of bytes that a block is solved for
LIMIT = 5.0  # seconds for one of them

Part = tuple[frozenset[int], int, float]  # members kept, their bytes, seconds of the rest


def likeness(trace: Trace, stage: Stage) -> tuple[Any, ...]:
    """Equal for stages that do the same: operations with their reads counted from the stage's own storages, bytes, seconds, what is saved and left."""
    names: dict[int, int] = {}
    for op in trace.ops[stage.first : stage.end]:
        for s in (*op.reads, *op.writes, *op.news):
            names.setdefault(s, len(names))
    told = [(trace.storages[s].bytes, trace.storages[s].external, s in stage.members, bool(trace.storages[s].packs)) for s in names]
    ops = [
        (op.name, *(tuple(names[s] for s in group) for group in (op.reads, op.writes, op.news)), op.replayable, round(op.seconds, 9))
        for op in trace.ops[stage.first : stage.end]
    ]
    return tuple(told), tuple(ops)


def parts(chain: Chain) -> list[list[Part]]:
    """Of each stage, plans that keep less than all of what it saves, most bytes first. Stages that are alike are solved once."""
    solved: dict[Any, list[tuple[list[int], float]]] = {}
    found = []
    for stage, following in zip(chain.stages, [*chain.stages[1:], None], strict=True):
        crossing = frozenset(following.boundary) & frozenset(stage.members) if following else frozenset()
        key = likeness(chain.trace, stage), tuple(place for place, s in enumerate(stage.members) if s in crossing)
        if key not in solved:
            solved[key] = list(_corners(chain.trace, stage, crossing))
        members = lambda places, stage=stage: frozenset(stage.members[p] for p in places)
        count = lambda kept: sum(chain.trace.storages[s].bytes for s in kept)
        found.append([(members(places), count(members(places)), seconds) for places, seconds in solved[key]])
    return found


def _corners(trace: Trace, stage: Stage, crossing: frozenset[int]) -> Iterator[tuple[list[int], float]]:
    """(places of the members kept, seconds of the rest) for falling bytes, each cheaper than any with fewer."""
    least = sum(trace.storages[s].bytes for s in crossing)
    before = float("inf")
    for level in range(LEVELS + 1):
        bound = least + (stage.saved - least) * level / LEVELS
        solution = _solve(trace, stage, crossing, bound)
        if solution is not None and solution[1] < before and len(solution[0]) < len(stage.members):
            before = solution[1]
            yield solution


def _solve(trace: Trace, stage: Stage, crossing: frozenset[int], bound: float) -> tuple[list[int], float] | None:
    """The program for one bound of bytes; None where it cannot be met."""
    from scipy import sparse
    from scipy.optimize import Bounds, LinearConstraint, milp

    ops, n, count = trace.ops[stage.first : stage.end], stage.end - stage.first, len(stage.members)
    place = {s: n + i for i, s in enumerate(stage.members)}
    writers = lambda s, before: [w - stage.first for w in trace.storages[s].writers if stage.first <= w < min(before, stage.end)]
    rows: list[tuple[dict[int, float], float]] = [({place[s]: 1.0, w: 1.0}, 1.0) for s in stage.members for w in writers(s, stage.end)]
    for op in ops:
        o = op.index - stage.first
        for s in dict.fromkeys((*op.reads, *op.writes)):
            kept = s in place and s not in op.writes and trace.version(s, op.index)
            rows += [({w: 1.0, o: -1.0, **({place[s]: 1.0} if kept else {})}, 0.0) for w in writers(s, op.index)]
    size = np.array([trace.storages[s].bytes for s in stage.members], dtype=float)
    rows.append(({place[s]: -size[i] / max(1.0, bound) for i, s in enumerate(stage.members)}, -1.0))
    high = np.array([*(float(op.replayable) for op in ops), *[1.0] * count])
    low = np.array([0.0] * n + [float(s in crossing) for s in stage.members])
    cells = [(r, column, value) for r, (row, _) in enumerate(rows) for column, value in row.items()]
    at, columns, values = zip(*cells, strict=True)
    matrix = sparse.csr_matrix((values, (at, columns)), shape=(len(rows), n + count))
    seconds = np.array([op.seconds for op in ops])
    scale = 1e4 / max(seconds.sum(), 1e-30)  # HiGHS takes differences below 1e-6 for none, and a block takes microseconds
    price = np.concatenate([scale * seconds, 1e-2 * size / max(1.0, size.sum())])  # where seconds are the same, fewer bytes
    found = milp(price, constraints=LinearConstraint(matrix, [r[1] for r in rows], np.inf), bounds=Bounds(low, high),
                 integrality=np.array([0] * n + [1] * count), options={"time_limit": LIMIT, "mip_rel_gap": 1e-6})  # fmt: skip
    if found.x is None:
        return None
    return [i for i in range(count) if found.x[n + i] > 0.5], float(seconds @ np.round(found.x[:n], 6))


def costs(chain: Chain, found: list[list[Part]], seconds_per_byte: float | None = None) -> chain_dp.Costs:
    """The chain in numbers, with the parts of its stages."""
    return replace(chain_dp.costs(chain, seconds_per_byte), parts=tuple(tuple((count, seconds) for _, count, seconds in stage) for stage in found))


def decisions(chain: Chain, found: list[list[Part]], node: chain_dp.Node, tier: str = "host") -> dict[int, Decision]:
    """A solution of chain_dp for `costs` as decisions about the trace's tensors."""
    return chain_dp.decisions(chain, node, tier, [[kept for kept, _, _ in stage] for stage in found])
