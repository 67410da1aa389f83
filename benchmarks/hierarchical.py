"""Hierarchical plans of a 12-layer GPT beside the exact program of POET over 24 stages (48 nodes), at the same bytes; and the chunked loss beside the plain.

    python benchmarks/hierarchical.py plans [--limit SECONDS]     seconds of planning, the program's gap, simulated seconds of both at its peak
    python benchmarks/hierarchical.py loss [--tokens N]           head and loss of SmolLM2-135M forward and backward, chunk by chunk, interleaved

One thread. Nothing is trained: plans are simulated with the machine's peak rates, which is what both planners minimise.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time

import torch
import torch.nn.functional as F

from lilliput.base.hardware import detect
from lilliput.base.show import Show, size
from lilliput.memory.capture import capture
from lilliput.memory.lower import lower
from lilliput.memory.planners import chain_dp, hierarchical, poet
from lilliput.memory.planners.budget import frontier
from lilliput.memory.planners.chain import chain
from lilliput.memory.profile import estimate
from lilliput.memory.simulate import Link, simulate
from lilliput.models.decoder import Decoder
from lilliput.models.spec import DecoderSpec
from lilliput.ops.chunked import linear_cross_entropy

GPT = DecoderSpec("gpt2", vocab=1024, dim=256, layers=12, heads=4, kv_heads=4, head_dim=64, ffn=1024, context=512, norm="layer", activation="gelu",
                  positions="learned", tied=True, qkv_bias=True, o_bias=True, mlp_bias=True)  # fmt: skip


def plans(show: Show, limit: float) -> None:
    """One row a share of what the chain saves."""
    with torch.device("meta"):
        model = Decoder(GPT)
    step = lambda m, x, y: F.cross_entropy(m(x).flatten(0, 1), y.flatten())
    trace, _ = capture(model, step, [torch.zeros(2, 256, dtype=torch.int64, device="meta") for _ in range(2)], gradients=True)
    found = chain(estimate(trace, detect()))
    begin = time.perf_counter()
    parts = hierarchical.parts(found)
    levels = [simulate(lower(trace, {})).peak["device"] * i // 24 for i in range(2, 24)]
    made = [hierarchical.decisions(found, parts, s[1]) for b in levels if (s := chain_dp.solve(hierarchical.costs(found, parts), b)) is not None]
    ours = [simulate(lower(trace, decisions)) for decisions in made]
    spent = time.perf_counter() - begin
    begin = time.perf_counter()
    every = frontier(trace)
    everything = time.perf_counter() - begin
    short = found.merged(24)
    graph, whole, plain = poet.of_chain(short, Link()), sum(stage.saved for stage in short.stages), simulate(lower(trace, {}))
    rows = []
    for share in (0.35, 0.5, 0.7):
        begin = time.perf_counter()
        solved = poet.solve(graph, share * whole, paging=False, limit=limit)
        exact = simulate(lower(trace, poet.decisions(short, solved, "host")))
        best = min((one.seconds for one in ours if one.peak["device"] <= exact.peak["device"]), default=float("inf"))
        all_ = min((o.simulation.seconds for o in every.options if o.peak <= exact.peak["device"]), default=float("inf"))
        rows.append({
            "of saved": share, "solved in s": round(time.perf_counter() - begin, 1), "gap %": round(100 * solved.gap, 2), "peak": size(exact.peak["device"]),
            "again, POET %": round(100 * (exact.seconds / plain.seconds - 1), 2), "hierarchical %": round(100 * (best / plain.seconds - 1), 2),
            "step / POET's": round(best / exact.seconds, 4), "all planners / POET's": round(all_ / exact.seconds, 4),
        })  # fmt: skip
    told = f"{len(found)} stages, {len(made)} hierarchical plans in {spent:.1f} s, frontier of all in {everything:.1f} s, load {os.getloadavg()[0]:.1f}"
    show.table(rows, tuple(rows[0]), told)


def loss(show: Show, tokens: int, rounds: int) -> None:
    """Head and cross-entropy with both gradients, by tokens of a chunk; 0 = the plain loss."""
    width, vocab = 576, 49152
    h, weight = torch.randn(tokens, width, requires_grad=True), (torch.randn(vocab, width) * 0.05).requires_grad_()
    targets = torch.randint(0, vocab, (tokens,))

    def step(chunk: int) -> float:
        h.grad = weight.grad = None
        begin = time.perf_counter()
        plain = lambda: F.cross_entropy(F.linear(h, weight), targets, reduction="sum")
        ((linear_cross_entropy(h, weight, targets, chunk) if chunk else plain()) / tokens).backward()
        return time.perf_counter() - begin

    chunks = (0, 32, 64, 128, 256)
    times: dict[int, list[float]] = {chunk: [] for chunk in chunks}
    for _ in range(rounds + 1):
        for chunk in chunks:
            times[chunk].append(step(chunk))
    median = {chunk: statistics.median(found[1:]) for chunk, found in times.items()}
    ratios = {chunk: statistics.median(a / b for a, b in zip(times[chunk][1:], times[0][1:], strict=True)) for chunk in chunks}
    rows = [{"chunk": chunk or "plain", "s": round(median[chunk], 3), "of the plain loss": round(ratios[chunk], 3),
             "logits": size((2 * chunk or 3 * tokens) * vocab * 4)} for chunk in chunks]  # fmt: skip
    show.table(rows, tuple(rows[0]), f"{tokens} tokens, {width} -> {vocab}, {rounds} rounds, load {os.getloadavg()[0]:.1f}")


def main() -> None:
    """See the module's text."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("what", choices=("plans", "loss"))
    options.add_argument("--limit", type=float, default=120.0)
    options.add_argument("--tokens", type=int, default=512)
    options.add_argument("--rounds", type=int, default=5)
    args = options.parse_args()
    torch.set_num_threads(1)
    if args.what == "plans":
        plans(Show(), args.limit)
    else:
        loss(Show(), args.tokens, args.rounds)


if __name__ == "__main__":
    main()
