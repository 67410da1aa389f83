"""ZeRO-Infinity: from host or disk, whole or in tiles, the run is the plain one bit for bit, in fewer bytes of the device."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rigs import make_rig, random_batch

from lilliput.base.errors import DoesNotFit, UserError
from lilliput.memory.meter import Meter, storage_bytes
from lilliput.memory.planned import Planned
from lilliput.models.layers import Linear
from lilliput.models.sizes import PRESETS
from lilliput.models.spec import DecoderSpec
from lilliput.parallel.resident import Residents
from lilliput.parallel.rig import Rig
from lilliput.train.fp8 import Fp8
from lilliput.train.infinity import Infinity
from lilliput.train.lora import Lora
from lilliput.train.paged import Paged
from lilliput.train.poet import Poet
from lilliput.train.qlora import Qlora
from lilliput.train.remat import Remat

SPEC = PRESETS["tiny"]
TIED = DecoderSpec("llama", vocab=512, dim=64, layers=2, heads=2, kv_heads=1, head_dim=32, ffn=96, context=64, tied=True)
GPT = DecoderSpec("gpt2", vocab=300, dim=64, layers=2, heads=2, kv_heads=2, head_dim=32, ffn=96, context=64, tied=True, norm="layer", positions="learned",
                  activation="gelu", qkv_bias=True, o_bias=True, mlp_bias=True)  # fmt: skip


def run(rooms: dict, steps: int = 3, micros: int = 2, spec: DecoderSpec = SPEC, **how):
    rig = make_rig(rooms, spec, micro_batches=micros, **how)
    sums = [rig.step(random_batch(spec.vocab, seed=s, micros=micros), 1e-2, s) for s in range(steps)]
    held = rig.evaluate(random_batch(spec.vocab, seed=99)).loss
    return rig, [(s.loss, s.norm) for s in sums], held, {n: rig.weight(rig, n).clone() for n in rig.facts.shapes}


def assert_same(left, right) -> None:
    assert left[1] == right[1] and left[2] == right[2]
    assert all(torch.equal(left[3][n], t) for n, t in right[3].items())


def on_disk(folder: Path, **more) -> Infinity:
    return Infinity(parameters="disk", optimizer="disk", folder=str(folder), **more)


@pytest.mark.parametrize("spec", [SPEC, TIED, GPT], ids=["untied", "tied", "gpt"])
@pytest.mark.parametrize("micros", [1, 2])
def test_disk_is_the_plain_run(spec: DecoderSpec, micros: int, tmp_path: Path) -> None:
    assert_same(run({"infinity": on_disk(tmp_path)}, spec=spec, micros=micros, dropout=0.1), run({}, spec=spec, micros=micros, dropout=0.1))


@pytest.mark.parametrize(("parameters", "optimizer"), [("host", "disk"), ("disk", "host")])
def test_tiers_are_chosen_one_by_one(parameters: str, optimizer: str, tmp_path: Path) -> None:
    room = Infinity(parameters=parameters, optimizer=optimizer, folder=str(tmp_path))
    assert_same(run({"infinity": room}), run({}))
    names = {"parameters": ["parameters.bin"], "optimizer": ["first.bin", "gradients.bin", "second.bin"]}
    assert sorted(p.name for p in tmp_path.iterdir()) == names["parameters" if parameters == "disk" else "optimizer"]


def test_bf16_weights_are_rounded_by_the_same_bits(tmp_path: Path) -> None:
    assert_same(run({"infinity": on_disk(tmp_path)}, dtype="bf16"), run({}, dtype="bf16"))


AGAIN = {"every": {"remat": Remat(every=1)}, "selective": {"remat": Remat(plan="selective")}, "poet": {"poet": Poet(budget="1GB")}}


@pytest.mark.parametrize("other", AGAIN.values(), ids=AGAIN)
def test_what_runs_again_asks_for_its_parameters(other: dict, tmp_path: Path) -> None:
    assert_same(run({"infinity": on_disk(tmp_path), **other}), run({}))


def test_plans_leave_room_for_visitors_only(tmp_path: Path) -> None:
    rig = make_rig({"infinity": on_disk(tmp_path)})
    plain = make_rig({})
    vectors = sum(p.numel() for p in plain.model.parameters() if p.dim() == 1)
    rest = 4 * len(rig.trainable()) + 16 * 2 * 32 + 8  # norms of gradients that left; a step's tokens, targets and loss
    assert rig.standing() == rig.optimizer.residents.capacity + 4 * vectors + rest < plain.standing() / 3


class Visits(Meter):
    """Remembers the most bytes of watched storages."""

    most = 0

    def _look(self) -> None:
        super()._look()
        self.most = max(self.most, self.visiting)


def test_the_device_holds_what_visits(tmp_path: Path) -> None:
    rig = make_rig({"infinity": on_disk(tmp_path)})
    weights, residents = list(rig.model.parameters()), rig.optimizer.residents
    assert storage_bytes(weights) == 0
    largest = 4 * max(p.numel() for p in weights)
    vectors = 4 * sum(p.numel() for p in weights if p.dim() == 1)
    for step in range(2):
        batch = random_batch(SPEC.vocab, seed=step)
        with Visits(known=[t for m in batch for t in (m.tokens_BT, m.targets_BT)], watch=weights) as meter:
            rig.step(batch, 1e-2, step)
        assert largest < meter.most <= residents.capacity + vectors == 3 * largest + vectors
        assert storage_bytes(weights) == 0, "after an update nothing old is here"


def test_a_budget_that_visitors_break_is_refused(tmp_path: Path) -> None:
    rig = make_rig({"infinity": on_disk(tmp_path)})
    with pytest.raises(DoesNotFit), Meter(budget={"device": 20_000}, watch=rig.model.parameters()):
        rig.step(random_batch(SPEC.vocab), 1e-2, 0)


def test_order_is_learned_in_one_step(tmp_path: Path) -> None:
    rig = make_rig({"infinity": on_disk(tmp_path)})
    residents, waits, changes = rig.optimizer.residents, [], []
    for step in range(4):
        before = residents.waited, residents.retraced
        rig.step(random_batch(SPEC.vocab, seed=step), 1e-2, step)
        waits.append(residents.waited - before[0])
        changes.append(residents.retraced - before[1])
    assert waits[1:] == [waits[1]] * 3 and waits[1] <= waits[0] / 10, "only what nothing comes before is waited for"
    reads = residents.fetched
    rig.evaluate(random_batch(SPEC.vocab))  # another order: forward only
    rig.step(random_batch(SPEC.vocab), 1e-2, 4)
    assert residents.fetched > reads and residents.retraced >= changes[-1]


def test_another_order_is_learned_in_one_step_and_changes_no_bit(tmp_path: Path) -> None:
    """A model whose layers come in another order from step 4 on, and which leaves two of them out from step 8 on."""
    orders = [(0, 1, 2, 3)] * 4 + [(3, 1, 0, 2)] * 4 + [(1, 2)] * 4

    def trained(rooms: dict) -> tuple[Rig, list[tuple[float, float]], list[int], list[int]]:
        rig, found, waits, changes = make_rig(rooms), [], [], []
        layers, residents = dict(rig.model.layers.named_children()), rig.optimizer.residents if rooms else None
        for step, order in enumerate(orders):
            rig.model.layers._modules = {str(k): layers[str(k)] for k in order}  # what is gone over; names stay
            before = (residents.waited, residents.retraced) if residents else (0, 0)
            sums = rig.step(random_batch(SPEC.vocab, seed=step), 1e-2, step)
            found.append((sums.loss, sums.norm))
            waits.append(residents.waited - before[0] if residents else 0)
            changes.append(residents.retraced - before[1] if residents else 0)
        rig.model.layers._modules = layers
        return rig, found, waits, changes

    rig, found, waits, changes = trained({"infinity": on_disk(tmp_path)})
    plain, expected, _, _ = trained({})
    assert found == expected
    assert all(torch.equal(rig.weight(rig, n), p) for n, p in plain.model.named_parameters())
    assert waits[4] > waits[1] and [waits[k] for k in (2, 3, 5, 6, 7, 9, 10, 11)] == [waits[1]] * 8, "what nobody could know is waited for, once"
    assert [step for step in range(1, 12) if changes[step]] == [4, 8], "and the next step knows the new order"


def test_construction_holds_one_parameter_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, held, take = [], [], Residents.take

    def watched(self, name: str, make) -> torch.Tensor:
        before = storage_bytes(made)
        made.append(take(self, name, make))
        held.append(before + storage_bytes(made))
        return made[-1]

    monkeypatch.setattr(Residents, "take", watched)
    rig = make_rig({"infinity": on_disk(tmp_path)})
    assert len(held) == len(list(rig.model.parameters())) and set(held) == {0}
    assert all(t.nbytes == 4 * p.numel() for t, p in zip(made, rig.model.parameters(), strict=True))


def test_interrupted_runs_go_on_from_their_generation(tmp_path: Path) -> None:
    whole = run({"infinity": on_disk(tmp_path / "whole")}, steps=4)
    rig = make_rig({"infinity": on_disk(tmp_path / "cut")}, micro_batches=2)
    for step in range(3):
        rig.step(random_batch(SPEC.vocab, seed=step), 1e-2, step)
        if step == 1:
            (tmp_path / "saved").mkdir()
            rig.keeper.save(tmp_path / "saved", "after 2")
    assert list((tmp_path / "saved").iterdir()) == [], "what is on disk is not copied"
    for tier in rig.optimizer.tiers.values():
        tier.close()
    again = make_rig({"infinity": on_disk(tmp_path / "cut")}, micro_batches=2)
    again.keeper.restore(tmp_path / "saved", "after 2", 2)
    assert [again.step(random_batch(SPEC.vocab, seed=s), 1e-2, s).loss for s in (2, 3)] == [loss for loss, _ in whole[1][2:]]
    assert all(torch.equal(again.weight(again, n), t) for n, t in whole[3].items())


def test_a_new_run_over_an_old_ones_files_starts_anew(tmp_path: Path) -> None:
    old = make_rig({"infinity": on_disk(tmp_path)}, micro_batches=2)
    old.step(random_batch(SPEC.vocab, seed=7), 1e-2, 0)
    (tmp_path / "saved").mkdir()
    old.keeper.save(tmp_path / "saved", "old")
    for tier in old.optimizer.tiers.values():
        tier.close()
    assert_same(run({"infinity": on_disk(tmp_path)}), run({}))


def test_a_folder_is_one_runs(tmp_path: Path) -> None:
    rig = make_rig({"infinity": on_disk(tmp_path)})
    with pytest.raises(UserError, match="in use"):
        make_rig({"infinity": on_disk(tmp_path)})
    assert rig.optimizer.steps == 0


def test_a_gradient_that_is_not_finite_skips_the_update(tmp_path: Path) -> None:
    rig = make_rig({"infinity": on_disk(tmp_path)})
    before = {n: rig.weight(rig, n) for n in rig.facts.shapes}
    rig = replace(rig, objective=lambda model, micro: (model(micro.tokens_BT).sum() * float("inf"), 1))
    sums = rig.step(random_batch(SPEC.vocab), 1e-2, 0)
    assert sums.norm != sums.norm and rig.optimizer.steps == 0
    assert all(torch.equal(rig.weight(rig, n), t) for n, t in before.items())


# ---- beside others: weights that do not learn, and products in 8 bits


BESIDE = {
    "lora": {"lora": Lora(rank=4)}, "lora, dropout, remat": {"lora": Lora(rank=4, dropout=0.1), "remat": Remat(every=1)}, "qlora": {"qlora": Qlora(rank=4)},
    "fp8": {"fp8": Fp8()}, "fp8, remat": {"fp8": Fp8(), "remat": Remat(every=2)},
    "fp8, qlora, poet": {"fp8": Fp8(), "qlora": Qlora(rank=4), "poet": Poet(budget="1GB")},
    "qlora, paged": {"qlora": Qlora(rank=4), "paged": Paged(budget="1GB")},
}  # fmt: skip


@pytest.mark.parametrize("tier", ["host", "disk"])
@pytest.mark.parametrize("others", BESIDE.values(), ids=BESIDE)
def test_beside_others_it_is_the_run_in_memory(others: dict, tier: str, tmp_path: Path) -> None:
    learns = "lora" not in others and "qlora" not in others
    room = Infinity(parameters=tier, optimizer=tier if learns else "host", folder=str(tmp_path))
    away, memory = run({"infinity": room, **others}), run(others)
    assert_same(away, memory)
    trained, expected = away[0].trainable(), memory[0].trainable()
    assert learns or all(torch.equal(trained[n], p) for n, p in expected.items())
    frozen = [p for n, p in away[0].model.named_parameters() if n not in trained]
    assert sum(p.untyped_storage().nbytes() for p in frozen) <= away[0].visits, "what is frozen only visits"
    if tier == "disk":
        assert sorted(p.name for p in tmp_path.iterdir()) == (["first.bin", "gradients.bin", "parameters.bin", "second.bin"] if learns else ["parameters.bin"])


@pytest.mark.parametrize("others", [{"lora": Lora(rank=4)}, {"qlora": Qlora(rank=4)}, {"fp8": Fp8()}, {}], ids=lambda o: "+".join(o) or "alone")
def test_what_does_not_visit_is_simulated_to_the_byte(others: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    planned, inner = [], Planned.__init__
    monkeypatch.setattr(Planned, "__init__", lambda self, *how, **more: (planned.append(self), inner(self, *how, **more))[1])
    room = Infinity(parameters="disk", optimizer="host" if {"lora", "qlora"} & set(others) else "disk", folder=str(tmp_path))
    rig = make_rig({"infinity": room, "remat": Remat(every=1), **others}, micro_batches=2)
    weights = [p for n, p in rig.model.named_parameters() if rig.home(n).tier != "device"]
    readies = list(planned[-1].ready.values())  # a second micro-batch finds gradients, unless they leave
    assert len(readies) == (1 if rig.leaving() else 2)
    norms = rig.optimizer.norms.values() if rig.leaving() else ()
    for step in range(2):
        batch = random_batch(SPEC.vocab, seed=step, micros=2)
        known = [*rig.model.parameters(), *rig.model.buffers(), *norms, *(t for m in batch for t in (m.tokens_BT, m.targets_BT))]
        for number, micro in enumerate(batch):
            grads = [p.grad for p in rig.model.parameters() if p.grad is not None]
            with Meter(known=[*known, *grads]) as meter:
                loss, weight = rig.objective(rig.model, micro)
                (loss / weight).backward()
            assert meter.peak == readies[min(number, len(readies) - 1)].simulation.peak["device"]
            assert storage_bytes(weights) <= rig.visits
        rig.update(rig, 1e-2)


def test_an_adapters_run_goes_on_from_its_own_checkpoint(tmp_path: Path) -> None:
    rooms = lambda name: {"infinity": Infinity(parameters="disk", folder=str(tmp_path / name)), "qlora": Qlora(rank=4)}
    rig = make_rig(rooms("a"))
    assert rig.keeper is None and set(rig.optimizer.parameters) == set(rig.trainable())
    assert rig.optimizer.state().keys() == make_rig({"qlora": Qlora(rank=4)}).optimizer.state().keys()
    size = (tmp_path / "a" / "parameters.bin").stat().st_size
    frozen = [p for p in rig.model.parameters() if not p.requires_grad]
    assert size < 1.3 * sum(p.numel() * p.element_size() for p in frozen) + (1 << 20), "one generation of what never changes"


def test_tiles_of_codes_stand_for_the_same_weights() -> None:
    spec = DecoderSpec("llama", vocab=64, dim=256, layers=2, heads=4, kv_heads=4, head_dim=64, ffn=512, context=64, tied=True)
    whole, tiled = make_rig({"qlora": Qlora(rank=4)}, spec), make_rig({"qlora": Qlora(rank=4), "infinity": Infinity(tiles=4)}, spec)
    assert all(torch.equal(tiled.weight(tiled, n), whole.weight(whole, n)) for n in whole.facts.shapes)
    losses = [[rig.step(random_batch(64, seed=s), 1e-2, s).loss for s in range(3)] for rig in (whole, tiled)]
    assert losses[0][0] == losses[1][0] and losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert "share scales" in Infinity(tiles=64).refuses({"qlora": Qlora()}, whole.facts)


# ---- tiles


def test_tiles_change_no_output_and_no_weight_gradient() -> None:
    torch.manual_seed(0)
    whole, x = Linear(256, 2048, bias=True), torch.randn(2, 64, 256, requires_grad=True)
    for p in whole.parameters():
        torch.nn.init.normal_(p)
    y = whole(x)
    y.backward(g := torch.randn_like(y))
    dx, x.grad = x.grad, None
    for count in (2, 4, 16):
        cut = Linear(256, 2048, bias=True)
        cut.split(count)
        for tile, rows, bias in zip(cut.tiles, whole.weight.detach().chunk(count), whole.bias.detach().chunk(count), strict=True):
            tile.weight.data.copy_(rows)
            tile.bias.data.copy_(bias)
        z = cut(x)
        z.backward(g)
        assert torch.equal(z, y)
        assert torch.equal(torch.cat([tile.weight.grad for tile in cut.tiles]), whole.weight.grad)
        assert torch.equal(torch.cat([tile.bias.grad for tile in cut.tiles]), whole.bias.grad)
        assert 0 < float((x.grad - dx).norm() / dx.norm()) <= 1e-6
        x.grad = None


def test_tiles_start_from_the_same_weights_and_stay_near(tmp_path: Path) -> None:
    tiled, plain = run({"infinity": on_disk(tmp_path, tiles=4)}), run({})
    fresh = make_rig({})
    assert tiled[1][0][0] == plain[1][0][0], "the first forward pass is bitwise the plain one"
    assert [loss for loss, _ in tiled[1]] == pytest.approx([loss for loss, _ in plain[1]], rel=1e-5)
    rig = make_rig({"infinity": Infinity(tiles=4)})
    assert all(torch.equal(rig.weight(rig, n), p.detach()) for n, p in fresh.model.named_parameters())


def widest(tiles: int, cap: int, rows: int = 8) -> int:
    """The widest MLP of a block whose step is not refused when no piece of memory is larger than `cap`."""
    width = 0
    for ffn in (64, 128, 256, 512, 1024, 2048):
        spec = DecoderSpec("llama", vocab=32, dim=64, layers=1, heads=2, kv_heads=2, head_dim=32, ffn=ffn, context=32)
        rig = make_rig({"infinity": Infinity(tiles=tiles)} if tiles > 1 else {}, spec, sequences=1, tokens=rows)
        try:
            with Meter(watch=rig.model.parameters(), contiguous=cap):
                rig.step(random_batch(32, micros=1, sequences=1, tokens=rows), 1e-2, 0)
        except DoesNotFit as refused:
            assert "in one piece" in refused.what
            break
        width = ffn
    return width


def test_a_sixteenth_of_a_layer_in_one_piece() -> None:
    """A device without a larger free piece than a sixteenth of the MLP refuses the layer as it is and takes it in 16 tiles."""
    spec = DecoderSpec("llama", vocab=32, dim=64, layers=1, heads=2, kv_heads=2, head_dim=32, ffn=1024, context=32)
    cap = 4 * spec.dim * spec.ffn // 16
    for tiles, fits in ((1, False), (16, True)):
        rig = make_rig({"infinity": Infinity(tiles=tiles)}, spec, sequences=1, tokens=4)
        with nullcontext() if fits else pytest.raises(DoesNotFit, match="in one piece"), Meter(watch=rig.model.parameters(), contiguous=cap):
            rig.step(random_batch(32, micros=1, sequences=1, tokens=4), 1e-2, 0)


def test_tiles_make_layers_eight_times_wider_in_the_same_contiguous_bytes() -> None:
    cap = 4 * 64 * 64
    assert widest(1, cap) == 64
    assert widest(16, cap) >= 8 * 64


def test_refusals(tmp_path: Path) -> None:
    facts = make_rig({}).facts
    assert "infinity.folder" in Infinity(parameters="disk").refuses({}, facts)
    assert "does not divide" in Infinity(tiles=7).refuses({}, facts)
    assert "gradients" in Infinity().refuses({"offload": object()}, facts) and "moments" in Infinity().refuses({"paged": object()}, facts)
    assert "one scale" in Infinity(tiles=2).refuses({"fp8": object()}, facts)
    assert "the adapter's" in Infinity(optimizer="disk", folder="x").refuses({"qlora": object()}, facts)
    assert Infinity(tiles=2).refuses({"remat": object()}, facts) is None


def test_a_disk_without_room_is_refused_before_anything_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lilliput.dist import arena

    usage = arena.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(arena.shutil, "disk_usage", lambda path: usage._replace(free=1 << 20))
    with pytest.raises(UserError, match="no room") as fault:
        make_rig({"infinity": on_disk(tmp_path)})
    assert "1 MiB (1,048,576) are free" in fault.value.why and list(tmp_path.iterdir()) == []
