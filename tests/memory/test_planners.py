"""Planners against brute force and against the published shape: square root, logarithm, one forward pass more."""

from __future__ import annotations

import heapq
import itertools
import math
import random

import pytest
import torch
from nets import NETS, lstm, metered, run, same, traced
from torch import nn

from lilliput.base.errors import DoesNotFit
from lilliput.base.hardware import detect
from lilliput.memory.capture import capture
from lilliput.memory.lower import lower
from lilliput.memory.planners import chain_dp, chen, hierarchical
from lilliput.memory.planners.budget import frontier
from lilliput.memory.planners.chain import Chain, chain
from lilliput.memory.planners.chain_dp import Costs, Node, solve
from lilliput.memory.planners.greedy import greedy
from lilliput.memory.planners.recursive import recursive
from lilliput.memory.planners.selective import selective
from lilliput.memory.planners.sqrt import every, segments, sqrt
from lilliput.memory.profile import estimate, links
from lilliput.memory.simulate import Simulation, simulate
from lilliput.memory.stores import HostStore

DEPTHS = (16, 36, 64, 100, 144, 196)
UNIT = 256 * 16 * 4  # bytes of one activation of the chains below


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.tanh(self.linear(x))


def layers(n: int) -> Chain:
    model = nn.Sequential(*(Layer() for _ in range(n)))
    trace, _ = capture(model, lambda m, x: m(x).square().mean(), [torch.randn(256, 16)], gradients=True)  # gradients are no activations
    found = chain(trace)
    assert len(found) == n, "each layer is a stage, though nobody said where it ends"
    return found


def judged(found: Chain, decisions: dict) -> Simulation:
    return simulate(lower(found.trace, decisions))


def forwards(found: Chain, simulation: Simulation) -> int:
    """Linear products that ran again."""
    return sum(count for op, count in simulation.replayed.items() if found.trace.ops[op].name == "addmm")


def test_sqrt_and_recursion_have_the_published_shape() -> None:
    flat, logs = [], {}
    for n in DEPTHS:
        found = layers(n)
        plain, root, each, half = (judged(found, d) for d in ({}, sqrt(found), every(found, 1), recursive(found)))
        flat.append(root.peak["device"] / UNIT / math.sqrt(n))
        logs[n] = half.peak["device"] / UNIT
        k = round(math.sqrt(n))
        assert plain.peak["device"] > 2 * n * UNIT and each.peak["device"] > n * UNIT, "keeping every boundary is linear too"
        assert n - 2 * k - 1 <= forwards(found, root) <= n - n // k, "one more forward pass, of all segments but the last"
        assert forwards(found, half) <= n * math.ceil(math.log2(n)) + n
        assert max(half.replayed.values()) <= math.ceil(math.log2(n)) + 1
    middle = (max(flat) + min(flat)) / 2
    assert max(flat) / middle - 1 <= 0.08, f"peak / sqrt(n): {flat}"
    assert logs[196] - logs[16] <= math.log2(196 / 16) + 2, f"a doubling costs one boundary more: {logs}"


@pytest.mark.parametrize("n", DEPTHS[1:])
def test_one_forward_more_in_flops(n: int) -> None:
    """No forward operation runs more than twice, and k segments cost (1 - 1/k) / 3 of a step: forward to backward as one to two."""
    found = layers(n)
    simulation = judged(found, sqrt(found))
    assert set(simulation.replayed.values()) == {1}
    flops = [op.flops for op in found.trace.ops]
    again = sum(flops[op] * times for op, times in simulation.replayed.items()) / sum(flops)
    assert again == pytest.approx((1 - 1 / round(math.sqrt(n))) / 3, abs=0.01)


@pytest.mark.parametrize("name", NETS)
def test_every_planner_is_executed_to_the_byte_and_to_the_bit(name: str) -> None:
    torch.manual_seed(0)
    net = NETS[name]()
    trace, funcs = traced(net)
    estimate(trace, detect())
    found = chain(trace)
    between = {s for stage in found.stages for s in stage.boundary}
    plain = run(net)
    dropped = [decisions for _, decisions in greedy(found, 3)]
    for decisions in (sqrt(found), every(found, 1), recursive(found), selective(trace, but=between), segments(found, [0, 2, 3], until=3), *dropped):
        simulated, meter, outcome = metered(net, lower(trace, decisions), funcs)
        assert simulated.peak["device"] == meter.peak and same(outcome, plain)
    plain_peak, parts = simulate(lower(trace, {})).peak["device"], hierarchical.parts(found)
    levels = [(costs, round(plain_peak * share)) for costs in (chain_dp.costs(found, 1e-9), hierarchical.costs(found, parts, 1e-9)) for share in (0.6, 0.8)]
    for costs, budget in levels:
        solved = solve(costs, budget)
        decisions = hierarchical.decisions(found, parts, solved[1]) if solved else {}
        simulated, meter, outcome = metered(net, lower(trace, decisions), funcs, {"host": HostStore()})
        assert simulated.peak["device"] == meter.peak and same(outcome, plain)


@pytest.mark.parametrize("name", NETS)
def test_ten_budgets_are_never_exceeded_and_never_slower_when_larger(name: str) -> None:
    torch.manual_seed(0)
    net = NETS[name]()
    trace, funcs = traced(net)
    estimate(trace, detect())
    options = frontier(trace, links(detect()), ("host",))
    plain, large = run(net), simulate(lower(trace, {})).peak["device"]
    small = options.options[0].peak
    before = math.inf
    for i in range(10):
        budget = small + (large - small) * i // 9
        option = options.pick({"device": budget})
        assert option.simulation.seconds <= before
        before = option.simulation.seconds
        _, meter, outcome = metered(net, lower(trace, option.decisions), funcs, {"host": HostStore()}, {"device": budget})
        assert meter.peak == option.peak <= budget and same(outcome, plain)
    with pytest.raises(DoesNotFit, match="no plan fits") as refused:
        options.pick({"device": small - 1})
    assert f"{small:,} bytes" in refused.value.why and f"{small}B" in refused.value.fix
    assert all("host" not in options.pick({"device": b, "host": 0}).simulation.moved for b in (large,))


def search(costs: Costs, budget: int) -> float | None:
    """Least seconds over all states of a chain: what is in hand, saved, kept, paged, and how far the backward pass is."""
    n = len(costs.saved)  # saved: (stage, part of it that is kept)
    heap, best, ticket = [(0.0, 0, (n, 0, frozenset(), frozenset(), frozenset()))], {}, itertools.count(1)
    held = lambda saved, kept: sum(costs.ways(i)[p][0] for i, p in saved) + sum(costs.enters[k] for k in kept)
    while heap:
        spent, _, state = heapq.heappop(heap)
        if state in best:
            continue
        best[state] = spent
        left, hand, saved, kept, paged = state
        part = dict(saved)
        if left == 0:
            return spent
        steps = []
        i = left - 1
        has_input = lambda i: i == 0 or i in kept or i in paged or i - 1 in part  # noqa: B023
        if i in part and has_input(i):
            count, again = costs.ways(i)[part[i]]
            if held(saved, kept) - count + costs.saved[i] + costs.beside[i] <= budget:
                fewer = [frozenset(k for k in group if k < i) for group in (kept, paged)]
                steps.append((costs.backward[i] + again, (i, None, saved - {(i, part[i])}, *fewer)))
        if hand is None:
            steps += [(0.0, (left, k, saved, kept, paged)) for k in {0, *kept, *paged, *(j + 1 for j in part)} if k < left]
        elif hand < left:
            after = hand + 1
            for save, place in itertools.product((None, *range(len(costs.ways(hand)))), ("drop", "keep", "page")):
                if (save is not None and (hand in part or not has_input(hand))) or (after == left and place != "drop"):
                    continue
                if (place == "keep" and after in kept) or (place == "page" and (costs.page[after] is None or after in paged)):
                    continue
                more = saved if save is None else saved | {(hand, save)}
                now = more, kept | {after} if place == "keep" else kept, paged | {after} if place == "page" else paged
                if held(now[0], now[1]) <= budget:
                    price = costs.forward[hand] + (costs.page[after] or 0 if place == "page" else 0)
                    steps.append((price, (left, after if after < left else None, *now)))
        for price, following in steps:
            heapq.heappush(heap, (spent + price, next(ticket), following))
    return None


def spent(costs: Costs, node: Node | None, left: int) -> float:
    """Seconds of a built schedule; AssertionError where it needs more than the `left` bytes."""
    if node is None:
        return 0.0
    if node.kind == "save":
        i = node.first
        assert costs.saved[i] + costs.beside[i] <= left
        count, again = costs.ways(i)[node.part]
        return costs.forward[i] + costs.backward[i] + again + spent(costs, node.right, left - count)
    sweep = sum(costs.forward[node.first : node.at]) + (costs.page[node.at] if node.paged else 0.0)
    return sweep + spent(costs, node.right, left - (0 if node.paged else costs.enters[node.at])) + spent(costs, node.left, left)


def test_the_dynamic_program_equals_a_search_over_all_states(monkeypatch: pytest.MonkeyPatch) -> None:
    feasible = partly = 0
    for seed in range(120):
        draw = random.Random(seed)
        n = draw.randint(2, 3 if seed % 3 else 5)
        saved = [draw.randint(2, 8) for _ in range(n)]
        beside = [draw.randint(0, 4) for _ in range(n)]
        forward = [float(draw.randint(1, 5)) for _ in range(n)]
        enters = [draw.randint(1, min(3, saved[max(0, k - 1)])) for k in range(n)]
        pages = tuple(draw.choice([None, draw.randint(1, 6)]) for _ in range(n))
        least = [*enters[1:], 0]  # what enters the next stage stays in every part
        parts = tuple(tuple((draw.randint(low, most), float(draw.randint(0, 3))) for _ in range(seed % 3)) for low, most in zip(least, saved, strict=True))
        costs = Costs(tuple(saved), tuple(enters), tuple(beside), tuple(forward), tuple(2 * f for f in forward), pages, parts)
        budget = draw.randint(max(map(sum, zip(saved, beside, strict=True))), sum(saved) + max(beside))
        monkeypatch.setattr(chain_dp, "SLOTS", budget)  # one slot a byte: nothing is rounded
        solved, expected = solve(costs, budget), search(costs, budget)
        assert (solved[0] if solved else None) == expected, f"seed {seed}"
        if solved is not None:
            assert spent(costs, solved[1], budget) == solved[0], "what was built is what was priced, and fits at every step"
            partly += "part=1" in str(solved[1]) or "part=2" in str(solved[1])
        feasible += expected is not None
    assert feasible > 60 and partly > 8


def test_chens_planner_against_brute_force() -> None:
    """Its own estimate (what crosses + the largest segment): at most 1.25 times the best split, better than equal segments."""
    wins, worst = 0, 0.0
    for seed in range(200):
        draw = random.Random(seed)
        n = draw.randint(4, 12)
        saved, crossing = [draw.randint(1, 40) for _ in range(n)], [draw.randint(1, 6) for _ in range(n)]

        def cost(starts: tuple[int, ...]) -> int:
            ends = [*starts[1:], n]  # noqa: B023
            return sum(crossing[s] for s in starts[1:]) + max(sum(saved[a:b]) for a, b in zip(starts, ends, strict=True))  # noqa: B023

        found = chen.best(saved, crossing)
        assert cost(found.starts) == found.crossing + found.segment
        best = min(cost((0, *cuts)) for r in range(n) for cuts in itertools.combinations(range(1, n), r))
        worst = max(worst, cost(found.starts) / best)
        k = max(1, round(math.sqrt(n)))
        wins += cost(found.starts) <= cost(tuple(round(i * n / k) for i in range(k)))
    assert worst <= 1.25 and wins >= 190, (worst, wins)


@pytest.mark.parametrize("steps", [64, *(pytest.param(steps, marks=pytest.mark.slow) for steps in (128, 256, 512, 1024))])
def test_an_unrolled_lstm_keeps_four_times_less(steps: int) -> None:
    """The paper's: 4 layers of 256; a batch whose activations are more than the weights."""
    net = lstm(layers=4, dim=256, steps=steps, batch=32)
    trace, _ = traced(net)
    found = chain(trace)
    weights = sum(p.nbytes for p in net[0].parameters())
    plain, root = (simulate(lower(trace, d)).peak["device"] - weights for d in ({}, sqrt(found)))
    assert plain > 4 * root, plain / root
