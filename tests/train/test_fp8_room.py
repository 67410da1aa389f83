"""FP8 training, counted: three products a Linear, one byte a kept number, codes of weights once a step, recomputation to the bit."""

from __future__ import annotations

import csv
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rigs import make_rig, random_batch

from lilliput.base.errors import UserError
from lilliput.base.hardware import declared
from lilliput.base.job import Job
from lilliput.memory.meter import Meter, storage_bytes
from lilliput.models import products
from lilliput.models.exponents import Exponents
from lilliput.models.facts import facts
from lilliput.models.sizes import PRESETS
from lilliput.ops import fp8
from lilliput.ops.nf4 import PAIRS
from lilliput.parallel.rig import Rig
from lilliput.plan.estimate import estimate_training
from lilliput.plan.ledgers import training_ledger
from lilliput.train.fp8 import Fp8, linears, readers
from lilliput.train.lora import Lora
from lilliput.train.paged import Paged
from lilliput.train.qlora import Qlora
from lilliput.train.remat import Remat

TINY = PRESETS["tiny"]
SPECS = {"llama": TINY, "gpt2": replace(PRESETS["gpt-nano"], vocab=259), "opt": replace(PRESETS["gpt-nano"], vocab=259, activation="relu", family="opt")}
COUNT = 4 * 7  # Linears of the tiny model


def spy(monkeypatch: pytest.MonkeyPatch, module, name: str) -> list:
    """Arguments of every call of a function."""
    calls, inner = [], getattr(module, name)
    monkeypatch.setattr(module, name, lambda *a, **k: (calls.append(a), inner(*a, **k))[1])
    return calls


def test_three_products_a_linear_and_none_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    rig, calls = make_rig({"fp8": Fp8()}), spy(monkeypatch, fp8, "product")
    rig.step(random_batch(TINY.vocab, micros=2), 1e-2, 0)
    kinds = [(a.codes.dtype, b.codes.dtype) for a, b in calls]
    four, five = torch.float8_e4m3fn, torch.float8_e5m2
    assert kinds.count((four, four)) == 2 * COUNT, "forward"
    assert kinds.count((five, four)) == 2 * 2 * COUNT, "gradients of inputs and of weights"
    assert len(kinds) == 2 * 3 * COUNT
    calls.clear()
    rig.evaluate(random_batch(TINY.vocab, micros=1))
    assert len(calls) == COUNT


def test_products_counted_by_the_meter() -> None:
    """Beside them the head's three are the only matrix products."""
    rig = make_rig({"fp8": Fp8()})
    with Meter() as meter:
        rig.objective(rig.model, random_batch(TINY.vocab)[0])[0].backward()
    assert meter.calls["mm"] == 3 * COUNT + 3


def test_weights_are_coded_once_a_step_and_shared_inputs_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = spy(monkeypatch, fp8.Scaling, "coded")  # (scaling, kind, tensor)
    rig = make_rig({"fp8": Fp8()})
    of = lambda kind: sum(a[1] == kind for a in calls)
    weights = lambda: of("weights")
    for step in range(2):
        calls.clear()
        rig.step(random_batch(TINY.vocab, micros=3), 1e-2, step)
        assert weights() == COUNT
        assert of("gradients") == 3 * COUNT
        assert of("activations") == 3 * 4 * 4, "a block has four inputs: of q, k, v; of o; of gate, up; of down"
    calls.clear()
    rig.evaluate(random_batch(TINY.vocab, micros=2))
    rig.evaluate(random_batch(TINY.vocab, micros=2))
    assert weights() == COUNT, "once after the update"
    with torch.no_grad():
        rig.model.layers[1].mlp.up_proj.weight.mul_(2)
    rig.evaluate(random_batch(TINY.vocab, micros=1))
    assert weights() == COUNT + 1


def test_nothing_is_held_between_passes() -> None:
    rig = make_rig({"fp8": Fp8()})
    rig.step(random_batch(TINY.vocab), 1e-2, 0)
    shared = {id(m.reads): m.reads for m in rig.model.modules() if isinstance(m, products.Fp8)}
    assert len(shared) == 4 * 4 and all(r.x is None and r.held is None for r in shared.values())


def test_which_linears_read_the_same() -> None:
    known = facts(TINY)
    assert readers(known, "layers.2.attn.k_proj") == tuple(f"layers.2.attn.{n}_proj" for n in "qkv")
    assert readers(known, "layers.2.mlp.up_proj") == ("layers.2.mlp.gate_proj", "layers.2.mlp.up_proj")
    assert readers(known, "layers.0.mlp.down_proj") == ("layers.0.mlp.down_proj",)
    leaves = [*(f"attn.{p}_proj" for p in "qkvo"), *(f"mlp.{p}_proj" for p in ("gate", "up", "down"))]
    assert set(linears(known)) == {f"layers.{i}.{leaf}" for i in range(4) for leaf in leaves}


def gradients(rooms: dict, dropout: float = 0.0, **sizes) -> tuple[Rig, dict[str, torch.Tensor]]:
    rig = make_rig(rooms, TINY, dropout=dropout, **sizes)
    rig.model.train()
    for index, micro in enumerate(random_batch(TINY.vocab)):
        rig.counter.micro = index
        (rig.objective(rig.model, micro)[0] / micro.weight).backward()
    return rig, {n: p.grad.clone() for n, p in rig.trainable().items()}


@pytest.mark.parametrize("remat", [{"every": 1}, {"plan": "sqrt"}, {"plan": "selective"}, {"budget": "9MB"}], ids=str)
@pytest.mark.parametrize("knobs", [{}, {"scaling": "cscale", "bias": 5}], ids=str)
def test_recomputation_changes_no_bit(remat: dict, knobs: dict) -> None:
    plain = gradients({"fp8": Fp8(**knobs)}, dropout=0.2)[1]
    planned = gradients({"fp8": Fp8(**knobs), "remat": Remat(**remat)}, dropout=0.2)[1]
    assert plain.keys() == planned.keys() and all(torch.equal(plain[n], planned[n]) for n in plain)
    assert any(not torch.equal(plain[n], g) for n, g in gradients({}, dropout=0.2)[1].items())


@pytest.mark.parametrize("micros", [1, 2])
@pytest.mark.parametrize("rooms", [{"remat": Remat(every=1)}, {"remat": Remat(plan="selective")}, {"remat": Remat(every=2), "qlora": Qlora(rank=4)}],
                         ids=lambda rooms: "+".join(rooms))  # fmt: skip
def test_the_planned_peak_is_the_measured_one_to_the_byte(rooms: dict, micros: int) -> None:
    rig = make_rig({"fp8": Fp8(), **rooms}, replace(PRESETS["llama-3m"], layers=4), sequences=4, tokens=128, micro_batches=micros)
    products.refresh(rig.model)
    peaks = []
    for micro in random_batch(65, micros=micros, sequences=4, tokens=128):
        known = [PAIRS, *rig.model.parameters(), *rig.model.buffers(), *(p.grad for p in rig.model.parameters() if p.grad is not None)]
        with Meter(known=[*known, micro.tokens_BT, micro.targets_BT]) as meter:
            loss, _ = rig.objective(rig.model, micro)
            (loss / micro.weight).backward()
        peaks.append(meter.peak)
        del loss
    assert peaks == [ready.simulation.peak["device"] for ready in rig.objective.inner.ready.values()]


@pytest.mark.parametrize("family", SPECS)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_closed_forms_of_every_family(family: str, dtype: str) -> None:
    """What is kept within 3 % of what is planned, the peak within 10 %."""
    spec, rooms = SPECS[family], {"fp8": Fp8()}
    rig = make_rig(rooms, spec, dtype=dtype, sequences=4, tokens=64)
    ledger = training_ledger(rig.facts, rig.site, rooms, dtype)
    products.refresh(rig.model)
    assert ledger.bytes("weights in 8 bits") == storage_bytes(rig.model.buffers())
    batch = random_batch(spec.vocab, micros=1, sequences=4, tokens=64)[0]
    with Meter(known=[*rig.model.parameters(), *rig.model.buffers(), batch.tokens_BT, batch.targets_BT]) as meter:
        loss, _ = rig.objective(rig.model, batch)
        saved = meter.live
        loss.backward()
    activations = sum(t.bytes for n, t in ledger.terms.items() if n.startswith("activations.") and "forward" in t.moments)
    assert activations == pytest.approx(saved, rel=0.03)
    static = sum(ledger.bytes(n) for n in ("parameters", "optimizer", "weights in 8 bits"))
    assert ledger.peak()[0] - static == pytest.approx(meter.peak, rel=0.10)


def test_what_only_linears_keep_is_a_quarter() -> None:
    """Over the whole model, plain less fp8 is three quarters of the inputs, less the second copy of attention's output."""
    spec, saved = replace(PRESETS["llama-3m"], layers=6), {}
    for name, rooms in {"plain": {}, "fp8": {"fp8": Fp8()}}.items():
        rig = make_rig(rooms, spec, sequences=4, tokens=128)
        products.refresh(rig.model)
        batch = random_batch(65, micros=1, sequences=4, tokens=128)[0]
        with Meter(known=[*rig.model.parameters(), *rig.model.buffers(), batch.tokens_BT, batch.targets_BT]) as meter:
            loss, _ = rig.objective(rig.model, batch)
            saved[name] = meter.live
            del loss
    rows = 4 * 128 * 6
    inputs = rows * (256 + 256 + 640)  # of q, k, v; of gate, up; of down: fp32 for nothing but these products
    scales = 6 * 4 * 4  # a block has four coded inputs
    assert saved["plain"] - saved["fp8"] == 3 * inputs - rows * 256 - scales
    assert (inputs + 3 * 4 * 6) / (4 * inputs) <= 0.26


def test_an_infinite_activation_skips_the_step_and_says_so() -> None:
    rig = make_rig({"fp8": Fp8()})
    with torch.no_grad():
        rig.model.layers[1].mlp_norm.weight[3] = math.inf
    before = {n: p.detach().clone() for n, p in rig.trainable().items()}
    sums = rig.step(random_batch(TINY.vocab), 1e-2, 0)
    assert math.isnan(sums.norm) and math.isnan(sums.loss)
    assert all(torch.equal(p, before[n]) for n, p in rig.trainable().items())


@pytest.mark.parametrize("base", [Lora(rank=4), Qlora(rank=4)], ids=["lora", "qlora"])
def test_beside_an_adapter(base: Lora, monkeypatch: pytest.MonkeyPatch) -> None:
    """Frozen products are two a Linear, those with A three; a base in 4 bits has no codes that stay."""
    name = type(base).__name__.lower()
    rig, calls = make_rig({"fp8": Fp8(), name: base}), spy(monkeypatch, fp8, "product")
    rig.step(random_batch(TINY.vocab, micros=1), 1e-2, 0)
    assert len(calls) == (2 + 3) * COUNT - 2 * 3, "nothing that learns stands before the first block's q, k and v"
    assert storage_bytes(rig.model.buffers()) == (0 if name == "qlora" else sum(n * k + 4 for n, k in linears(rig.facts).values()))
    assert all(p.grad is None for n, p in rig.model.named_parameters() if ".deltas." not in n)


def test_refusals() -> None:
    with pytest.raises(UserError) as refused:
        make_rig({"fp8": Fp8(bias=4)})
    assert "fp8.scaling=cscale" in refused.value.why
    assert "facts.linears" in Fp8().refuses({}, replace(facts(TINY), linears=()))


def test_the_plan_counts_its_bytes() -> None:
    known = facts(PRESETS["smollm2-135m"])
    job = lambda *words: estimate_training(Job.load(None, ["data.sequence=1024", "train.micro_batch=4", *words]), known, declared("laptop"))
    plain, eight = job(), job("fp8.scaling=amax")
    rows = 4 * 1024 * 30
    assert plain.ledger.bytes("activations.mlp product") == 4 * rows * 1536 and eight.ledger.bytes("activations.mlp product") == rows * 1536
    assert eight.ledger.bytes("activations.attention output") - plain.ledger.bytes("activations.attention output") == rows * 576
    assert eight.ledger.bytes("weights in 8 bits") == sum(n * k + 4 for n, k in linears(known).values())
    assert eight.peak < plain.peak


BASES = [{"lora": Lora(rank=4)}, {"qlora": Qlora(rank=4)}, {"lora": Lora(rank=4, targets=("q_proj",))}]


@pytest.mark.parametrize("base", BASES, ids=["lora", "qlora", "q alone"])
def test_an_adapter_keeps_codes(base: dict) -> None:
    """What is kept and the peak are planned within 10 %; the inputs that A learns from take a byte a number."""
    spec, saved = replace(PRESETS["llama-3m"], layers=4), {}
    for name, rooms in {"plain": base, "fp8": {"fp8": Fp8(), **base}}.items():
        rig = make_rig(rooms, spec, sequences=4, tokens=128)
        rig.model.train()
        products.refresh(rig.model)
        ledger = training_ledger(rig.facts, rig.site, rooms, "fp32")
        batch = random_batch(65, micros=1, sequences=4, tokens=128)[0]
        with Meter(known=[PAIRS, *rig.model.parameters(), *rig.model.buffers(), batch.tokens_BT, batch.targets_BT]) as meter:
            loss, _ = rig.objective(rig.model, batch)
            saved[name] = meter.live
            loss.backward()
        assert sum(t.bytes for n, t in ledger.terms.items() if n.startswith("activations.") and "forward" in t.moments) == pytest.approx(saved[name], rel=0.10)
        static = sum(ledger.bytes(n) for n in ("parameters", "optimizer", "weights in 8 bits"))
        assert ledger.peak()[0] - static == pytest.approx(meter.peak, rel=0.10)
    assert saved["fp8"] < saved["plain"]


def test_a_paged_optimizer_counts_the_codes() -> None:
    rig = make_rig({"fp8": Fp8(), "paged": Paged(budget="1GB")})
    plain = make_rig({"fp8": Fp8()})
    for step in range(2):
        for one in (rig, plain):
            one.step(random_batch(TINY.vocab), 1e-2, step)
    assert all(torch.equal(p, plain.trainable()[n]) for n, p in rig.trainable().items())


@pytest.mark.parametrize("rooms", [{}, {"remat": Remat(every=2)}, {"qlora": Qlora(rank=4)}], ids=lambda rooms: "+".join(rooms) or "alone")
def test_exponents_are_counted_and_change_nothing(rooms: dict, tmp_path: Path) -> None:
    """Of each Linear: its weight once a step, its input, its gradient; the b of every one is floor(log2(largest / amax))."""
    plain, told = make_rig({"fp8": Fp8(), **rooms}, budget={"device": 1 << 40}), make_rig({"fp8": Fp8(histogram=True), **rooms}, budget={"device": 1 << 40})
    for step in range(3):
        assert plain.step(random_batch(TINY.vocab, micros=1, seed=step), 1e-2, step) == told.step(random_batch(TINY.vocab, micros=1, seed=step), 1e-2, step)
    assert plain.meter.peak == told.meter.peak == told.plan.predicted["bytes"]
    said = told.exports["fp8"](told, tmp_path)
    rows = list(csv.DictReader((tmp_path / "biases.csv").open()))
    count = lambda tensor, linear: sum(int(r["count"]) for r in rows if (r["tensor"], r["linear"]) == (tensor, linear))
    assert count("gradients", "layers.1.attn.k_proj") == 3
    assert count("activations", "layers.1.attn.q_proj") == 3 and not count("activations", "layers.1.attn.k_proj"), "whoever reads first"
    if "qlora" not in rooms:
        assert count("weights", "layers.1.mlp.up_proj") == 3 and {r["linear"] for r in rows} == set(linears(told.facts))
        first = {int(r["b"]) for r in rows if r["tensor"] == "weights" and r["linear"] == "layers.1.mlp.up_proj" and r["first step"] == "0"}
        fresh = make_rig({}).model.layers[1].mlp.up_proj.weight
        assert first == {math.floor(math.log2(448 / float(fresh.detach().abs().max())))}
    assert (tmp_path / "biases.png").read_bytes()[:4] == b"\x89PNG" and "gradients" in said


def test_spans_of_time_are_halved_when_they_are_full() -> None:
    clock = SimpleNamespace(step=0)
    seen = Exponents(clock)
    for step in range(200):
        clock.step = step
        seen.note("a", "weights", fp8.encode(torch.ones(4), "e4m3fn"))
    assert seen.width == 4 and {span for span, *_ in seen.counts} == set(range(50)) and set(seen.counts.values()) == {4}
    assert {b for *_, b in seen.counts} == {8}, "448 holds 1 times 2^8"
