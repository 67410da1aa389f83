"""A plan is executed as it was simulated: the same bytes at the peak of every tier, the same bits in loss and gradients."""

from __future__ import annotations

import copy
import random
from pathlib import Path

import pytest
import torch
from nets import NETS, gpt, metered, mlp, run, same, traced
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from lilliput.base.errors import DoesNotFit, UserError
from lilliput.memory.capture import Recorder, capture
from lilliput.memory.execute import Executor
from lilliput.memory.lower import first_asked, lower
from lilliput.memory.meter import Meter
from lilliput.memory.plan import KEEP, RECOMPUTE, Decision
from lilliput.memory.profile import measure
from lilliput.memory.simulate import simulate
from lilliput.memory.stores import FileStore, HostStore
from lilliput.memory.trace import UNPACK, Trace


def drawn(trace: Trace, seed: int) -> dict[int, Decision]:
    """A random plan over everything a plan can say."""
    draw = random.Random(seed)
    asked, order = first_asked(trace), [k for kind, k in trace.events if kind == UNPACK]
    before = lambda s, most: order[max(0, order.index(asked[s]) - draw.randrange(most))]
    plan: dict[int, Decision] = {}
    for s in (s.index for s in trace.saved()):
        late = min(len(trace.packs) - 1, min(trace.storages[s].packs) + 3)
        plan[s] = draw.choice(
            [
                KEEP,
                RECOMPUTE,
                Decision("recompute", spans=((before(s, 10), None),)),
                Decision("page", "host"),
                Decision("page", "host", out=late, spans=((before(s, 5), None),)),
                Decision("page", "disk", out=draw.choice([None, late])),
            ]
        )
    others = [s.index for s in trace.storages if s.writers and not s.packs and s.writers[0] < trace.forwards]
    return plan | {s: KEEP for s in others if draw.random() < 0.1}


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("name", NETS)
def test_any_plan_is_executed_to_the_byte_and_to_the_bit(name: str, seed: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = NETS[name]()
    trace, funcs = traced(net)
    plain = run(net)
    plan = drawn(trace, seed) if seed else dict.fromkeys((s.index for s in trace.saved()), RECOMPUTE)
    stores = {"host": HostStore(), "disk": FileStore(tmp_path / "pages", {s.index: s.bytes for s in trace.saved()})}
    simulated, meter, outcome = metered(net, lower(trace, plan), funcs, stores)
    assert same(outcome, plain)
    assert (simulated.peak["device"], simulated.peak.get("host", 0)) == (meter.peak, meter.tiers.get("host", [0, 0])[1])
    assert meter.tiers.get("host", [0])[0] == 0, "nothing stays behind"
    assert (stores["host"].written, stores["disk"].written) == (simulated.moved.get("host", 0), simulated.moved.get("disk", 0))
    if seed == 0:
        assert simulated.peak["device"] < simulate(lower(trace, {})).peak["device"]
    stores["disk"].close()


@pytest.mark.parametrize("name", NETS)
def test_the_plain_run_is_simulated_to_the_byte(name: str) -> None:
    net = NETS[name]()
    trace, funcs = traced(net)
    simulated, meter, _ = metered(net, lower(trace, {}), funcs)
    assert simulated.peak["device"] == meter.peak


def test_what_runs_again_takes_the_numbers_of_its_own_step() -> None:
    """Dropout's keys differ from step to step: what was captured is the form of an operation, not its numbers."""
    net = gpt(dropout=0.5)
    trace, funcs = traced(net)
    executor = Executor(lower(trace, dict.fromkeys((s.index for s in trace.saved()), RECOMPUTE)), funcs)
    for step in (0, 7):
        net[0].counter.step = step
        assert same(run(net, executor), run(net))


def test_a_second_micro_batch_adds_to_gradients_that_are_there() -> None:
    model, step, inputs = mlp()
    trace, funcs = capture(model, step, inputs, gradients=True)
    simulated = simulate(lower(trace, {}), timeline=True)
    first = simulate(lower(traced((model, step, inputs))[0], {}), timeline=True)
    step(model, *inputs).backward()
    with Meter(known=[*model.parameters(), *(p.grad for p in model.parameters()), *inputs]) as meter:
        with Executor(lower(trace, {}), funcs).forward():
            loss = step(model, *inputs)
        loss.backward()
    weights = sum(p.nbytes for p in model.parameters())
    assert (simulated.peak["device"], simulated.timeline[-1][1]) == (meter.peak, meter.live) == (first.peak["device"], first.timeline[-1][1] - weights)


def test_halved_activations_are_counted_and_close() -> None:
    net = mlp(p=0.0)
    trace, funcs = traced(net)
    plain = run(net)
    plan = {s.index: Decision(codec="bf16") for s in trace.saved() if s.name.endswith("tanh")}
    simulated, meter, outcome = metered(net, lower(trace, plan), funcs)
    assert simulated.peak["device"] == meter.peak
    assert torch.equal(outcome[0], plain[0]) and not same(outcome, plain)
    for name, gradient in plain[1].items():
        torch.testing.assert_close(outcome[1][name], gradient, rtol=0.05, atol=2e-3)
    host = {s: Decision("page", "host", "bf16") for s in plan}
    simulated, meter, paged = metered(net, lower(trace, host), funcs, {"host": HostStore()})
    assert same(paged, outcome) and simulated.peak["host"] == meter.tiers["host"][1] == 16 * 16 * 32 * 2


def test_another_model_or_shape_is_refused() -> None:
    net = mlp()
    trace, funcs = traced(net)
    executor = Executor(lower(trace, {}), funcs)
    with pytest.raises(UserError, match="other tensors than planned"):
        run((net[0], net[1], [torch.randn(17, 32)]), executor)
    with pytest.raises(UserError, match="does not do what was planned"):
        run((nn.Sequential(*list(net[0])[:3], nn.Tanh()), net[1], net[2]), executor)
    with pytest.raises(UserError, match="ended early"), executor.forward():
        net[0][0](net[2][0])
    with torch.no_grad(), executor.forward():
        net[0](torch.randn(5, 32))  # an evaluation of any shape


def test_a_tensor_changed_after_it_was_saved_is_refused() -> None:
    def step(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
        y = model(x).exp()
        z = y * 2
        y.add_(1)
        return z.sum()

    with pytest.raises(UserError, match="changed after autograd saved it"):
        capture(nn.Linear(4, 4), step, [torch.randn(2, 4)])


def test_values_cannot_be_planned() -> None:
    with pytest.raises(UserError, match="reads the value"):
        capture(nn.Linear(4, 4), lambda m, x: m(x).sum() if float(x.sum()) > 0 else m(x).mean(), [torch.randn(2, 4)])


def test_a_budget_is_enforced_with_numbers() -> None:
    net = mlp(p=0.0)
    trace, funcs = traced(net)
    peak = simulate(lower(trace, {})).peak["device"]
    metered(net, lower(trace, {}), funcs, budget={"device": peak})
    with pytest.raises(DoesNotFit, match="an allocation of") as refused:
        metered(net, lower(trace, {}), funcs, budget={"device": peak - 1})
    assert f"{peak} bytes" in refused.value.fix


def test_plans_that_cannot_be_are_refused() -> None:
    trace, funcs = traced(NETS["shared"]())
    paged = {trace.saved()[0].index: Decision("page", "host")}
    with pytest.raises(UserError, match="no store"):
        Executor(lower(trace, paged), funcs)
    gradient = next(s.index for s in trace.storages if s.kind == "gradient")
    with pytest.raises(UserError, match="not a saved activation"):
        lower(trace, {gradient: RECOMPUTE})


def test_a_file_store_checks_the_disk_first(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no room"):
        FileStore(tmp_path / "pages", {0: 1 << 60})
    assert not (tmp_path / "pages").exists()


def test_measured_seconds_are_of_every_operation() -> None:
    model, step, inputs = mlp(layers=3)
    trace, _ = traced((model, step, inputs))
    measure(trace, lambda: step(model, *inputs), model.zero_grad, repeats=2)
    assert all(op.seconds > 0 for op in trace.ops if op.name != "detach")
    kinds = {(op.name, op.reads and trace.storages[op.reads[0]].bytes): op.seconds for op in trace.ops if op.name == "tanh"}
    assert len(kinds) == 1, "twins share their median"


def test_what_was_changed_in_place_later_runs_again_from_its_beginning() -> None:
    """exp reads the linear's output before tanh_ changes it: the kept result of tanh_ is no source for it."""

    def step(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
        a = model(x)
        b = (a * 2).exp()
        return (a.tanh_() * b).sum()

    torch.manual_seed(0)
    net = nn.Linear(8, 8), step, [torch.randn(4, 8)]
    trace, funcs = traced(net)
    plan = {s.index: RECOMPUTE for s in trace.saved() if s.name.endswith(" exp")}
    simulated, meter, outcome = metered(net, lower(trace, plan), funcs)
    assert plan and same(outcome, run(net)) and simulated.peak["device"] == meter.peak
    assert any(trace.ops[number].name == "addmm" for number in simulated.replayed)


def test_moving_averages_move_once() -> None:
    net = NETS["resnet18"]()
    twin = copy.deepcopy(net[0]), net[1], net[2]
    trace, funcs = traced(net)
    run(net, Executor(lower(trace, {s.index: RECOMPUTE for s in trace.saved()}), funcs))
    run(twin)
    assert all(torch.equal(a, b) for a, b in zip(net[0].buffers(), twin[0].buffers(), strict=True))


@pytest.mark.parametrize(("device", "expected"), [("cpu", True), ("cuda", False)])
def test_random_numbers_of_another_device_are_kept(device: str, expected: bool) -> None:
    """Only the CPU generator's state is saved: on a GPU (here a fake one) a drawn mask may not run again."""
    recorder = Recorder({})
    with FakeTensorMode(), recorder:
        nn.functional.dropout(torch.empty(2, 4, device=device), 0.5)
    drawn = [op for op in recorder.ops if op.random]
    assert drawn and all(op.replayable is expected for op in drawn)
