"""ZeRO-Offload: the bits of the same mixed precision in one memory, the delayed schedule by its definition, every byte of the link and of the device."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from rigs import ADAMW, make_rig, random_batch

from lilliput.base.errors import UserError
from lilliput.memory.meter import Meter, storage_bytes
from lilliput.models.sizes import PRESETS
from lilliput.ops.adamw import Rule, update
from lilliput.parallel.rig import Rig, next_token
from lilliput.plan.estimate import training_ledger
from lilliput.train.offload import Offload
from lilliput.train.remat import Remat

SPEC = PRESETS["tiny"]
TWO = replace(PRESETS["llama-3m"], layers=2)


def rate(step: int) -> float:
    return 1e-2 * (1 + math.cos(step / 10))


class Reference:
    """Mixed-precision AdamW in one memory: bf16 weights, fp32 masters and moments."""

    def __init__(self) -> None:
        self.model, self.steps = make_rig({}).model, 0
        self.master = {n: p.detach().clone() for n, p in self.model.named_parameters()}
        self.first, self.second = ({n: torch.zeros_like(t) for n, t in self.master.items()} for _ in range(2))
        for p in self.model.parameters():
            p.data = p.data.bfloat16()

    def gradients(self, step: int, micros: int) -> tuple[float, dict[str, torch.Tensor], float]:
        """(loss sum, gradients, norm) of a step's batch; several micro-batches are summed in fp32."""
        batch, total, found = random_batch(SPEC.vocab, seed=step, micros=micros), 0.0, {}
        for m in batch:
            loss = next_token(self.model, m)[0]
            (loss / sum(m.weight for m in batch)).backward()
            total += loss.item()
            for n, p in self.model.named_parameters():
                found[n] = p.grad if micros == 1 else found[n] + p.grad if n in found else p.grad.float()
                p.grad = None
        norms = [torch.linalg.vector_norm(g, dtype=torch.float32) for g in found.values()]
        return total, found, torch.linalg.vector_norm(torch.stack(norms)).item()

    def apply(self, gradients: dict[str, torch.Tensor], norm: float, lr: float, predict: bool = False) -> None:
        """predict: the model computes with what this update leads to when it is made twice."""
        self.steps += 1
        for n, p in self.model.named_parameters():
            rule, before = Rule(lr, ADAMW["betas"], ADAMW["eps"], ADAMW["weight_decay"] if p.dim() >= 2 else 0.0, self.steps), self.master[n].clone()
            update(self.master[n], gradients[n].float() * min(1.0, 1.0 / (norm + 1e-6)), self.first[n], self.second[n], rule, 0)
            p.data.copy_(self.master[n] + (self.master[n] - before) if predict else self.master[n])


def run(rig: Rig, steps: Sequence[int], micros: int = 1) -> list[tuple[float, float]]:
    """(loss sum, norm) of each step."""
    found = [rig.step(random_batch(SPEC.vocab, seed=s, micros=micros), rate(s), s) for s in steps]
    return [(sums.loss, sums.norm) for sums in found]


def same(rig: Rig, reference: Reference) -> bool:
    weights = all(torch.equal(p, q) for p, q in zip(rig.model.parameters(), reference.model.parameters(), strict=True))
    return weights and all(torch.equal(rig.weight(rig, n), t) for n, t in reference.master.items())


@pytest.mark.parametrize("micros", [1, 3])
def test_a_hundred_steps_are_those_of_one_memory_and_the_link_carries_four_bytes_a_parameter(micros: int) -> None:
    rig, reference, steps = make_rig({"offload": Offload(tile=4096)}, micro_batches=micros), Reference(), range(100 if micros == 1 else 20)
    expected = []
    for step in steps:
        loss, gradients, norm = reference.gradients(step, micros)
        reference.apply(gradients, norm, rate(step))
        expected.append((loss, norm))
    assert run(rig, steps, micros) == expected
    assert same(rig, reference)
    count = sum(p.numel() for p in rig.model.parameters())
    assert rig.optimizer.down.moved == 2 * count * micros * len(steps) and rig.optimizer.up.moved == 2 * count * len(steps)
    assert any(norm > 1.0 for _, norm in expected), "some of these steps were clipped"


@pytest.mark.parametrize(("delay", "micros"), [(1, 1), (4, 1), (3, 2)])
@pytest.mark.parametrize("predict", [False, True])
def test_delayed_is_the_papers_schedule(predict: bool, delay: int, micros: int) -> None:
    """predict: the same schedule, and the weights that gradients are taken at have the last update added once more."""
    rig, reference = make_rig({"offload": Offload(delay=delay, tile=8192, predict=predict)}, micro_batches=micros), Reference()
    waiting, expected = None, []
    for step in range(12):
        loss, gradients, norm = reference.gradients(step, micros)
        expected.append((loss, norm))
        if waiting is not None:
            reference.apply(*waiting, predict)  # of the step before, after this one's gradients were taken without it
        waiting = (gradients, norm, rate(step))
        if step + 1 < delay:
            reference.apply(*waiting)
            waiting = None
    assert run(rig, range(12), micros) == expected
    assert same(rig, reference) and rig.optimizer.pending is not None
    rig.flush(rig)
    reference.apply(*waiting)
    assert same(rig, reference) and rig.optimizer.pending is None
    assert rig.optimizer.steps == 12
    plain = make_rig({"offload": Offload()}, micro_batches=micros)
    assert [norm for _, norm in run(plain, range(12), micros)] != [norm for _, norm in expected], "a delay is another schedule"


@pytest.mark.parametrize("micros", [1, 2])
def test_new_weights_go_up_as_soon_as_the_backward_pass_is_done_with_the_old_ones(micros: int) -> None:
    rig, forward, end = make_rig({"offload": Offload(delay=1)}, micro_batches=micros), [], []
    host = rig.optimizer
    begin, receive = host.begin, host.receive

    def begun(count: int) -> None:
        begin(count)
        if host.working is not None:
            host.working.result()  # nothing waits for the update, so what is sent depends on the backward pass alone

    host.begin = begun
    host.receive = lambda: (end.append(len(host.sent)), receive())
    rig.model.register_forward_pre_hook(lambda *_: forward.append(len(host.sent)))
    run(rig, range(3), micros)
    assert end == [0, len(host.parameters), len(host.parameters)], "all of them, before the step was over"
    assert forward == [0] * 3 * micros, "none while a micro-batch was still to come"


@pytest.mark.parametrize("knobs", [{}, {"delay": 3}], ids=["plain", "delayed"])
def test_a_restored_run_goes_on_bitwise(knobs: dict) -> None:
    whole, first, second = (make_rig({"offload": Offload(**knobs)}) for _ in range(3))
    expected = run(whole, range(8))
    assert run(first, range(5)) == expected[:5]
    state = {n: t.clone() for n, t in first.optimizer.state().items()}
    assert ("pending.numbers" in state) == bool(knobs)
    for p, q in zip(second.model.parameters(), first.model.parameters(), strict=True):
        p.data.copy_(q)
    second.optimizer.restore(state, first.optimizer.steps)
    assert run(second, range(5, 8)) == expected[5:]
    assert all(torch.equal(whole.optimizer.masters[n], t) for n, t in second.optimizer.masters.items())


def test_summed_gradients_that_wait_are_restored_exactly() -> None:
    first, second = (make_rig({"offload": Offload(delay=1)}) for _ in range(2))  # made for one micro-batch, given two
    run(first, range(2), micros=2)
    second.optimizer.restore(first.optimizer.state(), first.optimizer.steps)
    assert all(torch.equal(t, second.optimizer.pending.gradients[n]) and t.dtype == torch.float32 for n, t in first.optimizer.pending.gradients.items())


@pytest.mark.parametrize("delay", ["off", 1])
def test_a_gradient_that_is_not_finite_skips_its_update_and_no_other(delay: str | int) -> None:
    rig, reference = make_rig({"offload": Offload(delay=delay)}), Reference()
    factor = lambda: math.nan if rig.counter.step == 2 else 1.0
    rig = replace(rig, objective=lambda model, micro, inner=rig.objective: (inner(model, micro)[0] * factor(), micro.weight))
    norms = [norm for _, norm in run(rig, range(4))]
    assert [math.isfinite(norm) for norm in norms] == [True, True, False, True]
    rig.flush(rig)
    assert rig.optimizer.steps == 3 and all(p.isfinite().all() for p in rig.model.parameters())
    if delay == "off":
        for step in (0, 1, 3):
            reference.apply(*reference.gradients(step, 1)[1:], rate(step))
        assert same(rig, reference)


def test_the_device_holds_two_bytes_a_parameter_and_the_gradients_on_their_way() -> None:
    """C3: what stays is 2 bytes a parameter of 16; beside activations only the gradient being made and the one that leaves."""
    rig = make_rig({"offload": Offload()}, TWO, sequences=1, tokens=16)
    count = sum(p.numel() for p in rig.model.parameters())
    assert storage_bytes(rig.model.parameters()) == 2 * count
    host = rig.optimizer
    assert storage_bytes(host.state().values()) == 12 * count and storage_bytes(host.gradients.sums.values()) == 2 * count
    batch = random_batch(TWO.vocab, micros=1, sequences=1, tokens=16)
    alive: list[int] = []
    inner = host._leave
    with Meter(known=[*rig.model.parameters(), *host.held(), batch[0].tokens_BT, batch[0].targets_BT]) as meter:
        host._leave = lambda name, p: (inner(name, p), alive.append(host.leaving[1].nbytes))[0]
        rig.step(batch, 1e-2, 0)
        after = meter.live
    assert all(p.grad is None for p in rig.model.parameters())
    assert max(alive) == 2 * max(p.numel() for p in rig.model.parameters()), "one gradient at a time"
    assert after <= 64, "nothing stays on the device but the step's own scalars"


@pytest.mark.parametrize("delay", ["off", 5])
@pytest.mark.parametrize("micros", [1, 2])
def test_the_ledger_knows_the_host_to_the_byte(delay: str | int, micros: int) -> None:
    rooms = {"offload": Offload(delay=delay, tile=4096)}
    rig = make_rig(rooms, TWO, micro_batches=micros)
    ledger = training_ledger(rig.facts, rig.site, rooms, "fp32", micros)
    host = rig.optimizer
    halves = [half.sums for half in (host.gradients, host.spare) if half is not None]
    assert ledger.bytes("gradients") == storage_bytes(t for sums in halves for t in sums.values())
    staged = [*host.stages, *host.rounded.values(), *([] if host.landing is None else [host.landing])]
    assert ledger.bytes("staged copies") == storage_bytes(staged)
    assert ledger.peak("host")[0] - ledger.bytes("norms") == storage_bytes(host.held())
    for step in range(2):
        rig.step(random_batch(TWO.vocab, micros=micros, seed=step), 1e-2, step)
    rig.flush(rig)
    assert (host.down.moved + host.up.moved) / 2 == ledger.terms["link"].traffic == 2 * sum(p.numel() for p in rig.model.parameters()) * (micros + 1)


@pytest.mark.parametrize("tokens", [64, 256])
def test_with_recomputation_bytes_are_as_simulated_and_bits_as_without(tokens: int) -> None:
    shape = {"sequences": 2, "tokens": tokens}
    rooms = {"offload": Offload(), "remat": Remat(every=1)}
    rig, plain = make_rig(rooms, TWO, **shape), make_rig({"offload": Offload()}, TWO, **shape)
    batch = random_batch(TWO.vocab, micros=1, **shape)
    with Meter(known=[*rig.model.parameters(), *rig.optimizer.held(), batch[0].tokens_BT, batch[0].targets_BT]) as meter:
        loss, _ = rig.objective(rig.model, batch[0])
        (loss / batch[0].weight).backward()
        peak = meter.peak
    rig.optimizer.norm()
    rig.optimizer.zero_grad()
    assert peak == rig.plan.predicted["device peak"]
    assert [rig.step(batch, 1e-2, 0), rig.step(batch, 1e-2, 1)] == [plain.step(batch, 1e-2, 0), plain.step(batch, 1e-2, 1)]


def test_moments_and_masters_go_on_in_torchs_adamw() -> None:
    rig, reference = make_rig({"offload": Offload()}), Reference()
    run(rig, range(3))
    host = rig.optimizer
    weights = {n: torch.nn.Parameter(t.clone()) for n, t in host.masters.items()}
    groups = [{"params": [w], "weight_decay": 0.1 if w.dim() >= 2 else 0.0} for w in weights.values()]
    theirs = torch.optim.AdamW(groups, lr=rate(3), fused=True, betas=ADAMW["betas"], eps=ADAMW["eps"])
    saved = {n: t.clone() for n, t in host.state().items()}
    state = {i: {"step": torch.tensor(3.0), "exp_avg": saved[f"first.{n}"], "exp_avg_sq": saved[f"second.{n}"]} for i, n in enumerate(weights)}
    theirs.load_state_dict({"state": state, "param_groups": theirs.state_dict()["param_groups"]})
    for p, q in zip(reference.model.parameters(), rig.model.parameters(), strict=True):
        p.data.copy_(q)
    _, gradients, norm = reference.gradients(3, 1)
    for n, w in weights.items():
        w.grad = gradients[n].float() * min(1.0, 1.0 / (norm + 1e-6))
    theirs.step()
    run(rig, [3])
    for n, w in weights.items():
        torch.testing.assert_close(host.masters[n], w.detach(), rtol=1e-5, atol=1e-7)
    kinds, kept = {"first": "exp_avg", "second": "exp_avg_sq"}, theirs.state_dict()["state"]
    back = {f"{kind}.{n}": kept[i][key] for i, n in enumerate(weights) for kind, key in kinds.items()}
    again = make_rig({"offload": Offload()})
    again.optimizer.restore(back | {f"master.{n}": w.detach() for n, w in weights.items()}, 4)
    for p, w in zip(again.model.parameters(), weights.values(), strict=True):
        p.data.copy_(w.detach())
    assert run(again, [4])[0] == pytest.approx(run(rig, [4])[0], rel=1e-4)
    for n, w in host.masters.items():
        torch.testing.assert_close(again.optimizer.masters[n], w, rtol=0, atol=1e-3)  # a step is twenty times that


def test_a_slow_link_changes_no_bit() -> None:
    fast, slow = make_rig({"offload": Offload(delay=2)}), make_rig({"offload": Offload(delay=2, link="50MB", tile=4096)})
    assert run(fast, range(4)) == run(slow, range(4))
    assert slow.optimizer.down.throttle.speed == 50e6


@pytest.mark.parametrize(
    ("room", "others", "words"),
    [
        (Offload(), {"lora": None}, "adapter"), (Offload(), {"qlora": None}, "adapter"), (Offload(delay=0), {}, "count from 1"),
        (Offload(link="0GB"), {}, "moves nothing"),
    ],
)  # fmt: skip
def test_refusals(room: Offload, others: dict, words: str) -> None:
    assert words in room.refuses(others, make_rig({}).facts)


def test_a_link_that_is_no_number_is_the_users_fault() -> None:
    with pytest.raises(UserError, match="no number of bytes"):
        Offload(link="fast").refuses({}, make_rig({}).facts)
