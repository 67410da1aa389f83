"""Three proofs for every room in the registry: same numbers, true cost, good neighbour.

A new room adds one line to ROOMS (a small config) and one reference; a registered room without them fails here.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest
import torch
from rigs import ADAMW, make_rig, random_batch
from torch.func import functional_call

from lilliput.base import registry
from lilliput.base.job import Job
from lilliput.memory.meter import Meter, storage_bytes
from lilliput.models.facts import facts
from lilliput.models.sizes import PRESETS
from lilliput.ops.adamw import Rule, update
from lilliput.ops.float_codecs import NF4
from lilliput.parallel.rig import Rig, next_token
from lilliput.plan.estimate import training_ledger

SPEC = PRESETS["tiny"]
FACTS = facts(SPEC)
# room -> a config that acts on a four-block model. paged, poet: with room for everything; what they do with less: tests/train/test_paged.py, test_poet.py
SMALL = {
    "chunked": {"tokens": 8}, "infinity": {"parameters": "host"},
    "fp8": {"scaling": "amax"}, "lora": {"rank": 4, "alpha": 8.0}, "offload": {"tile": 4096}, "paged": {"budget": "1GB"}, "poet": {"budget": "1GB"},
    "qlora": {"rank": 4, "alpha": 8.0}, "remat": {"every": 2},
}  # fmt: skip


def room(name: str) -> dict:
    return {name: registry.find("train", name)(**SMALL[name])}


def exported(rig: Rig) -> dict[str, torch.Tensor]:
    return {n: rig.weight(rig, n).clone() for n in rig.facts.shapes}


def trained(rig: Rig, steps: int = 3) -> tuple[list[float], dict[str, torch.Tensor]]:
    losses = [rig.step(random_batch(SPEC.vocab, seed=s), 1e-2, s).mean for s in range(steps)]
    return losses, exported(rig)


def plain() -> tuple[list[float], dict[str, torch.Tensor]]:
    return trained(make_rig({}))


def low_rank_reference(name: str = "lora", stored: Callable = lambda w: w) -> tuple[list[float], dict[str, torch.Tensor]]:
    """LoRA in its own formula: W + (alpha / rank) B A by functional_call, torch's AdamW on A and B alone. stored(w): what is left of W."""
    rig, (adapter,) = make_rig({}), room(name).values()
    base = {n: stored(p.detach()) if "_proj." in n else p.detach() for n, p in rig.model.named_parameters()}
    fresh = make_rig(room(name)).model
    a = {n: fresh.get_submodule(n).deltas["lora"].a.detach().clone().requires_grad_() for n in adapter.chosen(rig.facts)}
    b = {n: torch.zeros(base[n + ".weight"].shape[0], adapter.rank, requires_grad=True) for n in a}
    optimizer = torch.optim.AdamW([*a.values(), *b.values()], lr=1e-2, fused=True, **ADAMW)
    merged = lambda: base | {n + ".weight": base[n + ".weight"] + adapter.alpha / adapter.rank * b[n] @ a[n] for n in a}
    losses = []
    for step in range(3):
        batch = random_batch(SPEC.vocab, seed=step)
        loss = sum(next_token(lambda tokens: functional_call(rig.model, merged(), (tokens,)), m)[0] for m in batch) / sum(m.weight for m in batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_([*a.values(), *b.values()], 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, {n: t.detach() for n, t in merged().items()}


def rounded(w: torch.Tensor) -> torch.Tensor:
    """NF4 with double quantisation by the definition, in numpy: the nearest of 16 levels, absmax of 64, int8 of 256 of them less their mean."""
    blocks, levels = w.numpy().reshape(-1, 64), np.array(NF4, np.float32)
    top = np.abs(blocks).max(1)
    nearest = levels[np.abs(blocks[..., None] / top[:, None, None] - levels).argmin(-1)]
    mean, scales = top.mean(dtype=np.float32), []
    for second in np.split(top - mean, range(256, len(top), 256)):
        step = np.abs(second).max() / 127
        scales.append(np.round(second / step) * step + mean)
    return torch.tensor(nearest * np.concatenate(scales)[:, None], dtype=torch.float32).reshape(w.shape)


def quantised_low_rank_reference() -> tuple[list[float], dict[str, torch.Tensor]]:
    return low_rank_reference("qlora", rounded)


def mixed_reference(steps: int = 3, micros: int = 2) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Mixed precision in one memory: bf16 weights compute, gradients are summed in fp32, fp32 masters are updated, weights rounded."""
    rig, losses = make_rig({}), []
    master = {n: p.detach().clone() for n, p in rig.model.named_parameters()}
    first, second = ({n: torch.zeros_like(t) for n, t in master.items()} for _ in range(2))
    for p in rig.model.parameters():
        p.data = p.data.bfloat16()
    for step in range(steps):
        batch, total = random_batch(SPEC.vocab, seed=step, micros=micros), 0.0
        gradients = {n: torch.zeros_like(t) for n, t in master.items()}
        for m in batch:
            loss = next_token(rig.model, m)[0] / sum(m.weight for m in batch)
            gradients = {n: g + t for (n, g), t in zip(gradients.items(), torch.autograd.grad(loss, list(rig.model.parameters())))}
            total += loss.item()
        norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in gradients.values()])).item()
        for n, p in rig.model.named_parameters():
            rule = Rule(1e-2, ADAMW["betas"], ADAMW["eps"], ADAMW["weight_decay"] * (p.dim() >= 2), step + 1)
            update(master[n], gradients[n] * min(1.0, 1.0 / (norm + 1e-6)), first[n], second[n], rule, 0)
            p.data.copy_(master[n])
        losses.append(total)
    return losses, master


def eight_bits(x: torch.Tensor, mantissa: int, smallest: int, largest: float) -> torch.Tensor:
    """FP8 by the definition, in numpy: times 2^floor(log2(largest / amax)), to a multiple of the step of its binade, ties to even, and back."""
    x = x.detach().double().numpy()
    scale = 2.0 ** np.floor(np.log2(largest / np.abs(x).max()))
    step = 2.0 ** (np.maximum(np.floor(np.log2(np.abs(x * scale) + 1e-300)), smallest) - mantissa)
    return torch.tensor(np.round(x * scale / step) * step / scale, dtype=torch.float32)


class EightBits(torch.autograd.Function):
    """A Linear whose operands are rounded: 3 bits of mantissa for weights and activations, 2 for gradients."""

    @staticmethod
    def forward(ctx, x, w, bias, decode):
        ctx.save_for_backward(x8 := eight_bits(x, 3, -6, 448.0), w8 := eight_bits(w, 3, -6, 448.0))
        return x8 @ w8.t()

    @staticmethod
    def backward(ctx, grad):
        (x8, w8), g8 = ctx.saved_tensors, eight_bits(grad, 2, -14, 57344.0)
        return g8 @ w8, g8.flatten(0, 1).t() @ x8.flatten(0, 1), None, None


def eight_bit_reference() -> tuple[list[float], dict[str, torch.Tensor]]:
    rig = make_rig({})
    for name, module in rig.model.named_modules():
        if name.endswith("_proj"):
            module.product = EightBits.apply
    return trained(rig)


# room -> (reference, tolerance); 0 = bitwise. Rooms that change the mathematics have a reference of their own.
REFERENCES: dict[str, tuple[Callable, float]] = {
    "fp8": (eight_bit_reference, 2e-5), "offload": (mixed_reference, 0.0), "infinity": (plain, 0.0), "paged": (plain, 0.0),
    "poet": (plain, 0.0), "remat": (plain, 0.0), "chunked": (plain, 2e-5),
    "lora": (low_rank_reference, 2e-5), "qlora": (quantised_low_rank_reference, 2e-5),
}  # fmt: skip
ROUNDS = ("offload", "qlora", "fp8")  # rooms that round what the model computes with: beside them the first step is theirs alone, or nearly the first one's


@pytest.mark.parametrize("name", registry.names("train"))
def test_same_numbers(name: str) -> None:
    assert name in REFERENCES and name in SMALL, f"the room `{name}` has no reference here"
    reference, tolerance = REFERENCES[name]
    (losses, weights), (expected_losses, expected) = trained(make_rig(room(name))), reference()
    assert weights.keys() == expected.keys()
    if tolerance == 0:
        assert losses == pytest.approx(expected_losses, rel=1e-6 if name in ROUNDS else 0)  # micro-batches are added in another order
        assert all(torch.equal(weights[n], expected[n]) for n in expected)
        return
    assert losses == pytest.approx(expected_losses, rel=tolerance)
    for n in expected:
        torch.testing.assert_close(weights[n], expected[n], rtol=1e-4, atol=tolerance)
    assert any(not torch.equal(weights[n], t) for n, t in plain()[1].items()), "the room must change something"


def together() -> tuple[str, ...]:
    """As many rooms as stand beside each other, in table order."""
    chosen: list[str] = []
    for name in registry.names("train"):
        rooms = {k: v for n in (*chosen, name) for k, v in room(n).items()}
        if not any(r.refuses({k: v for k, v in rooms.items() if k != n}, FACTS) for n, r in rooms.items()):
            chosen.append(name)
    return tuple(chosen)


@pytest.mark.parametrize("names", [(), *[(n,) for n in registry.names("train")], together()], ids=lambda n: "+".join(n) or "plain")
@pytest.mark.parametrize(("sequences", "tokens"), [(2, 64), (4, 256)])
def test_true_cost(names: tuple[str, ...], sequences: int, tokens: int) -> None:
    rooms = {k: v for n in names for k, v in room(n).items()}
    rig = make_rig(rooms, sequences=sequences, tokens=tokens)
    ledger = training_ledger(rig.facts, rig.site, rooms, "fp32")
    batch = random_batch(SPEC.vocab, micros=1, sequences=sequences, tokens=tokens)
    weights, codes = list(rig.model.parameters()), list(rig.model.buffers())
    resting = ledger.terms["parameters"].tier != "device"
    assert storage_bytes(weights) == ledger.bytes("adapter" if resting else "parameters")
    assert ledger.bytes("optimizer") == storage_bytes(rig.optimizer.state().values())
    assert ledger.bytes("weights in 8 bits") == storage_bytes(codes)
    known = [*weights, *codes, *[t for m in batch for t in (m.tokens_BT, m.targets_BT)]]
    with Meter(known=known, watch=[p for n, p in rig.model.named_parameters() if rig.home(n).tier != "device"]) as meter:
        loss, _ = rig.objective(rig.model, batch[0])
        saved = meter.live - meter.visiting
        loss.backward()
        peak = meter.peak
        here = ledger.terms["gradients"].tier == "device"
        assert storage_bytes([p.grad for p in rig.trainable().values() if p.grad is not None]) == (ledger.bytes("gradients") if here else 0)
    activations = {n: t.bytes for n, t in ledger.terms.items() if n.startswith("activations.")}
    forward = sum(b for n, b in activations.items() if "forward" in ledger.terms[n].moments)
    assert forward == pytest.approx(saved, rel=0.10), f"kept for the backward pass: predicted {activations}"
    static = ledger.bytes("adapter" if resting else "parameters") + (ledger.bytes("optimizer") if ledger.terms["optimizer"].tier == "device" else 0)
    static += ledger.bytes("weights in 8 bits")
    assert ledger.peak()[0] - static == pytest.approx(peak, rel=0.10), f"peak above weights and moments: predicted {activations}"


@pytest.mark.parametrize(("first", "second"), list(itertools.combinations(registry.names("train"), 2)))
def test_good_neighbour(first: str, second: str) -> None:
    rooms = room(first) | room(second)
    reasons = [r.refuses({n: o for n, o in rooms.items() if n != name}, make_rig({}).facts) for name, r in rooms.items()]
    if any(reasons):
        assert all(reason is None or len(reason) > 10 for reason in reasons), "a refusal says why"
        return
    rig = make_rig(rooms)
    before = exported(rig)
    first_loss = rig.step(random_batch(SPEC.vocab), 1e-2, 0).mean
    rig.step(random_batch(SPEC.vocab), 1e-2, 1)
    start = next((trained(make_rig(room(n)), 1) for n in ROUNDS if n in rooms), None) or plain()
    tolerance = 1e-3 if len({first, second} & set(ROUNDS)) == 2 else 1e-5
    assert first_loss == pytest.approx(start[0][0], rel=tolerance), "the first step starts from the same model"
    assert any(not torch.equal(t, before[n]) for n, t in exported(rig).items())


def test_every_room_loads_from_words() -> None:
    for name in registry.names("train"):
        key, value = next(iter(SMALL[name].items()))
        job = Job.load(overrides=[f"{name}.{key}={value}"])
        assert getattr(job.rooms[name], key) == value
