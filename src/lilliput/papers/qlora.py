"""QLoRA: the base model is stored in 4 bits (NF4: 16 quantiles of a normal distribution, one scale per 64 weights, the scales
quantised again: 4.127 bits a weight), gradients reach only LoRA matrices on all linear layers, the optimizer is paged.

The run measures bits and error of the format beside other 4-bit ones, compares adapter gradients with those over a base of the same
values in fp32, merges the update into both bases, runs an activation spike with the optimizer paged and not, and plans the paper's 65B model.

Dettmers et al. 2023, NeurIPS 2023, arXiv 2305.14314.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from lilliput.papers.paper import Finding, Paper

if TYPE_CHECKING:
    from torch import Tensor

    from lilliput.parallel.rig import Rig

SPIKE, STEPS = 1, 3  # the step whose batch is eight times as long
KNOBS = {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}
FP4 = (0.0, 0.0625, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0)  # magnitudes of bitsandbytes' 4-bit float, over 12
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # magnitudes of a 4-bit float


def run() -> Finding:
    """Bits and relative errors on a million normal weights, gradients of two blocks of SmolLM2's sizes, bytes of a 65B model; about 10 s."""
    rows = [*_formats(), *_plans()]
    errors = {str(row["what"]): float(row["relative error"]) for row in rows if row["relative error"] != ""}
    bits = {str(row["what"]): float(row["bits a weight"]) for row in rows if row["bits a weight"] != ""}
    full, small = (float(row["GB"]) for row in rows if row["GB"] != "")
    held, same, decoded, original = _gradients()
    refused, evicted, equal = _spike()
    only = [step for step, count in enumerate(evicted) if count] == [SPIKE]
    name = "NF4, double quantisation"
    summary = (
        f"{held:.3f} bits a weight from storage; relative error on normal weights {errors[name]:.4f} ({errors['NF4']:.4f} with fp32 scales "
        f"at {bits['NF4']:.1f} bits, FP4 {errors['FP4 (bitsandbytes)']:.4f} or, as E2M1, {errors['FP4 (E2M1)']:.4f}, Int4 {errors['Int4']:.4f}); "
        f"adapter gradients {'bitwise equal' if same else 'NOT equal'} to those over the decoded base; "
        f"merged into the decoded base the update gives the trained logits within {_power(decoded)}, into the original weights {original:.1%} off; "
        f"a batch 8 times as long {'is refused' if refused else 'FITS'} plainly and finishes with {max(evicted) / 1000:.0f} kB of moments evicted "
        f"{'in that step alone' if only else 'NOT only in that step'}, {'bitwise equal' if equal else 'NOT equal'}; "
        f"a 65B model is planned in {small:.0f} GB instead of {full:.0f} GB"
    )
    ordered = errors["NF4"] < errors["FP4 (E2M1)"] < errors["Int4"] and errors[name] - errors["NF4"] <= 0.0003
    paged = refused and only and equal
    return Finding(summary, tuple(rows), abs(held - 4.127) <= 0.002 and ordered and same and decoded < 1e-4 and paged and full > 780 and small < 48)


def _power(number: float) -> str:
    """The power of ten at or above it."""
    import math

    return f"1e{math.ceil(math.log10(number))}"


def _row(what: str, bits: float | str = "", error: float | str = "", gigabytes: float | str = "") -> dict[str, str | float]:
    return {"what": what, "bits a weight": bits, "relative error": error, "GB": gigabytes}


def _formats() -> list[dict[str, str | float]]:
    """Each format in blocks of 64, on N(0, 1)."""
    import gguf
    import torch

    from lilliput.ops.float_codecs import NF4
    from lilliput.ops.nf4 import Nf4
    from lilliput.ops.q4 import Q4

    weight = torch.randn(1024, 1024, generator=torch.Generator().manual_seed(0))
    blocks, codec = weight.view(-1, 64), Nf4(1024, 1024)
    top = blocks.abs().amax(1, keepdim=True)
    error = lambda w: round(float((w.reshape(-1) - weight.reshape(-1)).square().mean().sqrt() / weight.square().mean().sqrt()), 4)

    def nearest(levels: Tensor) -> Tensor:
        levels = (levels / levels.abs().max()).sort().values
        return levels[torch.bucketize(blocks / top, (levels[1:] + levels[:-1]) / 2)] * top

    stored, float4, theirs = codec.encode(weight), torch.tensor(E2M1), torch.tensor(FP4)
    file = Q4(1024, 1024).encode("Q4_1", gguf.quants.quantize(weight.numpy(), gguf.GGMLQuantizationType.Q4_1))
    return [
        _row("NF4, double quantisation", round(8 * stored.nbytes / weight.numel(), 3), error(codec.decode(stored))),
        _row("NF4", 4.5, error(nearest(torch.tensor(NF4)))),
        _row("FP4 (E2M1)", 4.5, error(nearest(torch.cat([-float4[1:], float4])))),
        _row("FP4 (bitsandbytes)", 4.5, error(nearest(torch.cat([-theirs[1:], theirs])))),
        _row("Int4", 4.5, error(nearest(torch.arange(-7.0, 8.0)))),
        _row("GGUF's Q4_1, scales and offsets doubled", round(8 * file.nbytes / weight.numel(), 3), error(Q4(1024, 1024).decode(file))),
    ]


def _gradients() -> tuple[float, bool, float, float]:
    """(bits a weight of two blocks' Linears in memory, whether adapter gradients are bitwise those over fp32 weights of the same values, and how far
    logits are from the trained ones, of those: the update merged into the decoded base, largest; into the original weights, rms)."""
    import copy
    from dataclasses import replace

    import torch
    from torch import nn

    from lilliput.base import registry
    from lilliput.models.sizes import PRESETS
    from lilliput.papers import small
    from lilliput.train.lora import merge

    spec = replace(PRESETS["smollm2-135m"], layers=2, vocab=256)
    rig = small.rig(spec, {"qlora": registry.find("train", "qlora")(rank=8, merge="original")}, clip=0.0, optimizer=KNOBS)
    for number, parameter in enumerate(rig.trainable().values()):
        parameter.data.normal_(std=0.05, generator=torch.Generator().manual_seed(number))  # as if trained: B is not zero
    linears = [m for m in rig.model.modules() if getattr(m, "codec", None) is not None]
    bits = 8 * sum(m.weight.untyped_storage().nbytes() for m in linears) / sum(m.outputs * m.inputs for m in linears)
    plain = copy.deepcopy(rig.model)
    for linear in plain.modules():
        if getattr(linear, "codec", None) is not None:
            linear.weight, linear.codec = nn.Parameter(linear.whole("weight"), requires_grad=False), None
    tokens_BT = torch.arange(128).view(2, 64)
    for one in (rig.model, plain):
        one(tokens_BT).square().mean().backward()
    pairs = [(p.grad, plain.get_parameter(n).grad) for n, p in rig.trainable().items()]
    same = all(a is not None and b is not None and bool(a.any()) and torch.equal(a, b) for a, b in pairs)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        rig.exports["adapter"](rig, Path(folder))
        apart = json.loads((Path(folder) / "merge.json").read_text())
        trained = plain(tokens_BT)
        merge(plain)
        decoded = float((plain(tokens_BT) - trained).abs().max() / trained.square().mean().sqrt())
    return bits, same, decoded, apart["rms"] / apart["of"]


def _spike() -> tuple[bool, list[float], bool]:
    """(whether the plain optimizer is refused the spike, evicted bytes of each step, whether weights are bitwise those of a run with room)."""
    import torch

    from lilliput.base import registry
    from lilliput.base.errors import DoesNotFit
    from lilliput.data.batch import MicroBatch
    from lilliput.memory.meter import Meter
    from lilliput.models.sizes import PRESETS
    from lilliput.papers import small

    spec = PRESETS["tiny"]

    def rig(**budget: str) -> Rig:
        return small.rig(spec, {"paged": registry.find("train", "paged")(**budget)} if budget else {}, optimizer=KNOBS)

    def go(one: Rig) -> list[float]:
        told = []
        for number in range(STEPS):
            tokens_BT = torch.arange(2 * (256 if number == SPIKE else 32)).view(2, -1) % spec.vocab
            told.append(one.step([MicroBatch(tokens_BT, tokens_BT.roll(-1, 1), tokens_BT.numel())], 1e-3, number).told.get("evicted_bytes", 0.0))
        return told

    def counted(one: Rig, limit: int | None) -> int:
        assert one.optimizer is not None, "a rig is complete"
        with Meter(budget={} if limit is None else {"device": limit}) as meter:
            meter.adopt([*one.model.parameters(), *one.optimizer.state().values()])
            go(one)
        return meter.peak

    roomy = rig()
    assert roomy.optimizer is not None, "a rig is complete"
    budget = counted(roomy, None) - sum(t.nbytes for t in roomy.optimizer.first.values()) // 2
    paged, refused = rig(budget=f"{budget}B"), False
    try:
        counted(rig(), budget)
    except DoesNotFit:
        refused = True
    evicted = go(paged)
    return refused, evicted, all(torch.equal(a, b) for a, b in zip(roomy.model.parameters(), paged.model.parameters(), strict=True))


def _plans() -> list[dict[str, str | float]]:
    """Peak bytes of one step of the paper's largest model on one sequence of 512 tokens: all weights in 16 bits, and in 4 with remat."""
    from dataclasses import replace

    from lilliput.base import registry
    from lilliput.base.hardware import declared
    from lilliput.base.protocols import Site
    from lilliput.models.facts import facts
    from lilliput.models.sizes import PRESETS
    from lilliput.plan.estimate import training_ledger

    known = facts(replace(PRESETS["llama-70b"], kv_heads=64, ffn=22016, context=2048))
    rooms = {"qlora": registry.find("train", "qlora")(rank=16), "remat": registry.find("train", "remat")()}
    site = Site(declared("a100-dgx"), sequences=1, tokens=512, element=2)
    peak = lambda rooms: round(training_ledger(known, site, rooms, "bf16").peak()[0] / 1e9, 1)
    return [_row("65B, all weights learn", gigabytes=peak({})), _row("65B, qlora.rank=16 remat=on", gigabytes=peak(rooms))]


PAPER = Paper(
    name="qlora",
    system="QLoRA",
    title="QLoRA: Efficient Finetuning of Quantized LLMs",
    authors="Dettmers et al.",
    year=2023,
    where="NeurIPS 2023, arXiv 2305.14314",
    claim="A 65-billion-parameter model is fine-tuned in under 48 GB instead of over 780 GB; mean MMLU is 53.1 with 4-bit NF4 and 53.0 in bf16.",
    measured=(
        "4.127 bits a weight from storage; relative error on normal weights 0.0920 (0.0920 with fp32 scales at 4.5 bits, FP4 0.1219 or, as E2M1, 0.1057, "
        "Int4 0.1077); adapter gradients bitwise equal to those over the decoded base; merged into the decoded base the update gives the trained logits "
        "within 1e-5, into the original weights 17.2% off; a batch 8 times as long is refused plainly and finishes with 715 kB of moments evicted in that "
        "step alone, bitwise equal; a 65B model is planned in 40 GB instead of 788 GB"
    ),
    switches=("qlora.rank=16", "paged.budget=2GB"),
    run=run,
)
