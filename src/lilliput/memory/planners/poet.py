"""POET: one mixed-integer program says of every node of a forward and backward graph, stage by stage, whether it is computed (again),
in memory, on storage, paged in or out, for the least time or energy within bytes and a deadline.

Stage t computes node t for the first time and may compute earlier ones again (the frontier advances). Binaries R computed, S in memory
when the stage begins, D on storage, I paged in and O paged out during the stage; U bytes after each node, F = freed on an edge.

    min sum R cost + I in + O out      R_v <= R_u + S_u on every edge      S' <= S + R + I      D' <= D + O      I <= D, O <= S
    U_0 = S + I + R_0    U_k+1 = U_k + R_k+1 - freed by k    U <= budget    freed: computed, not in S', no later consumer in the stage

Not as in the published code: what is being paged in is charged to the stage that reads it (there it is free), and a deadline
counts paging. At most about 32 nodes in half a minute; a larger graph goes through the chain's dynamic program.
Patil et al. 2022, arXiv 2207.07697, section 4; solved by HiGHS.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from lilliput.base.errors import DoesNotFit, UserError
from lilliput.base.ledger import Tier
from lilliput.memory.plan import Decision
from lilliput.memory.planners.chain import Chain
from lilliput.memory.simulate import Link


@dataclass(frozen=True)
class Graph:
    """Nodes in a topological order. `deps[v]`: nodes before v that it reads. Costs are what the objective sums: seconds or joules."""

    deps: tuple[tuple[int, ...], ...]
    bytes: tuple[float, ...]
    cost: tuple[float, ...]
    page_in: tuple[float, ...]
    page_out: tuple[float, ...]
    seconds: tuple[float, ...] = ()  # of computing, for the deadline; () = the costs
    keep: frozenset[int] = frozenset()  # computed once, may neither be computed again nor paged

    def __len__(self) -> int:
        return len(self.deps)


@dataclass(frozen=True)
class Solution:
    """Sets of (stage, node). `gap`: how far the cost can be from the best one, relative."""

    cost: float
    gap: float
    computed: frozenset[tuple[int, int]]
    memory: frozenset[tuple[int, int]]
    storage: frozenset[tuple[int, int]]
    paged_in: frozenset[tuple[int, int]]
    paged_out: frozenset[tuple[int, int]]


class _Program:
    """Variables by (letter, stage, node or edge) and rows of the constraint matrix."""

    def __init__(self) -> None:
        self.index: dict[tuple[str, int, Any], int] = {}
        self.rows: list[tuple[list[tuple[int, float]], float, float]] = []

    def add(self, letter: str, stage: int, what: Any) -> None:
        self.index[letter, stage, what] = len(self.index)

    def row(self, terms: list[tuple[str, int, Any, float]], low: float, high: float) -> None:
        """A row over the variables that exist; the others are 0."""
        self.rows.append(([(self.index[v[:3]], v[3]) for v in terms if v[:3] in self.index], low, high))


def build(graph: Graph, deadline: float | None = None, page_seconds: tuple[tuple[float, ...], tuple[float, ...]] | None = None) -> _Program:
    """The constraints but for the bounds of U (the budget)."""
    program, n = _Program(), len(graph)
    consumers: list[list[int]] = [[v for v in range(n) if u in graph.deps[v]] for u in range(n)]
    edges = [(u, v) for v in range(n) for u in graph.deps[v]]
    for t in range(n):
        for i in range(t + 1):
            for letter in "RU" if i == t else "RUSDIO":
                program.add(letter, t, i)
        for u, v in edges:
            if v <= t:
                program.add("F", t, (u, v))
    for t in range(n):
        for u, v in edges:
            if v <= t:
                program.row([("R", t, v, 1), ("R", t, u, -1), ("S", t, u, -1)], -math.inf, 0)
        for i in range(t):
            program.row([("S", t, i, 1), ("R", t - 1, i, -1), ("S", t - 1, i, -1), ("I", t - 1, i, -1)], -math.inf, 0)
            program.row([("D", t, i, 1), ("D", t - 1, i, -1), ("O", t - 1, i, -1)], -math.inf, 0)
            program.row([("I", t, i, 1), ("D", t, i, -1)], -math.inf, 0)
            program.row([("O", t, i, 1), ("S", t, i, -1)], -math.inf, 0)
        _bytes(program, graph, consumers, t)
    if deadline is not None:
        seconds = graph.seconds or graph.cost
        back, out = page_seconds or (graph.page_in, graph.page_out)
        price = {"R": seconds, "I": back, "O": out}
        program.row([(letter, t, i, price[letter][i]) for letter, t, i in program.index if letter in price], -math.inf, deadline)
    return program


def _bytes(program: _Program, graph: Graph, consumers: list[list[int]], t: int) -> None:
    """How many bytes are in memory after each node of stage t, and what may be freed on each edge."""
    size = graph.bytes
    held = [(letter, t, i, -size[i]) for letter in "SI" for i in range(t)]
    program.row([("U", t, 0, 1), ("R", t, 0, -size[0]), *held], 0, 0)
    for k in range(t + 1):
        if k < t:
            freed = [("F", t, (u, k), size[u]) for u in graph.deps[k]]
            program.row([("U", t, k + 1, 1), ("U", t, k, -1), ("R", t, k + 1, -size[k + 1]), *freed], 0, 0)
        for u in graph.deps[k]:  # hazards = 1 - R_k + S'_u + later consumers; F = 1 exactly when there are none
            later = [w for w in consumers[u] if k < w <= t]
            hazards = [("R", t, k, -1.0), ("S", t + 1, u, 1.0), *(("R", t, w, 1.0) for w in later)]
            program.row([("F", t, (u, k), -1), *((a, b, c, -d) for a, b, c, d in hazards)], -math.inf, 0)
            most = 1 + len(later) + (("S", t + 1, u) in program.index)
            program.row([("F", t, (u, k), most), *hazards], -math.inf, most - 1)


def solve(graph: Graph, budget: float, *, again: bool = True, paging: bool = True, deadline: float | None = None,
          page_seconds: tuple[tuple[float, ...], tuple[float, ...]] | None = None, limit: float = 30.0) -> Solution:  # fmt: skip
    """The cheapest schedule within `budget` bytes. again, paging: whether nodes may be computed twice, or paged.

    limit: seconds for the solver; what it has by then is returned with its gap. DoesNotFit when no schedule exists (the deadline is named
    where it alone is at fault); UserError when the time ran out before one was found.
    """
    from scipy import sparse
    from scipy.optimize import Bounds, LinearConstraint, milp

    program = build(graph, deadline, page_seconds)
    count = len(program.index)
    cost, low, high, whole = np.zeros(count), np.zeros(count), np.ones(count), np.ones(count)
    price = {"R": graph.cost, "I": graph.page_in, "O": graph.page_out}
    for (letter, t, i), j in program.index.items():
        if letter in price:
            cost[j] = price[letter][i]
        if letter == "U":
            high[j], whole[j] = budget, 0
        if letter == "R" and i == t:
            low[j] = 1
        elif (letter == "R" and (not again or i in graph.keep)) or (letter in "DIO" and (not paging or i in graph.keep)):
            high[j] = 0
    terms = [(r, j, a) for r, (row, _, _) in enumerate(program.rows) for j, a in row]
    rows, columns, values = zip(*terms, strict=True)
    matrix = sparse.csr_matrix((values, (rows, columns)), shape=(len(program.rows), count))
    limits = LinearConstraint(matrix, [r[1] for r in program.rows], [r[2] for r in program.rows])
    scale = 1e4 / max(sum(graph.cost), 1e-30)  # HiGHS takes differences below 1e-6 for none, and small nets take milliseconds
    found = milp(scale * cost, constraints=limits, bounds=Bounds(low, high), integrality=whole, options={"time_limit": limit, "mip_rel_gap": 1e-6})
    if found.status == 2:
        if deadline is not None:
            solve(graph, budget, again=again, paging=paging, limit=limit)  # DoesNotFit of its own where bytes are at fault
            why = f"{deadline:g} s for computing and paging within {budget:,.0f} bytes"
            raise DoesNotFit("no schedule meets the deadline", why, "a later deadline or more bytes")
        raise DoesNotFit("no schedule fits", f"the graph has {len(graph)} nodes, the budget {budget:,.0f} bytes", "more bytes")
    if found.x is None:
        raise UserError("the solver ran out of time", f"{limit:g} s were not enough for {len(graph)} nodes", "a longer limit or fewer nodes")
    chosen: dict[str, set[tuple[int, int]]] = {letter: set() for letter in "RSDIO"}
    for (letter, t, i), j in program.index.items():
        if letter in chosen and found.x[j] > 0.5:
            chosen[letter].add((t, i))
    return Solution(float(found.fun) / scale, float(found.mip_gap or 0.0), *(frozenset(chosen[letter]) for letter in "RSDIO"))


def peak(graph: Graph, solution: Solution) -> float:
    """The most bytes of a schedule, replayed by its rules; UserError when it computes from what is not there."""
    n = len(graph)
    most = 0.0
    for t in range(n):
        here = {i for s, i in solution.memory if s == t}
        stays = {i for s, i in solution.memory if s == t + 1}
        coming = {i for s, i in solution.paged_in if s == t}
        computed = sorted(i for s, i in solution.computed if s == t)
        missing = [(v, u) for v in computed for u in graph.deps[v] if u not in here and u not in computed]
        stored = {i for s, i in solution.storage if s == t}
        if missing or t not in computed or not coming <= stored or not stays <= here | coming | set(computed):
            raise UserError("the schedule is not legal", f"stage {t}: {missing or sorted(stays)}", "this is a fault of the solver or of its rounding")
        used = sum(graph.bytes[i] for i in here) + sum(graph.bytes[i] for i in coming)
        for v in computed:
            used += graph.bytes[v]
            most = max(most, used)
            used -= sum(graph.bytes[u] for u in graph.deps[v] if u not in stays and not any(u in graph.deps[w] for w in computed if w > v))
        most = max(most, used)
    return most


def energy(graph: Graph, watts: float, link_watts: float) -> Graph:
    """The same graph with joules for costs and its seconds kept for the deadline."""
    joules = lambda seconds, w: tuple(s * w for s in seconds)
    return replace(
        graph, cost=joules(graph.cost, watts), page_in=joules(graph.page_in, link_watts), page_out=joules(graph.page_out, link_watts),
        seconds=graph.seconds or graph.cost,
    )  # fmt: skip


def of_chain(chain: Chain, link: Link) -> Graph:
    """A chain forward and backward as 2 n nodes: a forward node's bytes are what its stage saves, a backward node's are not counted here."""
    stages, n = chain.stages, len(chain)
    deps: list[tuple[int, ...]] = [((i - 1,) if i else ()) for i in range(n)]
    for i in reversed(range(n)):
        deps.append(tuple(sorted({i, *([i - 1] if i else []), *([2 * n - 2 - i] if i < n - 1 else [])})))
    size = [float(s.saved) for s in stages]
    page = lambda rate: (*(link.latency + b / rate for b in size), *[0.0] * n)
    seconds = (*(s.forward for s in stages), *(s.backward for s in reversed(stages)))
    return Graph(tuple(deps), (*size, *[0.0] * n), seconds, page(link.read), page(link.write), keep=frozenset(range(n, 2 * n)))


def decisions(chain: Chain, solution: Solution, tier: Tier) -> dict[int, Decision]:
    """A solution for `of_chain` as decisions: where a stage's tensors stay from their making to their last use they are kept, else they
    come back as the schedule says, by page where it ever pages them in."""
    n = len(chain)
    found: dict[int, Decision] = {}
    begins = {2 * n - 1 - j: chain.stages[j].asked for j in range(n)}  # stage of the schedule -> what its backward pass asks for first
    for i, stage in enumerate(chain.stages):
        held = lambda t, i=i: (t, i) in solution.memory
        last = 2 * n - 1 - i
        if all(held(t) for t in range(max(i + 1, n), last + 1)):
            continue
        paged = any((t, i) in solution.paged_in for t in range(2 * n))
        spans: list[tuple[int, int | None]] = []
        for t in range(n, last + 1):
            reads = i in (2 * n - 1 - t, 2 * n - 2 - t)  # its own backward pass, or the next stage's
            comes = ((t, i) in solution.computed and (reads or held(t + 1))) or (t, i) in solution.paged_in
            if comes and not held(t):
                end = next((u for u in range(t + 1, last + 1) if not held(u)), None)
                start, stop = begins.get(t), begins.get(end) if end is not None else None
                if start is not None:
                    spans.append((start, stop))
        layout = Decision("page", tier, spans=tuple(spans)) if paged else Decision("recompute", spans=tuple(spans))
        able = lambda s: paged or all(chain.trace.ops[w].replayable for w in chain.trace.storages[s].writers)  # noqa: B023
        found |= {s: layout for s in stage.members if able(s)}
    return found
