"""The kernel's own limit as the judge: under RLIMIT_DATA = what is there + 1.15 x the planned bytes the plan finishes and the plain run does not.

glibc keeps freed blocks below its mmap threshold in its heap, which a limit on data counts: a job with a budget sets it low where there is such
a limit (base.hardware.few_holes), else holes cost more than 15 %.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

RUN = """
import resource, sys
import torch
torch.set_num_threads(1)
from dataclasses import replace
from lilliput.base import hardware
from rigs import make_rig, random_batch
from lilliput.base.errors import DoesNotFit
from lilliput.models.sizes import PRESETS
from lilliput.train.remat import Remat
spec, shape = replace(PRESETS["llama-3m"], layers=16), {"sequences": 16, "tokens": 256}
try:
    make_rig({"remat": Remat(budget="1B")}, spec, **shape)
except DoesNotFit as refused:
    budget = refused.needs * 5 // 4
rig = make_rig({"remat": Remat(budget=f"{budget}B")}, spec, **shape)
peak = int(rig.plan.predicted["device peak"])
if sys.argv[1] == "plain":
    rig = make_rig({}, spec, **shape)
tiny, batch = (random_batch(65, micros=1, sequences=s, tokens=t) for s, t in ((1, 8), (16, 256)))
rig.objective(rig.model, tiny[0])[0].backward()  # libraries are loaded now
rig.model.zero_grad()
there = next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmData"))
assert sys.argv[1] == "with holes" or hardware.few_holes(peak) is None
resource.setrlimit(resource.RLIMIT_DATA, (there + peak * 115 // 100,) * 2)
try:
    rig.schedule(rig, batch, batch[0].weight)
    sys.stdout.write("finished")
except RuntimeError as error:
    sys.stdout.write("refused" if "allocate memory" in str(error) else str(error))
"""


JOB = """
import resource, sys
from pathlib import Path
import torch
from lilliput.base import hardware
from lilliput.base.job import Job
from lilliput.base.show import Show
from lilliput.loops.train import train
from lilliput.memory import outside
from lilliput.memory.plan import MemoryPlan
folder = Path(sys.argv[1])
(folder / "text.txt").write_text("the quick brown fox jumps over the lazy dog\\n" * 2000)
def go(name, device, sequence=256, rows=16):
    data = {"path": str(folder / "text.txt"), "tokenizer": "bytes", "sequence": sequence}
    settings = {"init": "scratch", "tokens_per_step": sequence * rows, "micro_batch": rows, "steps": 2, "eval_tokens": 4096}
    job = Job.load(model="llama-3m", threads=1, seed=1, data=data, train=settings, memory={"device": device}, remat={"every": 2})
    train(job, folder / name, Show(json=True))
    return MemoryPlan.from_json((folder / name / "memory.json").read_text())
needs = int(go("loaded", "1GB").measured["device"])
go("small", "1GB", 16, 2)  # libraries are loaded now, and what is freed went back
hardware.trim()
if sys.argv[2] == "with holes":
    outside.data_limit = lambda: None
there = next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmData"))
resource.setrlimit(resource.RLIMIT_DATA, (there + needs * 115 // 100,) * 2)
try:
    assert go("limited", f"{needs}B").measured["device"] == needs
    sys.stdout.write("finished")
except RuntimeError as error:
    sys.stdout.write("refused" if "allocate memory" in str(error) else str(error))
"""


def answer(code: str, *words: str) -> str:
    """What the code says in a process of its own, with glibc as it comes."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")} | {"OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[1]), environment.get("PYTHONPATH", "")])
    said = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, timeout=400, env=environment, check=False)
    assert said.returncode == 0, said.stderr[-600:]
    return said.stdout


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA counts private mappings on Linux only")
@pytest.mark.parametrize(("which", "expected"), [("plain", "refused"), ("planned", "finished"), ("with holes", "refused")])
def test_a_limit_of_the_kernel_is_kept(which: str, expected: str) -> None:
    assert answer(RUN, which) == expected


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA counts private mappings on Linux only")
@pytest.mark.parametrize(("which", "expected"), [("as it comes", "finished"), ("with holes", "refused")])
def test_a_job_with_a_budget_keeps_it_by_itself(which: str, expected: str, tmp_path: Path) -> None:
    assert answer(JOB, str(tmp_path), which) == expected
