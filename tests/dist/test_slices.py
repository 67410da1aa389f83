"""Tensors split over ranks: the same bits, and a link for each rank. Ranks are processes that talk over the loopback; links are played by the throttle."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

RANK = """
import json, sys, time
from pathlib import Path
import torch, torch.distributed as dist
from lilliput.dist.engine import Engine
from lilliput.dist.slices import Slices
from lilliput.dist.tiers import DiskTier
torch.set_num_threads(1)
folder, rank, ranks, count, speed = Path(sys.argv[1]), *map(int, sys.argv[2:])
dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=ranks)
shapes = {f"w{k}": (count + k, torch.float32) for k in range(3)}
values = {name: torch.randn(n, generator=torch.Generator().manual_seed(k)) for k, (name, (n, _)) in enumerate(shapes.items())}
engine = Engine(threads=2, block=1 << 20)
slices = Slices(lambda parts: DiskTier(parts, engine, folder / f"{rank}.bin"), shapes)
owned = DiskTier(shapes, engine, folder / f"owner{rank}.bin")
for k, (name, value) in enumerate(values.items()):
    slices.write(name, value)
    if k % ranks == rank:
        owned.write(name, value).result()
        owned.turn(name)
engine.throttle.speed = float(speed)

def from_owner(k, name):
    whole = torch.empty(shapes[name][0])
    if k % ranks == rank:
        owned.read(name, whole).result()
    dist.broadcast(whole, k % ranks)
    return whole

def fetched(get):
    dist.barrier()
    begin = time.perf_counter()
    same = all(torch.equal(get(k, name), values[name]) for k, name in enumerate(shapes))
    return time.perf_counter() - begin, same

moved = engine.read_bytes
found = {"slices": fetched(lambda k, name: slices.gather(name))}
moved = engine.read_bytes - moved
found["owner"] = fetched(from_owner)

def ahead(k, name):
    for coming in list(shapes)[k : k + 2]:
        slices.begin(coming)
    return slices.gather(name)

found["ahead"] = fetched(ahead)
if rank == 0:
    print(json.dumps({"moved": moved, **found}))
dist.destroy_process_group()
"""


def fetched(folder: Path, ranks: int, count: int, speed: int) -> dict:
    """What rank 0 says of three tensors of `count` numbers behind links of `speed` bytes/s."""
    folder.mkdir()
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    command = lambda rank: [sys.executable, "-c", RANK, str(folder), str(rank), str(ranks), str(count), str(speed)]
    running = [subprocess.Popen(command(k), env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for k in range(ranks)]
    answers = [process.communicate(timeout=100) for process in running]
    assert all(process.returncode == 0 for process in running), answers[0][1][-800:]
    return json.loads(answers[0][0])


def test_every_rank_gets_the_whole_from_its_own_part(tmp_path: Path) -> None:
    found = fetched(tmp_path / "two", 2, 300_001, 0)
    assert all(found[way][1] for way in ("slices", "owner", "ahead"))
    assert found["moved"] < 1.02 * 3 * 4 * 300_001 / 2, "a rank reads its half"


@pytest.mark.slow
def test_a_fetch_takes_its_share_of_the_time(tmp_path: Path) -> None:
    """Three tensors of 4 MB behind links of 4 MB/s."""
    seconds = {ranks: fetched(tmp_path / str(ranks), ranks, 1_000_000, 4_000_000) for ranks in (1, 2, 4)}
    one = seconds[1]["slices"][0]
    sys.stdout.write(json.dumps({ranks: {way: round(found[way][0], 2) for way in ("owner", "slices", "ahead")} for ranks, found in seconds.items()}) + "\n")
    assert one / seconds[2]["slices"][0] >= 1.7 and one / seconds[4]["slices"][0] >= 3
    assert all(found["owner"][0] >= 0.9 * one for found in seconds.values()), "an owner's link is one link"
