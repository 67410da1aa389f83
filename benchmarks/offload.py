"""AdamW on the host against torch's three and DeepSpeedCPUAdam, and what a delayed update hides behind a throttled link.

    python benchmarks/offload.py [--millions 10 50] [--threads 1] [--deepspeed PYTHON] [--model smollm2-135m --tokens 16 --link 4GB]

Every round runs each contender once, in turn; medians and the load are printed. `--deepspeed`: the Python of an environment with
torch and deepspeed; it is asked for one step at a time, so both sides see the same load. Weights of the model are random.
The delayed update computes on one core and updates on another: both runs have one thread for each.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

ROUNDS, ROW = 7, 1024  # a matrix has ROW x ROW numbers
KNOBS = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


def matrices(millions: int, dtype: Any = None) -> list[Any]:
    """Weights of so many million numbers with gradients, in matrices."""
    import torch

    generator = torch.Generator().manual_seed(0)
    made = []
    for _ in range(millions * 10**6 // ROW**2):
        weight = torch.nn.Parameter(torch.randn(ROW, ROW, generator=generator).to(dtype or torch.float32))
        weight.grad = torch.randn(ROW, ROW, generator=generator).to(weight.dtype)
        made.append(weight)
    return made


def worker(kind: str, millions: int, threads: int) -> None:
    """DeepSpeed's side: a step for every line on stdin, its seconds on stdout."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever deepspeed says is talk
    import torch
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    torch.set_num_threads(threads)
    weights = matrices(millions, torch.bfloat16 if kind == "bf16" else torch.float32)
    optimizer = DeepSpeedCPUAdam(weights, adamw_mode=True, **KNOBS)
    for _ in sys.stdin:
        begin = time.perf_counter()
        optimizer.step()
        out.write(f"{time.perf_counter() - begin}\n")
        out.flush()


def asked(python: str, kind: str, millions: int, threads: int) -> Callable[[], float]:
    """A contender in another Python: seconds of one step."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    environment.pop("PYTHONPATH", None)
    process = subprocess.Popen([python, __file__, "--worker", kind, str(millions), str(threads)], env=environment,
                               stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)  # fmt: skip
    assert process.stdin is not None and process.stdout is not None, "both ends are pipes"

    def step() -> float:
        process.stdin.write("step\n")
        process.stdin.flush()
        line = process.stdout.readline()
        if not line:
            raise SystemExit(f"{python} ended: is deepspeed installed there?")
        return float(line)

    return step


def timed(work: Callable[[], object]) -> Callable[[], float]:
    """Seconds of one call."""

    def step() -> float:
        begin = time.perf_counter()
        work()
        return time.perf_counter() - begin

    return step


def interleaved(contenders: dict[str, Callable[[], float]], rounds: int = ROUNDS) -> dict[str, float]:
    """Median seconds of each, after one round that does not count."""
    found: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(rounds + 1):
        for name, step in contenders.items():
            seconds = step()
            if number:
                found[name].append(seconds)
    return {name: statistics.median(times) for name, times in found.items()}


def adam(show: Any, millions: int, threads: int, deepspeed: str) -> None:
    """One AdamW step over so many million numbers."""
    import torch

    from lilliput.dist.link import lasting
    from lilliput.ops import native
    from lilliput.ops.adamw import Rule, update, update_master

    torch.set_num_threads(threads)
    native.threads(threads)
    contenders: dict[str, Callable[[], float]] = {}
    for name, form in (("torch, loop", {"foreach": False, "fused": False}), ("torch, foreach", {"foreach": True}), ("torch, fused", {"fused": True})):
        contenders[name] = timed(torch.optim.AdamW(matrices(millions), **KNOBS, **form).step)
    state = [(w.detach(), w.grad, torch.zeros_like(w), torch.zeros_like(w)) for w in matrices(millions)]
    narrow = [(w, g.bfloat16(), m, v, w.bfloat16()) for w, g, m, v in state]
    rule = Rule(KNOBS["lr"], KNOBS["betas"], KNOBS["eps"], KNOBS["weight_decay"], 3)
    huge = [tuple(lasting(t.shape, t.dtype).copy_(t) for t in (*each, narrow[k][1], narrow[k][4])) for k, each in enumerate(state)]
    contenders["ours, fp32"] = timed(lambda: [update(w, g, m, v, rule, 0) for w, g, m, v in state])
    contenders["ours, fp32 masters, bf16 gradients in and weights out"] = timed(lambda: [update_master(*tensors, rule, 0.5) for tensors in narrow])
    contenders["ours, fp32, where offload keeps it"] = timed(lambda: [update(w, g, m, v, rule, 0) for w, g, m, v, *_ in huge])
    contenders["ours, masters, where offload keeps them"] = timed(lambda: [update_master(w, g16, m, v, w16, rule, 0.5) for w, _, m, v, g16, w16 in huge])
    if deepspeed:
        contenders |= {f"DeepSpeedCPUAdam, {kind}": asked(deepspeed, kind, millions, threads) for kind in ("fp32", "bf16")}
    found, count = interleaved(contenders), millions * 10**6 // ROW**2 * ROW**2
    rows = [{"AdamW": n, "ns a parameter": f"{t / count * 1e9:.2f}", "against torch's loop": f"{found['torch, loop'] / t:.1f}x"} for n, t in found.items()]
    show.table(rows, tuple(rows[0]), f"{millions}M parameters, {threads} thread(s), median of {ROUNDS}, load {os.getloadavg()[0]:.1f}")


def delayed(show: Any, model: str, tokens: int, link: str, tile: int) -> None:
    """Seconds of a step with the update after it and beside it."""
    import torch

    from lilliput.base.hardware import detect
    from lilliput.base.protocols import Site
    from lilliput.data.batch import MicroBatch
    from lilliput.models.decoder import Decoder, init_tensor
    from lilliput.models.sizes import PRESETS
    from lilliput.ops import native
    from lilliput.parallel.rig import Rig, assemble
    from lilliput.train.offload import Offload

    torch.set_num_threads(1)
    native.threads(1)
    spec, draw = PRESETS[model], torch.Generator().manual_seed(0)
    knobs = {name: KNOBS[name] for name in ("betas", "eps", "weight_decay")}

    def make(room: Offload) -> Rig:
        with torch.device("meta"):
            built = Decoder(spec)
        fresh = lambda name, shape, seed: init_tensor(name, shape, seed, spec)
        return assemble(built, {"offload": room}, site=Site(detect(), sequences=1, tokens=tokens), device=torch.device("cpu"), seed=0, dtype="fp32",
                        read=None, init=fresh, optimizer=knobs, clip=1.0)  # fmt: skip

    batch = [MicroBatch(*(torch.randint(0, spec.vocab, (1, tokens), generator=draw) for _ in range(2)), tokens)]
    rigs = {name: make(Offload(delay=delay, link=link, tile=tile)) for name, delay in (("after the step", "off"), ("beside the next step", 1))}
    steps = dict.fromkeys(rigs, 0)

    def step(name: str) -> None:
        rigs[name].step(batch, 1e-3, steps[name])
        steps[name] += 1

    for name in rigs:
        step(name)
    one, sums = rigs["after the step"], rigs["after the step"].optimizer
    alone = timed(lambda: (one.schedule(one, batch, tokens), sums.norm(), sums.zero_grad()))
    found = interleaved({name: timed(lambda name=name: step(name)) for name in rigs} | {"forward, backward, gradients down and their norm": alone})
    host, parts = rigs["beside the next step"].optimizer, {"update alone": [], "weights up alone": []}
    for _ in range(ROUNDS):
        step("beside the next step")
        parts["update alone"].append(timed(lambda: (host.begin(1), host.working.result()))())
        parts["weights up alone"].append(timed(host.receive)())
    found |= {name: statistics.median(times) for name, times in parts.items()}
    plain = found["after the step"]
    rows = [{"update": name, "seconds a step": f"{t:.3f}", "share": f"{t / plain:.2f}"} for name, t in found.items()]
    where = f"{model}, {tokens} tokens, link {link or 'as fast as it goes'}, one thread each, median of {ROUNDS}, load {os.getloadavg()[0]:.1f}"
    show.table(rows, tuple(rows[0]), where)


def main() -> None:
    """See the module's text."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--millions", type=int, nargs="*", default=[10, 50])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--deepspeed", default="")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--link", default="4GB")
    parser.add_argument("--tile", type=int, default=1 << 20)
    parser.add_argument("--worker", nargs=3, default=None)
    given = parser.parse_args()
    if given.worker:
        worker(given.worker[0], int(given.worker[1]), int(given.worker[2]))
        return
    from lilliput.base.show import Show

    show = Show()
    for millions in given.millions:
        adam(show, millions, given.threads, given.deepspeed)
    if given.tokens:
        delayed(show, given.model, given.tokens, given.link, given.tile)


if __name__ == "__main__":
    main()
