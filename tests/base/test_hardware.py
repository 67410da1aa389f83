"""Hardware: made-up machines hung under a folder (both cgroup versions), a made-up nvidia-smi, and the data sheets."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lilliput.base import hardware
from lilliput.base.errors import UserError

GIB = 1 << 30
CPU = "processor\t: {n}\nmodel name\t: Test CPU\ncpu MHz\t\t: 2000.000\nphysical id\t: 0\ncore id\t\t: {core}\nflags\t\t: sse2 avx avx2 fma f16c {more}\n\n"


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Write files under a root; the affinity mask has CPUs 0 to 7."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    monkeypatch.delenv("LILLIPUT_CPU_FLOPS", raising=False)

    def write(files: dict[str, str]) -> Path:
        base = {"proc/meminfo": f"MemTotal: {32 * GIB // 1024} kB\nMemFree: 1 kB\nMemAvailable: {20 * GIB // 1024} kB\n", "proc/self/cgroup": "0::/\n"}
        for name, text in {**base, **files}.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text)
        return tmp_path

    return write


V2 = {"proc/self/cgroup": "0::/job/step\n"}
V1 = {"proc/self/cgroup": "5:cpu,cpuacct:/job\n4:memory:/job\n1:name=systemd:/x\n0::/\n"}


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({}, 8),
        (V2 | {"sys/fs/cgroup/job/step/cpu.max": "350000 100000"}, 3),
        (V2 | {"sys/fs/cgroup/job/step/cpu.max": "max 100000", "sys/fs/cgroup/job/cpu.max": "200000 100000"}, 2),  # an ancestor's limit counts
        (V2 | {"sys/fs/cgroup/cpu.max": "50000 100000"}, 1),  # a container that sees only the mount's root; never less than 1
        (V2 | {"sys/fs/cgroup/job/step/cpu.max": "1600000 100000"}, 8),  # the affinity mask is narrower
        (V1 | {"sys/fs/cgroup/cpu,cpuacct/job/cpu.cfs_quota_us": "400000", "sys/fs/cgroup/cpu,cpuacct/job/cpu.cfs_period_us": "100000"}, 4),
        (V1 | {"sys/fs/cgroup/cpu/cpu.cfs_quota_us": "400000", "sys/fs/cgroup/cpu/cpu.cfs_period_us": "200000"}, 2),
        (V1 | {"sys/fs/cgroup/cpu,cpuacct/job/cpu.cfs_quota_us": "-1", "sys/fs/cgroup/cpu,cpuacct/job/cpu.cfs_period_us": "100000"}, 8),
    ],
)
def test_threads_follow_quota_and_affinity(machine, files: dict[str, str], cores: int) -> None:
    assert hardware.cpus(machine(files)) == cores


@pytest.mark.parametrize(
    ("files", "total", "free"),
    [
        ({}, 32, 20),
        (V2 | {"sys/fs/cgroup/job/step/memory.max": str(8 * GIB), "sys/fs/cgroup/job/step/memory.current": str(3 * GIB)}, 8, 5),
        (V2 | {"sys/fs/cgroup/job/memory.max": str(8 * GIB), "sys/fs/cgroup/job/memory.current": str(3 * GIB),
               "sys/fs/cgroup/job/memory.stat": f"anon 5\ninactive_file {2 * GIB}\n"}, 8, 7),
        (V2 | {"sys/fs/cgroup/job/step/memory.max": "max", "sys/fs/cgroup/job/step/memory.current": str(3 * GIB)}, 32, 20),
        (V2 | {"sys/fs/cgroup/job/step/memory.max": str(64 * GIB), "sys/fs/cgroup/job/step/memory.current": str(50 * GIB)}, 32, 14),
        (V1 | {"sys/fs/cgroup/memory/job/memory.limit_in_bytes": str(4 * GIB), "sys/fs/cgroup/memory/job/memory.usage_in_bytes": str(3 * GIB),
               "sys/fs/cgroup/memory/job/memory.stat": f"total_inactive_file {GIB}\n"}, 4, 2),
        (V1 | {"sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712", "sys/fs/cgroup/memory/memory.usage_in_bytes": "5"}, 32, 20),
        (V2 | {"sys/fs/cgroup/memory.max": str(2 * GIB), "sys/fs/cgroup/memory.current": str(3 * GIB)}, 2, 0),
    ],
)  # fmt: skip
def test_memory_follows_every_limit(machine, files: dict[str, str], total: int, free: int) -> None:
    assert hardware.memory(machine(files)) == (total * GIB, free * GIB)


@pytest.mark.parametrize(
    ("more", "cores", "per_cycle", "unit"),
    [("", 8, 32, "avx2"), ("avx512f avx512bw avx512vl avx512_bf16 amx_tile", 8, 64, "amx"), ("", 4, 32, "avx2")],
)
def test_cpu_peak_is_cores_times_clock_times_units(machine, more: str, cores: int, per_cycle: int, unit: str) -> None:
    info = "".join(CPU.format(n=n, core=n % cores, more=more) for n in range(8))
    found = hardware.detect(root=machine({"proc/cpuinfo": info}))
    assert found.host.flops["fp32"] == cores * 2e9 * per_cycle  # two hyperthreads share one core's units
    assert unit in found.isa and "cpu flops" in found.estimated and found.host.name == "Test CPU"
    assert found.host.peak("bf16") == found.host.peak("fp32")
    assert (found.host.memory, found.host.free, found.cpus()) == (32 * GIB, 20 * GIB, 8)
    assert found.host.bandwidth > 1e8


def test_the_cpu_peak_can_be_stated(machine, monkeypatch: pytest.MonkeyPatch) -> None:
    root = machine({"proc/cpuinfo": CPU.format(n=0, core=0, more=""), "sys/devices/system/cpu/cpu0/cpufreq/cpuinfo_max_freq": "4000000"})
    assert hardware.detect(root=root).host.flops["fp32"] == 4e9 * 32
    assert hardware.detect(5e10, root).host.flops["fp32"] == 5e10
    monkeypatch.setenv("LILLIPUT_CPU_FLOPS", "7e10")
    found = hardware.detect(root=root)
    assert found.host.flops["fp32"] == 7e10 and "cpu flops" not in found.estimated


def test_arm(machine) -> None:
    found = hardware.detect(root=machine({"proc/cpuinfo": "processor\t: 0\nFeatures\t: fp asimd sve\n\nprocessor\t: 1\nFeatures\t: fp asimd sve\n"}))
    assert found.isa == ("sve", "neon") and found.host.flops["fp32"] == 8 * 2e9 * 16  # no clock stated: 2 GHz


def test_a_machine_without_proc(tmp_path: Path) -> None:
    found = hardware.detect(root=tmp_path)  # as off Linux
    assert found.host.memory > 0 and 0 < found.host.free <= found.host.memory and found.isa and found.host.cores >= 1


def smi(folder: Path, monkeypatch: pytest.MonkeyPatch, lines: list[str], code: int = 0) -> None:
    tool = folder / "nvidia-smi"
    tool.write_text("#!/bin/sh\n" + "".join(f"echo '{line}'\n" for line in lines) + f"exit {code}\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


EIGHT = [f"{n}, GPU-{n}a, NVIDIA H100 80GB HBM3, 81559, {81000 - n % 3}" for n in range(8)]


def test_gpus_get_their_sheet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    smi(tmp_path, monkeypatch, EIGHT)
    found = hardware.detect()
    assert found.device.count == 8 and found.device.memory == 81559 << 20 and found.device.free == (81000 - 2) << 20
    assert found.device.peak("bf16") == 989.4e12 and found.device.bandwidth == 3350e9 and found.host.kind == "cpu"
    assert found.select("cpu").device is found.host and found.select("cuda:7").device.name == "NVIDIA H100 80GB HBM3"
    with pytest.raises(UserError, match="device `cuda:8` is not here") as caught:
        found.select("cuda:8")
    assert "8 x NVIDIA H100 80GB HBM3" in caught.value.why


@pytest.mark.parametrize(("visible", "count"), [("0,3", 2), ("GPU-2a", 1), ("", 0), ("9", 0)])
def test_hidden_gpus_do_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, visible: str, count: int) -> None:
    smi(tmp_path, monkeypatch, EIGHT)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    found = hardware.detect()
    assert sum(d.count for d in found.devices if d.kind == "cuda") == count and (count or found.device is found.host)


def test_mixed_and_unknown_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    smi(tmp_path, monkeypatch, ["0, GPU-a, Tesla V100-SXM2-32GB, 32768, 32000", "1, GPU-b, GeForce Nothing, 8192, 8000"])
    found = hardware.detect()
    assert [d.peak("fp16") for d in found.devices] == [125e12, 0.0]  # 0 = unknown: no sheet, no guess
    assert found.select("cuda:1").device.name == "GeForce Nothing"


@pytest.mark.parametrize(("lines", "code"), [(["NVIDIA-SMI has failed"], 9), (["No devices were found"], 0), ([], 0)])
def test_a_driver_that_fails_is_no_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lines: list[str], code: int) -> None:
    smi(tmp_path, monkeypatch, lines, code)
    assert hardware.detect().device.kind == "cpu"


def test_declared_machines_are_whole() -> None:
    assert hardware.names() == ["a100-dgx", "h100-dgx", "laptop", "v100-dgx2"]
    for name in hardware.names():
        found = hardware.find(name)
        assert found.name == name and found.source and found.isa and found.host.cores > 0
        for device in (*found.devices, found.host):
            assert device.memory >= 16 * GIB and device.free == device.memory and device.bandwidth > 0 and device.peak("fp32") > 0
        if found.device.kind == "cuda":
            assert found.links.intra_node > found.links.pcie > 0 and found.links.inter_node > 0
    assert hardware.find("auto").source == "detected"


@pytest.mark.parametrize(
    ("name", "device", "dtype", "peak", "memory"),
    [("v100-dgx2", 16, "fp16", 125e12, 32), ("a100-dgx", 8, "bf16", 312e12, 80), ("h100-dgx", 8, "bf16", 989.4e12, 80)],
)
def test_data_sheet_figures(name: str, device: int, dtype: str, peak: float, memory: int) -> None:
    found = hardware.declared(name).device
    assert (found.count, found.peak(dtype), found.memory) == (device, peak, memory * GIB)


def test_a_machine_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "attic.toml"
    path.write_text('source = "attic"\n[host]\nname = "old"\nmemory = 8_000_000_000\nbandwidth = 1e10\ncores = 4\nflops = { fp32 = 1e11 }\n')
    found = hardware.find(str(path))
    assert found.name == "attic" and found.device.peak("bf16") == 1e11 and found.device.cores == 4


@pytest.mark.parametrize(
    ("text", "why"),
    [("x = ", "TOMLDecodeError"), ("source = 'x'", "KeyError"), ("source = 'x'\n[host]\nname = 'x'\nmemory = 1\nbandwidth = 1\ncolour = 1", "TypeError"),
     ("source = 'x'\n[host]\nname = 'x'\nmemory = 'much'\nbandwidth = 1", "ValueError")],
)  # fmt: skip
def test_a_malformed_machine_is_refused(tmp_path: Path, text: str, why: str) -> None:
    path = tmp_path / "attic.toml"
    path.write_text(text)
    with pytest.raises(UserError, match="malformed") as caught:
        hardware.declared(str(path))
    assert why in caught.value.why


def test_unknown_machines_and_devices() -> None:
    with pytest.raises(UserError, match="unknown hardware `v100`") as caught:
        hardware.declared("v100")
    assert "v100-dgx2" in caught.value.fix
    with pytest.raises(UserError, match="cannot read"):
        hardware.declared("nowhere/none.toml")
    with pytest.raises(UserError, match="unknown device `tpu`"):
        hardware.declared("laptop").select("tpu")
    with pytest.raises(UserError, match="device `cuda` is not here"):
        hardware.declared("laptop").select("cuda")
    assert hardware.declared("laptop").select("auto").device.kind == "cpu"
