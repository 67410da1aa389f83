"""POET: one mixed-integer program decides for every activation at every step whether it is kept, recomputed or paged to flash,
for the least energy under a memory budget and a deadline, with time and energy of every operation profiled on the device.

The run solves chains whose layers cost one or ten, with recomputation and paging together and each alone, and executes the solution
for a decoder: metered bytes against predicted ones, gradients against the plain run.

Patil et al. 2022, ICML 2022, arXiv 2207.07697.
"""

from __future__ import annotations

from lilliput.papers.paper import Finding, Paper

CHAINS = ((6, 5), (7, 5), (8, 5), (8, 6))  # (layers, budget in activations)


def run() -> Finding:
    """Overheads of the three ways, and one solution executed; about 15 s on one core."""
    rows = [_chain(layers, budget, dear) for layers, budget in CHAINS for dear in (0, 1)]
    better = sum(row["together"] < min(row["again only"], row["paging only"]) for row in rows)
    worse = sum(row["together"] > min(row["again only"], row["paging only"]) for row in rows)
    saved = max(1 - row["together"] / min(row["again only"], row["paging only"]) for row in rows)
    exact, same, paged = _executed()
    summary = (
        f"together never worse than either alone in {len(rows) - worse} of {len(rows)} chains and cheaper in {better}, by up to {saved:.0%}; "
        f"executed for a decoder {'with' if paged else 'WITHOUT'} pages: bytes {'as predicted' if exact else 'NOT as predicted'}, "
        f"gradients {'bitwise equal' if same else 'NOT equal'}"
    )
    return Finding(summary, tuple(rows), worse == 0 and better >= 0.3 * len(rows) and exact and same and paged > 0)


def _chain(layers: int, budget: float, dear: int) -> dict[str, int | float]:
    """Cost above computing everything once, for a chain whose every other layer (from `dear` on) costs ten; a page costs two each way."""
    from lilliput.base.errors import DoesNotFit
    from lilliput.memory.planners.poet import Graph, solve

    deps: list[tuple[int, ...]] = [((i - 1,) if i else ()) for i in range(layers)]
    for i in reversed(range(layers)):
        deps.append(tuple(sorted({i, *([i - 1] if i else []), *([2 * layers - 2 - i] if i < layers - 1 else [])})))
    cost = [10.0 if i % 2 == dear else 1.0 for i in range(layers)]
    n = 2 * layers
    graph = Graph(tuple(deps), (1.0,) * n, (*cost, *reversed(cost)), (2.0,) * n, (2.0,) * n)
    row: dict[str, int | float] = {"layers": layers, "dear first": int(dear == 0), "budget": budget}
    for name, again, paging in (("together", True, True), ("again only", True, False), ("paging only", False, True)):
        try:
            row[name] = round(solve(graph, budget, again=again, paging=paging).cost - sum(graph.cost), 3)
        except DoesNotFit:
            row[name] = float("inf")
    return row


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
    from lilliput.models.decoder import Decoder
    from lilliput.models.spec import DecoderSpec

    model = Decoder(DecoderSpec("llama", vocab=64, dim=32, layers=4, heads=2, kv_heads=2, head_dim=16, ffn=64, context=256))
    model.init_weights(seed=0)
    tokens_BT = torch.arange(128).reshape(1, 128) % 64
    step = lambda model, tokens: model(tokens).square().mean()
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
        "together never worse than either alone in 8 of 8 chains and cheaper in 6, by up to 50%; executed for a decoder with pages: bytes as predicted, "
        "gradients bitwise equal"
    ),
    switches=("poet.budget=600MB",),
    run=run,
)
