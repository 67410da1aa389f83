"""Job: the real sections and rooms, from TOML, flags and keywords, without torch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from lilliput.base import registry
from lilliput.base.errors import UserError
from lilliput.base.job import CORE, Job, sections


def test_a_job_from_file_flags_and_keywords(tmp_path: Path) -> None:
    path = tmp_path / "job.toml"
    path.write_text('model = "smollm2-135m"\ndata.path = ["a.txt", "b.txt"]\n\n[train]\nsteps = 10\n')
    job = Job.load(path, ["train.lr=1e-3", "train.steps=20"], train={"steps": 30}, dtype="bf16")
    assert (job.top.model, job.top.dtype, job.data.path, job.train.steps, job.train.lr) == ("smollm2-135m", "bf16", ("a.txt", "b.txt"), 30, 1e-3)
    assert job.rooms == {} and job.settings.sources["train.steps"] == "argument"


def test_core_sections_are_always_there_and_rooms_only_when_asked() -> None:
    job = Job.load()
    assert all(job.settings.present(name) for name in CORE) and job.rooms == {}
    for name in registry.names("train"):
        on = Job.load(None, [f"{name}=on"])
        assert set(on.rooms) == {name} and type(on.rooms[name]) is sections()[name]
    with pytest.raises(UserError, match="`eval` cannot be off"):
        Job.load(None, ["eval=off"])


def test_every_section_comes_back_from_toml(tmp_path: Path) -> None:
    job = Job.load(None, [f"{name}=on" for name in registry.names("train")], model="gpt-nano")
    path = tmp_path / "job.toml"
    path.write_text(job.to_toml())
    again = Job.load(path)
    assert again.settings == job.settings and again.rooms == job.rooms and set(again.rooms) == set(registry.names("train"))


def test_every_key_is_described_and_only_config_is_a_key() -> None:
    for name, cls in sections().items():
        for key, info in cls.model_fields.items():
            assert info.description, f"{name}.{key} has no description"
            assert key != "needs", f"{name}.needs must be a ClassVar"


def test_a_job_loads_no_torch() -> None:
    code = "import sys\nfrom lilliput.base.job import Job\nJob.load(None, ['train.steps=3', 'model=x'])\nsys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0
