"""POET: one mixed-integer program decides for every activation at every step whether it is kept, recomputed or paged to flash,
for the least energy under a memory budget and a deadline, with time and energy of every operation profiled on the device.

The run holds the program against an exhaustive search on small random graphs, solves chains whose layers cost one or ten, with recomputation
and paging together and each alone, says what three boards pay in joules for a decoder in 70 % of its bytes, and executes a solution for it: metered
bytes against predicted ones, gradients against the plain run.

Patil et al. 2022, ICML 2022, arXiv 2207.07697.
"""

from __future__ import annotations

import heapq
import itertools
import math
import random
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from lilliput.papers.paper import Finding, Paper

if TYPE_CHECKING:
    from lilliput.memory.planners.poet import Graph

GRAPHS = 40  # random ones of 3 and 4 nodes
SHARE = 0.7  # of what the decoder's stages save, on boards
CHAINS = ((6, 5), (7, 5), (8, 5), (8, 6))  # (layers, budget in activations)


def run() -> Finding:
    """The search, overheads of the three ways, joules on boards, and one solution executed; about 10 s on one core."""
    found = [_searched(seed) for seed in range(GRAPHS)]
    boards = _boards()
    rows = [_chain(layers, budget, dear) for layers, budget in CHAINS for dear in (0, 1)]
    better = sum(row["together"] < min(row["again only"], row["paging only"]) for row in rows)
    worse = sum(row["together"] > min(row["again only"], row["paging only"]) for row in rows)
    saved = max(1 - row["together"] / min(row["again only"], row["paging only"]) for row in rows)
    exact, same, paged = _executed()
    energy = ", ".join(f"{row['board']} +{row['together']:.1f} %" for row in boards)
    least = all(row["together"] <= min(row["again only"], row["paging only"]) + 1e-6 for row in boards)
    summary = (
        f"equal to exhaustive search on {sum(found)} of {GRAPHS} graphs; together never worse than either alone "
        f"in {len(rows) - worse} of {len(rows)} chains and cheaper in {better}, by up to {saved:.0%}; joules above computing once, "
        f"a decoder with {SHARE:.0%} of its bytes: {energy}; "
        f"executed for a decoder {'with' if paged else 'WITHOUT'} pages: bytes {'as predicted' if exact else 'NOT as predicted'}, "
        f"gradients {'bitwise equal' if same else 'NOT equal'}"
    )
    return Finding(summary, (*rows, *boards), all(found) and least and worse == 0 and better >= 0.3 * len(rows) and exact and same and paged > 0)


def subsets(items: Iterable[int]) -> Iterator[tuple[int, ...]]:
    """Every subset, the empty one first."""
    ordered = sorted(items)
    return itertools.chain.from_iterable(itertools.combinations(ordered, r) for r in range(len(ordered) + 1))


def exhaustive(graph: Graph, budget: float) -> float | None:
    """Least cost over all states (stage, in memory, on storage): Dijkstra, every choice of every stage. None where no schedule fits."""
    n, size = len(graph), graph.bytes
    start: frozenset[int] = frozenset()
    heap, best, ticket = [(0.0, 0, 0, start, start)], set(), itertools.count(1)
    while heap:
        spent, _, t, here, stored = heapq.heappop(heap)
        if t == n:
            return spent
        if (t, here, stored) in best:
            continue
        best.add((t, here, stored))
        for more in subsets(range(t)):
            computed = (*more, t)
            if any(u not in here and u not in computed for v in computed for u in graph.deps[v]):
                continue
            for coming in subsets(stored - here):
                held = sum(size[i] for i in here) + sum(size[i] for i in coming)
                if held > budget:
                    continue
                for stays in subsets(here | set(computed) | set(coming)):
                    used = most = held
                    for v in computed:
                        used += size[v]
                        most = max(most, used)
                        used -= sum(size[u] for u in graph.deps[v] if u not in stays and not any(u in graph.deps[w] for w in computed if w > v))
                    if most > budget:
                        continue
                    for going in subsets(here - stored):
                        price = sum(graph.cost[v] for v in computed) + sum(graph.page_in[i] for i in coming) + sum(graph.page_out[i] for i in going)
                        heapq.heappush(heap, (spent + price, next(ticket), t + 1, frozenset(stays), stored | set(going)))
    return None


def drawn(seed: int, n: int) -> Graph:
    """A random graph of n nodes: one or two inputs each, small whole numbers for bytes, costs and pages."""
    from lilliput.memory.planners.poet import Graph

    draw = random.Random(seed)
    deps = tuple(tuple(sorted(draw.sample(range(v), min(v, draw.randint(1, 2))))) for v in range(n))
    numbers = lambda low, high: tuple(float(draw.randint(low, high)) for _ in range(n))
    return Graph(deps, numbers(1, 3), numbers(1, 9), numbers(1, 3), numbers(1, 3))


def _searched(seed: int) -> bool:
    """Whether the program finds what the search finds, or that there is nothing."""
    from lilliput.base.errors import DoesNotFit
    from lilliput.memory.planners.poet import solve

    graph, budget = drawn(seed, 3 + seed % 2), float(random.Random(seed).randint(3, 8))
    expected = exhaustive(graph, budget)
    try:
        found = solve(graph, budget).cost
    except DoesNotFit:
        return expected is None
    return expected is not None and math.isclose(found, expected, rel_tol=1e-5)


def _boards() -> list[dict[str, Any]]:
    """Joules above computing everything once, in percent, by board: the decoder below, in SHARE of what its stages save."""
    from lilliput.memory.boards import BOARDS
    from lilliput.memory.capture import capture
    from lilliput.memory.planners import poet
    from lilliput.memory.planners.chain import chain

    trace, _ = capture(*_decoder(), gradients=True)
    rows = []
    for name, board in BOARDS.items():
        for op in trace.ops:
            op.seconds = board.seconds(max(op.flops, op.traffic / 8))
        stages = chain(trace).merged(8)
        graph = poet.energy(poet.of_chain(stages, board.disk), board.watts, board.disk.watts)
        rows.append({"board": name, **_ways(graph, SHARE * sum(stage.saved for stage in stages.stages), 100 / sum(graph.cost))})
    return rows


def _ways(graph: Graph, budget: float, scale: float = 1.0) -> dict[str, float]:
    """Cost above computing everything once, times `scale`: with both ways, and with either alone."""
    from lilliput.base.errors import DoesNotFit
    from lilliput.memory.planners.poet import solve

    row = {}
    for name, again, paging in (("together", True, True), ("again only", True, False), ("paging only", False, True)):
        try:
            row[name] = round(scale * (solve(graph, budget, again=again, paging=paging).cost - sum(graph.cost)), 3)
        except DoesNotFit:
            row[name] = float("inf")
    return row


def _chain(layers: int, budget: float, dear: int) -> dict[str, int | float]:
    """Cost above computing everything once, for a chain whose every other layer (from `dear` on) costs ten; a page costs two each way."""
    from lilliput.memory.planners.poet import Graph

    deps: list[tuple[int, ...]] = [((i - 1,) if i else ()) for i in range(layers)]
    for i in reversed(range(layers)):
        deps.append(tuple(sorted({i, *([i - 1] if i else []), *([2 * layers - 2 - i] if i < layers - 1 else [])})))
    cost = [10.0 if i % 2 == dear else 1.0 for i in range(layers)]
    n = 2 * layers
    graph = Graph(tuple(deps), (1.0,) * n, (*cost, *reversed(cost)), (2.0,) * n, (2.0,) * n)
    row: dict[str, int | float] = {"layers": layers, "dear first": int(dear == 0), "budget": budget}
    return row | _ways(graph, budget)


def _decoder() -> tuple[Any, Any, list[Any]]:
    """(model, step, its inputs)."""
    import torch

    from lilliput.models.decoder import Decoder
    from lilliput.models.spec import DecoderSpec

    model = Decoder(DecoderSpec("llama", vocab=64, dim=32, layers=4, heads=2, kv_heads=2, head_dim=16, ffn=64, context=256))
    model.init_weights(seed=0)
    return model, lambda model, tokens: model(tokens).square().mean(), [torch.arange(128).reshape(1, 128) % 64]


def _executed() -> tuple[bool, bool, int]:
    """Whether metered bytes are the predicted ones, whether gradients are bitwise the plain run's, and how many stages were paged."""
    import torch

    from lilliput.base.hardware import declared
    from lilliput.memory.capture import capture
    from lilliput.memory.execute import Executor
    from lilliput.memory.lower import lower
    from lilliput.memory.meter import Meter
    from lilliput.memory.planners import poet
    from lilliput.memory.planners.chain import chain
    from lilliput.memory.profile import estimate
    from lilliput.memory.simulate import Link, simulate
    from lilliput.memory.stores import HostStore

    model, step, (tokens_BT,) = _decoder()
    step(model, tokens_BT).backward()
    expected = [p.grad for p in model.parameters()]
    model.zero_grad()
    trace, funcs = capture(model, step, [tokens_BT])
    stages = chain(estimate(trace, declared("laptop"))).merged(8)
    solved = poet.solve(poet.of_chain(stages, Link(1e10, 1e10)), 0.6 * sum(stage.saved for stage in stages.stages))
    schedule = lower(trace, poet.decisions(stages, solved, "host"))
    meter = Meter(known=[*model.parameters(), tokens_BT])
    with meter:
        with Executor(schedule, funcs, {"host": HostStore()}, meter).forward():
            loss = step(model, tokens_BT)
        loss.backward()
    predicted = simulate(schedule).peak
    exact = (predicted["device"], predicted.get("host", 0)) == (meter.peak, meter.tiers.get("host", [0, 0])[1])
    same = all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), expected, strict=True) if p.grad is not None and g is not None)
    return exact, same, len(solved.paged_in)


PAPER = Paper(
    name="poet",
    system="POET",
    title="POET: Training Neural Networks on Tiny Devices with Integrated Rematerialization and Paging",
    authors="Patil et al.",
    year=2022,
    where="ICML 2022, arXiv 2207.07697",
    claim="ResNet-18 and BERT are fine-tuned within the memory of a Cortex-M class device, with less energy than others; the savings are drawn, not printed.",
    measured=(
        "equal to exhaustive search on 40 of 40 graphs; together never worse than either alone in 8 of 8 chains and cheaper in 6, by up to 50%; joules above "
        "computing once, a decoder with 70% of its bytes: mkr1000 +0.4 %, m4f +11.1 %, a72 +6.7 %; executed for a decoder with pages: bytes as predicted, "
        "gradients bitwise equal"
    ),
    switches=("poet.budget=600MB",),
    run=run,
)
