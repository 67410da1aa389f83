"""POET's program against exhaustive search, against either half of it, and as an executed plan."""

from __future__ import annotations

import itertools
import random
import time
from pathlib import Path

import pytest
import torch
from nets import bert, conv, metered, run, same, traced

from lilliput.base.errors import DoesNotFit
from lilliput.base.hardware import detect
from lilliput.memory.boards import BOARDS
from lilliput.memory.lower import lower
from lilliput.memory.planners.chain import chain
from lilliput.memory.planners.poet import Graph, decisions, energy, of_chain, peak, solve
from lilliput.memory.profile import estimate
from lilliput.memory.simulate import Link, simulate
from lilliput.memory.stores import FileStore, HostStore
from lilliput.papers.poet import drawn, exhaustive


@pytest.mark.parametrize("seeds", [range(0, 50), range(50, 100)], ids=str)
def test_equals_exhaustive_search(seeds: range) -> None:
    feasible = 0
    for seed in seeds:
        graph = drawn(seed, 3 + seed % 3)
        budget = float(random.Random(seed).randint(3, 8))
        expected = exhaustive(graph, budget)
        if expected is None:
            with pytest.raises(DoesNotFit):
                solve(graph, budget)
            continue
        feasible += 1
        found = solve(graph, budget)
        assert found.cost == pytest.approx(expected), f"seed {seed}"
        assert peak(graph, found) <= budget
    assert feasible >= 20


def training(layers: int, dear: int = 0) -> Graph:
    """A chain forward and backward, every other layer ten times as dear: there paging pays, between them running again."""
    deps: list[tuple[int, ...]] = [((i - 1,) if i else ()) for i in range(layers)]
    for k in range(layers):
        i = layers - 1 - k
        deps.append(tuple(sorted({i, *([i - 1] if i else []), *([layers + k - 1] if k else [])})))
    cost = [10.0 if i % 2 == dear else 1.0 for i in range(layers)]
    n = 2 * layers
    return Graph(tuple(deps), (1.0,) * n, (*cost, *reversed(cost)), (2.0,) * n, (2.0,) * n)


def test_together_never_worse_and_often_better() -> None:
    better = total = 0
    for layers, dear in itertools.product((6, 7, 8), (0, 1)):
        for budget in range(4, layers // 2 + 3):
            graph, costs = training(layers, dear), []
            for again, paging in ((True, True), (True, False), (False, True)):
                try:
                    found = solve(graph, budget, again=again, paging=paging)
                    costs.append(found.cost)
                    assert peak(graph, found) <= budget
                except DoesNotFit:
                    costs.append(float("inf"))
            assert costs[0] <= min(costs[1:]) + 1e-6
            better += costs[0] < min(costs[1:]) - 1e-6
            total += 1
    assert better >= 0.3 * total, f"strictly better in {better} of {total}"


@pytest.mark.slow
def test_together_on_fifty_random_chains() -> None:
    """Dear layers, their price, pages and tight budgets (half of the activations and two at most) drawn: never worse than either way alone, strictly
    better on three of ten at least."""
    better = feasible = 0
    for seed in range(50):
        draw = random.Random(seed)
        layers, page = draw.randint(6, 8), float(draw.randint(1, 3))
        chain_of = training(layers, draw.randint(0, 1))
        price = {1.0: 1.0, 10.0: float(draw.randint(6, 14))}
        graph = Graph(chain_of.deps, chain_of.bytes, tuple(price[c] for c in chain_of.cost), (page,) * len(chain_of), (page,) * len(chain_of))
        budget, costs = float(draw.randint(4, layers // 2 + 2)), []
        for again, paging in ((True, True), (True, False), (False, True)):
            try:
                costs.append(solve(graph, budget, again=again, paging=paging).cost)
            except DoesNotFit:
                costs.append(float("inf"))
        assert costs[0] <= min(costs[1:]) + 1e-6, f"seed {seed}"
        feasible += costs[0] < float("inf")
        better += costs[0] < min(costs[1:]) - 1e-6
    assert feasible == 50 and better >= 15, f"strictly better in {better} of {feasible}"


@pytest.mark.parametrize("name", ["resnet18", "bert"])
@pytest.mark.parametrize("tier", ["host", "disk"])
def test_executed_within_half_of_the_activations(name: str, tier: str, tmp_path: Path) -> None:
    """The program gets half of what autograd keeps; executed: gradients and loss to the bit, bytes of both tiers to the byte."""
    torch.manual_seed(0)
    net = conv(width=8, batch=8) if name == "resnet18" else bert(tokens=64)
    trace, funcs = traced(net)
    estimate(trace, detect())
    short = chain(trace).merged(12)
    graph, half = of_chain(short, Link(1e11, 1e11)), sum(stage.saved for stage in short.stages) / 2
    found = solve(graph, half)
    assert peak(graph, found) <= half and len(found.computed) > len(graph)
    schedule, plain = lower(trace, decisions(short, found, tier)), simulate(lower(trace, {})).peak["device"]
    store = HostStore() if tier == "host" else FileStore(tmp_path / "pages", {s.index: s.bytes for s in trace.saved()})
    simulated, meter, outcome = metered(net, schedule, funcs, {tier: store}, {"device": simulate(schedule).peak["device"]})
    assert meter.peak == simulated.peak["device"] < 0.7 * plain, "gradients and what operations pass on are in the peak too"
    assert same(outcome, run(net))
    assert store.written == simulated.moved.get(tier, 0) <= store.read_back, "a page may come back twice"
    assert store.written > 0 or name == "bert"


@pytest.mark.slow
def test_thirty_two_nodes_in_thirty_seconds() -> None:
    for layers in (12, 16):
        begin = time.process_time()
        found = solve(training(layers), layers / 2 + 2, limit=30.0)
        assert found.gap <= 0.01 and peak(training(layers), found) <= layers / 2 + 2
        assert time.process_time() - begin < 60, "two threads at most"


def test_what_cannot_be_names_bytes_or_the_deadline() -> None:
    graph = training(4)
    with pytest.raises(DoesNotFit, match="no schedule fits"):
        solve(graph, 1.0)
    free = solve(graph, 100.0).cost
    with pytest.raises(DoesNotFit, match="deadline"):
        solve(graph, 4.0, deadline=free * 0.99)
    assert solve(graph, 4.0, deadline=free * 9).cost >= free


def test_what_pays_follows_from_a_boards_joules() -> None:
    """4 KiB and 20,000 flops a node: software floats (M0+) cost 7.9 mJ and a page 0.66 mJ both ways, so it pages; an M4F computes for 0.03 mJ."""
    flops, size, layers = 2e4, 4096.0, 8
    used = {}
    for name in ("mkr1000", "m4f", "a72"):
        board, n = BOARDS[name], 2 * layers
        page = [(board.disk.latency + size / rate,) * n for rate in (board.disk.read, board.disk.write)]
        times = Graph(training(layers).deps, (size,) * n, (board.seconds(flops),) * n, *page)
        joules = energy(times, board.watts, board.disk.watts)
        found = solve(joules, 5 * size)
        assert found.cost <= min(solve(joules, 5 * size, paging=False).cost, solve(joules, 7 * size, again=False).cost) or found.paged_in
        used[name] = len(found.paged_in), len(found.computed) - n
    assert used["mkr1000"][0] > 0 and used["mkr1000"][1] == 0, used
    assert used["m4f"][0] == 0 and used["m4f"][1] > 0 and used["a72"][1] > 0, used
