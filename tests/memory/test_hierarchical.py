"""Greedy and hierarchical plans: what a block's program finds against trying everything, what repeats is solved once, prices against the simulator."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from nets import NETS, traced

from lilliput.base.hardware import detect
from lilliput.memory.capture import capture
from lilliput.memory.lower import lower
from lilliput.memory.planners import chain_dp, hierarchical
from lilliput.memory.planners.budget import PLANNERS, frontier
from lilliput.memory.planners.chain import Chain, Stage, chain
from lilliput.memory.planners.greedy import _Pass, greedy
from lilliput.memory.profile import estimate
from lilliput.memory.simulate import simulate
from lilliput.memory.trace import closure
from lilliput.models.decoder import Decoder
from lilliput.models.sizes import PRESETS


def decoder(layers: int, dim: int = 64) -> Chain:
    spec = replace(PRESETS["llama-3m"], layers=layers, dim=dim, head_dim=32, heads=dim // 32, kv_heads=dim // 32, ffn=dim * 5 // 2)
    with torch.device("meta"):
        model = Decoder(spec)
    step = lambda m, x, y: torch.nn.functional.cross_entropy(m(x).flatten(0, 1), y.flatten())
    trace, _ = capture(model, step, [torch.zeros(2, 64, dtype=torch.int64, device="meta") for _ in range(2)], gradients=True)
    return chain(estimate(trace, detect()))


def again(found: Chain, stage: Stage, kept: set[int], before: set[int]) -> list[int]:
    """Operations that run again when a stage keeps these and what was made before it is there."""
    return closure(found.trace, set(stage.members) - kept, lambda s: s in kept or s in before, strict=False)[0]


def test_a_blocks_program_equals_trying_everything() -> None:
    """Seconds of what runs again, by the trace's own closure, for every subset that holds what crosses."""
    found = decoder(3)
    tried = 0
    for stage, following in list(zip(found.stages, found.stages[1:], strict=False))[3:6]:
        crossing = set(following.boundary) & set(stage.members)
        bytes_of = lambda kept: sum(found.trace.storages[s].bytes for s in kept)
        free = [s for s in stage.members if s not in crossing]
        before = {s for earlier in found.stages[: found.stages.index(stage)] for s in earlier.members} | {*stage.boundary}
        subsets = (set(chosen) | crossing for r in range(len(free) + 1) for chosen in itertools.combinations(free, r))
        priced = [(bytes_of(kept), sum(found.trace.ops[op].seconds for op in again(found, stage, kept, before))) for kept in subsets]
        for part, (kept, count, seconds) in enumerate(hierarchical.parts(found)[found.stages.index(stage)]):
            least = min(s for b, s in priced if b <= count)
            assert crossing <= kept and seconds == pytest.approx(least, rel=1e-4), (part, count)
            tried += 1
    assert tried > 6


def test_blocks_that_are_alike_are_solved_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls, solve = [], hierarchical._solve
    monkeypatch.setattr(hierarchical, "_solve", lambda *given: calls.append(given) or solve(*given))
    counts = []
    for layers in (4, 8):
        calls.clear()
        hierarchical.parts(decoder(layers))
        counts.append(len(calls))
    assert 0 < counts[0] == counts[1], counts


def test_what_the_chains_program_promises_is_what_is_simulated() -> None:
    """Seconds and bytes are the simulator's within 2 and 5 percent, at every budget, and better than without parts."""
    found = decoder(6)
    plain = simulate(lower(found.trace, {}))
    parts, better = hierarchical.parts(found), 0
    for share in (0.35, 0.5, 0.65, 0.8):
        budget = round(plain.peak["device"] * share)
        without, solved = (chain_dp.solve(costs, budget) for costs in (chain_dp.costs(found), hierarchical.costs(found, parts)))
        simulated = simulate(lower(found.trace, hierarchical.decisions(found, parts, solved[1])))
        assert simulated.seconds <= solved[0] * 1.02 and simulated.peak["device"] <= budget * 1.05
        assert without is None or solved[0] <= without[0]
        better += without is None or solved[0] < 0.995 * without[0]
    assert better >= 3


@pytest.mark.parametrize("name", NETS)
def test_greedys_prices_are_the_simulators(name: str) -> None:
    """Where no boundary is dropped: what greedy says runs again is what does, to the operation; and its first choice is the best of all."""
    torch.manual_seed(0)
    trace, _ = traced(NETS[name]())
    found = chain(estimate(trace, detect()))
    state = _Pass(found)
    boundaries = {s for stage in found.stages for s in stage.boundary}
    state.open -= boundaries
    rates = {s: trace.storages[s].bytes / max(price, 1e-12) for s in state.open if (price := state.price(s)) is not None}
    first = max(sorted(rates), key=rates.__getitem__)
    alone = lambda s: simulate(lower(trace, _dropped(found, [s]))).again
    assert rates[first] == pytest.approx(max(trace.storages[s].bytes / max(alone(s), 1e-12) for s in rates), rel=1e-6)
    for s in sorted(rates, key=rates.__getitem__, reverse=True)[:12]:
        state.drop(s)
    simulated = simulate(lower(trace, state.decisions()))
    assert simulated.again == pytest.approx(sum(trace.ops[op].seconds for ops in state.again for op in ops), rel=1e-6)


def _dropped(found: Chain, storages: list[int]) -> dict:
    state = _Pass(found)
    for s in storages:
        state.drop(s)
    return state.decisions()


def test_greedy_frees_more_and_more() -> None:
    found = decoder(4)
    freed, peaks = zip(*((count, simulate(lower(found.trace, d)).peak["device"]) for count, d in greedy(found, 8)), strict=True)
    assert list(freed) == sorted(freed) and len(freed) > 5
    assert min(peaks) < 0.5 * simulate(lower(found.trace, {})).peak["device"]


@pytest.mark.parametrize("planner", PLANNERS)
def test_a_planner_alone(planner: str) -> None:
    found = decoder(2)
    options = frontier(found.trace, tiers=("host",), planner=planner).options
    assert len(options) > 1 and options[-1].name == "keep everything"
    assert options[0].peak < options[-1].peak
