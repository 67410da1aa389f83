"""Swap space with a file behind it: what comes back is what went out, whichever tier it lay in."""

from __future__ import annotations

import errno
import os
import random
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from adapters import lowered
from served import SPECS, engine_of, model_of, prompts_of

from lilliput.base.errors import UserError
from lilliput.ops import native
from lilliput.serve import costs as module
from lilliput.serve.blocks import BLOCK, BlockPool, Table
from lilliput.serve.costs import Costs
from lilliput.serve.request import Sampling
from lilliput.serve.runners.mover import Mover, Swap
from lilliput.serve.runners.slot_file import SlotFile
from lilliput.serve.scheduler import Group, Moves, Seq

compiled = pytest.mark.skipif(native.module() is None, reason=str(native.missing()))


def test_low_slots_come_first() -> None:
    """So memory is full before the file is written, and is filled again when it has room."""
    pool = BlockPool(8, swap=6)
    tables = [Table() for _ in range(3)]
    for table in tables:
        pool.grow(table, 2 * BLOCK)
        table.length = 2 * BLOCK
    moved = [[slot for _, slot in pool.swap_out([table])] for table in tables]
    assert moved == [[0, 1], [2, 3], [4, 5]]
    pool.swap_in([tables[0]])
    assert [slot for _, slot in pool.swap_out([tables[0]])] == [0, 1]


@pytest.mark.parametrize("seed", range(4))
def test_blocks_come_back_from_both_tiers(seed: int, tmp_path: Path) -> None:
    """Random moves of areas of several types and shapes, beside a plain list of what each slot must hold."""
    draw = random.Random(seed)
    areas = [torch.randn(10, 3, 5), torch.randint(0, 256, (10, 7), dtype=torch.uint8), torch.randn(10, 2, 2).half()]
    mover = Mover(areas, Swap(draw.randrange(0, 4), 5, str(tmp_path)))
    assert list(tmp_path.iterdir()) == [], "the file has no name"
    held: dict[int, list[torch.Tensor]] = {}
    for _ in range(60):
        slots = draw.sample(range(mover.swap.total), draw.randrange(1, mover.swap.total + 1))
        blocks = draw.sample(range(10), len(slots))
        if draw.random() < 0.5:
            mover.move(Moves(out=list(zip(blocks, slots))))
            held |= {slot: [area[block].clone() for area in areas] for block, slot in zip(blocks, slots)}
            for area in areas:
                area[blocks] = torch.randint(0, 9, area[blocks].shape).to(area.dtype)
        else:
            known = [(slot, block) for slot, block in zip(slots, blocks) if slot in held]
            mover.move(Moves(back=known))
            assert all(torch.equal(area[block], kept) for slot, block in known for area, kept in zip(areas, held[slot]))


@pytest.mark.parametrize("host", [0, 32, 64])
@pytest.mark.parametrize(("runner", "kv"), [("eager", "fp32"), pytest.param("native", "fp32", marks=compiled), pytest.param("native", "int8", marks=compiled)])
def test_answers_go_on_from_the_file(runner: str, kv: str, host: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written, read = [], []
    for name, seen in (("write", written), ("read", read)):
        plain = getattr(SlotFile, name)
        monkeypatch.setattr(SlotFile, name, lambda self, slots, *rest, plain=plain, seen=seen: (seen.extend(slots), plain(self, slots, *rest))[1])
    model, prompts, how = model_of("wide"), prompts_of(6, seed=8), Sampling(40, ignore_eos=True)
    assert SPECS["wide"] is model.spec
    made = lowered(model) if runner == "native" else model
    roomy = engine_of(made, kv_tokens=2048, kv=kv)
    tight = engine_of(made, kv_tokens=160, kv=kv, preemption="swap", swap_tokens=host, swap_file_tokens=1024, swap_folder=str(tmp_path))
    expected = [done.tokens for done in roomy.generate(prompts, how)]
    assert [done.tokens for done in tight.generate(prompts, how)] == expected
    assert tight.scheduler.preempted["swap"] > 0 and tight.pool.swap_free == tight.pool.swap_total == host // BLOCK + 64
    assert written and read, "the file was never needed"


def test_a_full_disk_or_no_folder_is_found_at_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="no swap file"):
        engine_of(model_of("llama"), swap_file_tokens=64, swap_folder=str(tmp_path / "file" / "none"))
    with monkeypatch.context() as patch, pytest.raises(UserError) as error:
        patch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=1000))
        engine_of(model_of("llama"), swap_file_tokens=64, swap_folder=str(tmp_path))
    assert "4 blocks need" in error.value.why and "(1,000) are free" in error.value.why

    def full(*arguments: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(UserError, match="no swap file"):
        engine_of(model_of("llama"), swap_file_tokens=64, swap_folder=str(tmp_path))


def test_a_damaged_slot_is_named_and_not_used(tmp_path: Path) -> None:
    file = SlotFile(str(tmp_path), 3, 5000)
    rows = torch.randint(0, 256, (2, 5000), dtype=torch.uint8)
    file.write([2, 0], rows)
    assert torch.equal(file.read([0, 2]), rows.flip(0))
    inner = file._arena
    os.pwrite(os.open(f"/proc/self/fd/{inner.file.handle}", os.O_RDWR), b"damage", inner.places["2"][0] + 100)
    assert torch.equal(file.read([0]), rows[1:])
    with pytest.raises(UserError, match="damaged"):
        file.read([2])


class Slow:
    """A runner whose blocks cost one second in memory, ten in the file that begins at slot `host`."""

    def __init__(self, host: int) -> None:
        self.host, self.now = host, 0.0

    def perf_counter(self) -> float:
        return self.now

    def move(self, moves: Moves) -> None:
        self.now += sum(1 if slot < self.host else 10 for _, slot in moves.out)


@pytest.mark.parametrize(
    ("host", "token", "way"), [(8, 0.15, "swap"), (8, 0.13, "recompute"), (4, 0.70, "swap"), (4, 0.66, "recompute"), (0, 1.3, "recompute")]
)
def test_the_file_is_dearer(host: int, token: float, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """100 tokens are 7 blocks. Four in memory and three in the file: 2 x 34 seconds against 100 tokens."""
    pool, group = BlockPool(20, swap=9), Group(0, 100, 1, 20, (0, 0))
    table = Table()
    pool.grow(table, 100)
    table.length = 100
    group.seqs.append(Seq(0, group, [1] * 100, table))
    runner = Slow(host)
    monkeypatch.setattr(module, "time", runner)
    costs = Costs(pool, runner, "auto", host)  # type: ignore[arg-type]
    costs.step(100, 100 * token)
    assert costs.choose(group) == way
