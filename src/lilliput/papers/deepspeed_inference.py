"""DeepSpeed Inference: operators fused wherever tiles do not depend on each other, matrix products made for a handful of rows,
tensor and pipeline parallelism with a token-level schedule, and weights streamed from host memory or NVMe.

The run decodes with the plain PyTorch decoder and with the fused plan (ops/step.py). Of one step it counts what torch's dispatcher sees
(operations that write a result, and its bytes), the calls of the plan, and the scratch that all its layers share; it compares the tokens, and
states what a token costs in weights where sequences share a step. Several devices, experts and streamed weights are not here.

Aminabadi et al. 2022, SC 2022, arXiv 2207.00032, section III.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lilliput.papers.paper import Finding, Paper

if TYPE_CHECKING:
    from lilliput.serve.engine import Engine

MODEL, NEW, BATCHES, STORAGES = "lilliput-tiny", 48, (1, 4, 16), ("fp16", "w8", "q4")
Row = dict[str, str | int | float]


def run() -> Finding:
    """Both forms at three batches, then three more storages of the fused one; about 5 s. UserError without compiled kernels."""
    from lilliput.base.errors import UserError
    from lilliput.models.sizes import PRESETS
    from lilliput.ops import native

    if native.module() is None:
        raise UserError("DeepSpeed Inference cannot be measured", native.missing() or "", "install a compiler and lilliput again")
    eager, fused = ([_decoded(runner, "fp32", batch) for batch in BATCHES] for runner in ("eager", "native"))
    packed = [_decoded("native", storage, BATCHES[-1]) for storage in STORAGES]
    rows = [row for row, _ in (*eager, *fused, *packed)]
    same = [said for _, said in eager] == [said for _, said in fused]
    (one, *_, many), (step, *_, shared), narrow = (*([row for row, _ in side] for side in (eager, fused)), packed[-1][0])
    summary = (
        f"a step of {PRESETS['tiny'].layers} layers is {step['calls of the plan']} native call and {step['torch operations']} torch operations, where the "
        f"plain decoder makes {one['torch operations']}; for {BATCHES[-1]} sequences those are {many['torch operations']} and write "
        f"{many['results, KiB']} KiB, the plan's scratch has {shared['results, KiB']}; tokens are {'the same' if same else 'NOT the same'}; a token reads "
        f"{step['weights, KiB a token']} KiB of weights alone in fp32, {narrow['weights, KiB a token']} among {BATCHES[-1]} in {narrow['bits a weight']} bits"
    )
    whole = all((row["torch operations"], row["calls of the plan"]) == (0, 1) for row in rows if row["form"] == "fused")
    less = all(float(a["results, KiB"]) > float(b["results, KiB"]) for (a, _), (b, _) in zip(eager, fused, strict=True))
    return Finding(summary, tuple(rows), same and whole and less)


def _decoded(runner: str, weights: str, batch: int) -> tuple[Row, list[list[int | None]]]:
    """One row, and the greedy tokens after each of `batch` prompts."""
    import time
    from statistics import median

    from lilliput.base.job import Job
    from lilliput.models.load import load_to_serve
    from lilliput.serve.engine import Engine
    from lilliput.serve.request import Sampling

    model: Any
    model, tokenizer, _ = load_to_serve(MODEL, Job.load(None, [f"serve.runner={runner}", f"serve.weights={weights}"]).serve, "cpu")
    engine = Engine(model, tokenizer, kv_tokens=batch * (NEW + 16))
    # prompts of one token: no step has more rows than a decoding one, so the scratch is that of decoding
    said = {engine.add([5 + 40 * number], Sampling(NEW, ignore_eos=True)): list[int | None]() for number in range(batch)}
    operations = written = calls = 0
    seconds = []
    while engine.busy:
        counted = engine.counts.generated == batch * NEW // 2
        begin = time.perf_counter()
        if counted:
            deltas, operations, written, calls = _counted(engine)
        else:
            deltas = engine.step()
            seconds.append(time.perf_counter() - begin)
        for delta in deltas:
            said[delta.id].append(delta.token)
    numbers = sum(shape[0] * shape[1] for shape in model.spec.shapes().values() if len(shape) == 2)
    held = 4 * numbers if runner == "eager" else model.bytes
    row: Row = {
        "form": "fused" if calls else "eager", "weights": weights, "sequences": batch, "torch operations": operations, "calls of the plan": calls,
        "results, KiB": round((model.plan.scratch if calls else written) / 1024), "bits a weight": round(8 * held / numbers, 2),
        "weights, KiB a token": round(held / batch / 1024), "ms a step": round(1000 * median(seconds), 2),
    }  # fmt: skip
    return row, list(said.values())


def _counted(engine: Engine) -> tuple[list[Any], int, int, int]:
    """One step: (deltas, then of its forward pass torch operations that write, bytes of what they write, calls of the native plan)."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    storages = lambda tree: {x.untyped_storage().data_ptr(): x.nbytes for x in tree_leaves(tree) if isinstance(x, torch.Tensor)}

    class Writes(TorchDispatchMode):
        operations = written = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            before = storages((args, kwargs))
            result = func(*args, **(kwargs or {}))
            own = [size for at, size in storages(result).items() if at not in before]
            self.operations += bool(own) or func._schema.is_mutable  # neither: a view
            self.written += sum(own)
            return result

    class Calls:
        count = 0

        def __init__(self, inner: Any) -> None:
            self.inner = inner

        def forward(self, *arguments: Any) -> None:
            self.count += 1
            self.inner.forward(*arguments)

    runner: Any = engine.runner
    plan: Any = getattr(engine.model, "plan", None)
    calls, seen, forward = Calls(None if plan is None else plan._native), Writes(), runner.forward

    def watched(*arguments: Any) -> Any:  # the sampler comes after it, and is the same for both forms
        with seen:
            return forward(*arguments)

    runner.forward = watched
    if plan is not None:
        plan._native = calls
    deltas = engine.step()
    runner.forward = forward
    if plan is not None:
        plan._native = calls.inner
    return deltas, seen.operations, seen.written, calls.count


PAPER = Paper(
    name="deepspeed-inference",
    system="DeepSpeed Inference",
    title="DeepSpeed Inference: Enabling Efficient Inference of Transformer Models at Unprecedented Scale",
    authors="Aminabadi et al.",
    year=2022,
    where="SC 2022, arXiv 2207.00032",
    claim="Latency falls up to 6.4x; weight streaming runs models 25x larger than GPU memory alone allows, at 84 TFLOP/s on an A6000 (over half its peak).",
    measured=(
        "a step of 4 layers is 1 native call and 0 torch operations, where the plain decoder makes 110; for 16 sequences those are 254 and write 1190 KiB, the "
        "plan's scratch has 54; tokens are the same; a token reads 1392 KiB of weights alone in fp32, 12 among 16 in 4.47 bits"
    ),
    lacks="several devices, mixtures of experts, weights streamed from host memory or disk",
    switches=("serve.runner=native",),
    run=run,
)
