"""ZeRO-Offload: the one cut of the mixed-precision Adam graph that moves only 4 bytes a parameter across the link: fp16 weights,
forward and backward on the device, gradients, master weights and Adam on the host. A one-step delayed update hides the CPU.

The run tries every partition of that graph, then trains a decoder under the room, without the delay, with it, and with it and the prediction
that is ours, beside the same mixed precision in one memory: bits, bytes on the link, bytes on the device.

Ren et al. 2021, USENIX ATC 2021, arXiv 2101.06840.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lilliput.papers.paper import Finding, Paper

if TYPE_CHECKING:
    from torch import Tensor

STEPS, LATE, DELAY = 100, 20, 5  # plain, delayed, the first delayed one


def run() -> Finding:
    """Table 1 by brute force, a run of 100 steps and two of 20; about 5 s on one core."""
    from lilliput.memory.planners import mincut

    found = mincut.cheapest()
    every = sum(1 for _ in mincut.cuts())
    unique = found[0].traffic == 4 and [cut.device for cut in found].count(found[0].device) == 1
    rows = [_row("everything on the device", 0, 16, "")]
    rows += [_row("host: " + ", ".join(sorted(c.host)), c.traffic, c.device, "") for c in reversed(found)]
    sync, delayed, ahead = _executed(STEPS, "off", False), _executed(LATE, DELAY, False), _executed(LATE, DELAY, True)
    late = f"{LATE} steps run, delayed from step {DELAY}"
    for name, (link, device, same) in ((f"{STEPS} steps run", sync), (late, delayed), (f"{late}, predicted", ahead)):
        rows.append(_row(name, link, device, "yes" if same else "NO"))
    holds = unique and found[0].device == 2 and sync == delayed == (4.0, 2.0, True) and ahead[1:] == (2.0, True)
    summary = (
        f"of {every} partitions {len(found)} move {found[0].traffic} bytes a parameter and one of them leaves {found[0].device} of 16 on the device; "
        f"run, it moves {sync[0]:g} and leaves {sync[1]:g}, and {STEPS} steps are {'bitwise' if sync[2] else 'NOT'} those of one memory, "
        f"delayed ones {'bitwise' if delayed[2] and ahead[2] else 'NOT'} those of their definition"
    )
    return Finding(summary, tuple(rows), holds)


def _row(placement: str, link: float, device: float, same: str) -> dict[str, str | int | float]:
    return {"placement": placement, "link, bytes a parameter": link, "device, bytes a parameter": device, "bitwise": same}


def _executed(steps: int, delay: Any, predict: bool) -> tuple[float, float, bool]:
    """(bytes a parameter and step on the link, bytes a parameter on the device, whether weights are bitwise those of one memory)."""
    import torch

    from lilliput.data.batch import MicroBatch
    from lilliput.memory.meter import storage_bytes
    from lilliput.models.sizes import PRESETS
    from lilliput.papers import small
    from lilliput.train.offload import Offload

    spec = PRESETS["tiny"]
    make = lambda rooms: small.rig(spec, rooms, sequences=1, tokens=32)
    draw = torch.Generator().manual_seed(0)
    tokens = lambda: torch.randint(0, spec.vocab, (1, 32), generator=draw)
    batches = [MicroBatch(tokens(), tokens(), 32) for _ in range(steps)]
    rig = make({"offload": Offload.model_validate({"delay": delay, "predict": predict})})
    for step, micro in enumerate(batches):
        rig.step([micro], 1e-2, step)
    rig.flush(rig)
    expected = _one_memory(make({}), batches, steps + 1 if delay == "off" else delay, predict)
    count = sum(p.numel() for p in rig.model.parameters())
    same = all(torch.equal(rig.weight(rig, name), master) for name, master in expected.items())
    return (rig.optimizer.down.moved + rig.optimizer.up.moved) / count / steps, storage_bytes(rig.model.parameters()) / count, same


def _one_memory(rig: Any, batches: list[Any], delay: int, predict: bool) -> dict[str, Tensor]:
    """The masters after mixed precision without a host: plain steps before `delay`, from then on each step is made one step later. predict:
    the weights that the next gradients are taken at have a late step in them twice."""
    import torch

    from lilliput.ops.adamw import Rule, update
    from lilliput.papers.small import KNOBS

    names, weights = zip(*rig.model.named_parameters(), strict=True)
    master = {n: p.detach().clone() for n, p in zip(names, weights, strict=True)}
    first, second = ({n: torch.zeros_like(t) for n, t in master.items()} for _ in range(2))
    for p in weights:
        p.data = p.data.bfloat16()
    waiting: list[list[Tensor]] = []
    done = 0
    for step in range(len(batches) + 1):
        if step < len(batches):
            loss, weight = rig.objective(rig.model, batches[step])
            waiting.append(list(torch.autograd.grad(loss / weight, weights)))
        while len(waiting) > (step + 1 >= delay and step < len(batches)):
            gradients, done, late = waiting.pop(0), done + 1, predict and done + 1 >= delay
            norm = float(torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g, dtype=torch.float32) for g in gradients])))
            for n, p, g in zip(names, weights, gradients, strict=True):
                rule = Rule(1e-2, KNOBS["betas"], KNOBS["eps"], KNOBS["weight_decay"] if p.dim() >= 2 else 0.0, done)  # type: ignore[arg-type]
                before = master[n].clone()
                update(master[n], g.float() * min(1.0, 1.0 / (norm + 1e-6)), first[n], second[n], rule, 0)
                p.data.copy_(master[n] + (master[n] - before) if late else master[n])
    return master


PAPER = Paper(
    name="zero-offload",
    system="ZeRO-Offload",
    title="ZeRO-Offload: Democratizing Billion-Scale Model Training",
    authors="Ren et al.",
    year=2021,
    where="USENIX ATC 2021, arXiv 2101.06840",
    claim="13 billion parameters train on one 32 GB V100, where PyTorch reaches 1.4 billion, at 40 TFLOP/s for a model of 10 billion.",
    measured=(
        "of 128 partitions 3 move 4 bytes a parameter and one of them leaves 2 of 16 on the device; run, it moves 4 and leaves 2, and 100 steps are bitwise "
        "those of one memory, delayed ones bitwise those of their definition"
    ),
    switches=("offload.states=optimizer",),
    run=run,
)
