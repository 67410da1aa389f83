"""60 million parameters (960 MB of states) trained in 240 MB of device and host: bitwise, under the kernel's own limit, with bytes proven on disk."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

RUN = """
import resource, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from rigs import make_rig, random_batch
from lilliput.memory.meter import Meter
from lilliput.models.spec import DecoderSpec
from lilliput.train.infinity import Infinity
from lilliput.train.remat import Remat
BUDGET, STEPS, VOCAB = 240_000_000, 10, 8192
spec = DecoderSpec("llama", vocab=VOCAB, dim=512, layers=18, heads=8, kv_heads=8, head_dim=64, ffn=1376, context=64, tied=True)
shape = {"sequences": 1, "tokens": 64}
folder = sys.argv[1]
rooms = {"infinity": Infinity(parameters="disk", optimizer="disk", folder=folder), "remat": Remat(every=1)} if folder else {}
tiny = make_rig({}, **shape)
tiny.step(random_batch(64, micros=1, **shape), 1e-2, 0)  # libraries are loaded now
count = sum(int(torch.tensor(s).prod()) for s in spec.shapes().values())
if folder:
    there = next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmData"))
    resource.setrlimit(resource.RLIMIT_DATA, (there + BUDGET * 115 // 100,) * 2)
rig = make_rig(rooms, spec, **shape)
counted = lambda: {k: int(v) for k, v in (line.split(": ") for line in open("/proc/self/io").read().splitlines())}
before = counted()
for step in range(STEPS):
    batch = random_batch(VOCAB, micros=1, seed=step, **shape)
    with Meter(watch=rig.model.parameters() if folder else (), budget={"device": BUDGET} if folder else {}) as meter:
        sums = rig.step(batch, 1e-3, step)
    sys.stdout.write(f"{sums.loss.hex()} {sums.norm.hex()}\\n")
if folder:
    after, engine = counted(), rig.optimizer.tiers["first"].arena.engine
    sizes = {p.name: p.stat().st_size for p in Path(folder).iterdir()}
    told = after["read_bytes"] - before["read_bytes"], after["write_bytes"] - before["write_bytes"]
    sys.stderr.write(f"{count} parameters, peak {meter.peak}, read {told[0]} of {engine.read_bytes}, "
                     f"written {told[1]} of {engine.written_bytes}, files {sizes}\\n")
    assert told[0] >= 0.95 * engine.read_bytes and told[0] >= 24 * count * (STEPS - 1), "reads came from the disk"
    assert told[1] >= 0.95 * (engine.written_bytes - 4 * count), "writes reached it"
    assert sizes["first.bin"] == rig.optimizer.tiers["first"].arena.bytes < 8.1 * count
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA and /proc/self/io are Linux's")
def test_sixty_million_in_a_quarter_of_their_states(tmp_path: Path) -> None:
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[1]), environment.get("PYTHONPATH", "")])
    said = []
    for folder in (str(tmp_path / "scratch"), ""):
        answer = subprocess.run([sys.executable, "-c", RUN, folder], capture_output=True, text=True, timeout=500, env=environment, check=False)
        assert answer.returncode == 0, answer.stderr[-1500:]
        sys.stdout.write(answer.stderr)
        said.append(answer.stdout)
    assert said[0] == said[1] and len(said[0].splitlines()) == 10
