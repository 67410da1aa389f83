"""The kernel's own limit as the judge: under RLIMIT_DATA = what is there + 1.15 x the planned bytes the plan finishes and the plain run does not.

glibc keeps freed blocks below its mmap threshold in its heap, which a limit on data counts: the threshold is set low, else holes cost more than 15 %.
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
resource.setrlimit(resource.RLIMIT_DATA, (there + peak * 115 // 100,) * 2)
try:
    rig.schedule(rig, batch, batch[0].weight)
    sys.stdout.write("finished")
except RuntimeError as error:
    sys.stdout.write("refused" if "allocate memory" in str(error) else str(error))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA counts private mappings on Linux only")
@pytest.mark.parametrize(("which", "expected"), [("plain", "refused"), ("planned", "finished")])
def test_a_limit_of_the_kernel_is_kept(which: str, expected: str) -> None:
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[1]), environment.get("PYTHONPATH", "")])
    answer = subprocess.run([sys.executable, "-c", RUN, which], capture_output=True, text=True, timeout=240, env=environment, check=False)
    assert answer.stdout == expected, answer.stderr[-400:]
