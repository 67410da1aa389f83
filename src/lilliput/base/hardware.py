"""Hardware: what a job may use, detected on this machine or declared by a data-sheet file. No torch.

Detection asks /proc, the cgroup (both versions), the CPU affinity and nvidia-smi. A container's limits count, not the
host's size: cores = min(affinity, quota), memory = min(physical, cgroup limit). GPU peaks come from the data sheet of
the same chip in machines/*.toml. A CPU states no peak, so it is estimated (cores x clock x flops a cycle of its vector
units) and its bandwidth is timed with one copy; `estimated` names such figures. LILLIPUT_CPU_FLOPS overrides the peak.
The disk behind a folder is timed when a plan needs it (`reaching`; base/speeds.py remembers both).
Flops are dense, without sparsity; link figures are bytes/s in one direction; 0 = absent or unknown.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.resources
import os
import platform
import re
import shutil
import subprocess
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from lilliput.base import env, speeds
from lilliput.base.errors import UserError, did_you_mean

ROOT = Path("/")
FLOPS_PER_CYCLE = {"avx512": 64, "avx2": 32, "avx": 16, "neon": 16, "sse": 8}  # fp32, one core: two FMA units x lanes x 2


@dataclass(frozen=True)
class DeviceSpec:
    """One kind of device. A CPU is one device with all the cores it may use."""

    kind: Literal["cpu", "cuda"]
    name: str
    memory: int  # bytes it may use at most
    flops: Mapping[str, float] = field(default_factory=dict)  # "fp32" | "tf32" | "fp16" | "bf16" | "fp8" | "int8" -> flop/s
    bandwidth: float = 0.0  # bytes/s of its memory
    count: int = 1  # devices of this kind in one node
    free: int = 0  # bytes not in use when it was detected; the memory where it was declared
    cores: int = 0  # CPU: threads it may run
    match: str = field(default="", repr=False)  # pattern of the names nvidia-smi gives this chip

    def peak(self, dtype: str) -> float:
        """Flop/s at a dtype; a dtype without units of its own runs at the fp32 rate. 0.0 = unknown."""
        return self.flops.get(dtype, self.flops.get("fp32", 0.0))


@dataclass(frozen=True)
class Links:
    """Bytes/s in one direction, for one device (pcie, intra_node) or one node (inter_node, nvme)."""

    intra_node: float = 0.0  # device to device inside a node (NVLink)
    inter_node: float = 0.0  # node to node (network)
    pcie: float = 0.0  # host memory to one device
    nvme_read: float = 0.0
    nvme_write: float = 0.0


@dataclass(frozen=True)
class Hardware:
    """One node and how nodes are linked. `devices[0]` is the kind that computes."""

    name: str
    devices: tuple[DeviceSpec, ...]
    host: DeviceSpec  # the CPU and its memory
    links: Links = Links()
    nodes: int = 1
    isa: tuple[str, ...] = ()  # vector extensions of the CPU: "avx2", "avx512", "avx512_bf16", "amx", "neon", ...
    estimated: tuple[str, ...] = ()  # figures that no data sheet states, e.g. "cpu flops"
    source: str = ""
    limits: Mapping[str, int] = field(default_factory=dict)  # tier -> bytes that a job gives itself; a CPU's device is a tier of its own then

    @property
    def device(self) -> DeviceSpec:
        """One device of the kind that computes."""
        return self.devices[0]

    def cpus(self) -> int:
        """Threads the host CPU may run (affinity and cgroup quota counted)."""
        return self.host.cores

    def select(self, device: str) -> Hardware:
        """This hardware with another device first: "auto", "cpu", "cuda" or "cuda:N". UserError when it has none."""
        if device == "auto":
            return self
        if device == "cpu":
            return replace(self, devices=(self.host,))
        gpus = [d for d in self.devices if d.kind == "cuda"]
        spot = re.fullmatch(r"cuda(?::(\d+))?", device)
        if spot is None:
            raise UserError(f"unknown device `{device}`", why=f"{self.name} has {self._inventory()}", fix="device=auto, cpu, cuda or cuda:0")
        number = int(spot[1] or 0)
        single = [d for d in gpus for _ in range(d.count)]
        if number >= len(single):
            raise UserError(f"device `{device}` is not here", why=f"{self.name} has {self._inventory()}", fix="device=auto")
        first = single[number]
        return replace(self, devices=(first, *(d for d in gpus if d is not first)))

    def reaching(self, folders: Iterable[str]) -> Hardware:
        """This hardware with the speeds of its own links where it was detected: a CPU that plays a device copies in its memory, and the disk is
        that of the folders (the slowest of several). A declared machine's links stay as its file states them."""
        if self.source != "detected":
            return self
        links, told = self.links, list(self.estimated)
        if not links.pcie and self.device.kind == "cpu":
            links = replace(links, pcie=self.host.bandwidth / 2)
            told.append("link to the host (a copy in memory)")
        disks = [speeds.disk(Path(folder)) for folder in dict.fromkeys(folders)]
        for disk in sorted((d for d in disks if d.read and d.write), key=lambda d: -min(d.read, d.write)):
            links = replace(links, nvme_read=disk.read, nvme_write=disk.write)
        told += [f"disk ({disk.source})" for disk in disks]
        return replace(self, links=links, estimated=tuple(told))

    def _inventory(self) -> str:
        here = self.devices if self.host in self.devices else (*self.devices, self.host)
        return ", ".join(f"{d.count} x {d.name}" for d in here)


def free_bytes(folder: Path) -> int:
    """Bytes that files of a folder may take: those that are free on its disk and those that they have. The folder need not be there yet."""
    there = folder.absolute()
    own = sum(path.stat().st_blocks * 512 for path in there.iterdir() if path.is_file()) if there.is_dir() else 0
    return shutil.disk_usage(next(path for path in (there, *there.parents) if path.is_dir())).free + own


def names() -> list[str]:
    """Names of the declared machines."""
    return sorted(p.name.removesuffix(".toml") for p in importlib.resources.files("lilliput.base").joinpath("machines").iterdir() if p.name.endswith(".toml"))


def declared(name: str) -> Hardware:
    """A declared machine by name, or from a path to a .toml file of the same form. UserError when there is none or it is malformed."""
    if name.endswith(".toml"):
        try:
            text = Path(name).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as fault:
            raise UserError(f"cannot read {name}", why=str(fault), fix=f"hardware={names()[0]}") from None
    elif name in names():
        text = importlib.resources.files("lilliput.base").joinpath("machines", f"{name}.toml").read_text(encoding="utf-8")
    else:
        raise UserError(f"unknown hardware `{name}`", why=f"declared: {', '.join(names())}", fix=did_you_mean(name, names()) + " Or a path to a .toml file")
    try:
        table = tomllib.loads(text)
        host = DeviceSpec(**_sized(table["host"], kind="cpu"))
        devices = tuple(DeviceSpec(**_sized(d)) for d in table.get("device", ())) or (host,)
        links = Links(**{k: float(v) for k, v in table.get("links", {}).items()})
        return Hardware(
            Path(name).stem, devices, host, links, table.get("nodes", 1), tuple(table.get("isa", ())), tuple(table.get("estimated", ())), table["source"]
        )
    except (tomllib.TOMLDecodeError, KeyError, TypeError, ValueError) as fault:
        raise UserError(f"hardware file {name} is malformed", why=f"{type(fault).__name__}: {fault}", fix=f"copy the form of `{names()[0]}`") from None


def find(name: str) -> Hardware:
    """What the key `hardware` names: "auto" = this machine, else a declared one."""
    return detect() if name == "auto" else declared(name)


def detect(cpu_flops: float | None = None, root: Path = ROOT) -> Hardware:
    """This machine as the process may use it. `cpu_flops`: peak fp32 flop/s of the CPU, in place of the estimate.

    `root` is where /proc and /sys hang (tests hang a made-up machine there).
    """
    cores = cpus(root)
    info = _cpuinfo(root)
    units = _isa(info)
    peak = cpu_flops or env.cpu_flops()
    guess = peak or _cores_with_units(info, cores) * _clock(info, root) * next((n for name, n in FLOPS_PER_CYCLE.items() if name in units), 2)
    total, free = memory(root)
    name = next((info[0][k] for k in ("model name", "Model") if info and k in info[0]), platform.processor() or platform.machine())
    host = DeviceSpec("cpu", name, total, {"fp32": float(guess)}, speeds.memory(), 1, free, cores)
    gpus = _gpus()
    estimated = (() if peak else ("cpu flops",)) + ("cpu bandwidth",)
    return Hardware(platform.node() or "this machine", gpus or (host,), host, isa=units, estimated=estimated, source="detected")


def cpus(root: Path = ROOT) -> int:
    """Compute threads this process may run: the affinity mask and the cgroup's quota (rounded down, at least 1)."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for folder in _cgroup_folders(root, "cpu"):
        if text := _read(folder / "cpu.max"):
            quota, period = [*text.split(), "100000"][:2]
        else:
            quota, period = _read(folder / "cpu.cfs_quota_us") or "max", _read(folder / "cpu.cfs_period_us") or "100000"
        if quota not in ("max", "-1"):
            allowed = min(allowed, int(quota) // int(period))
    return max(1, allowed)


def isa(root: Path = ROOT) -> tuple[str, ...]:
    """Vector extensions of this CPU ("avx512", "avx2", "neon", ...)."""
    return _isa(_cpuinfo(root))


def memory(root: Path = ROOT) -> tuple[int, int]:
    """(bytes the process may use at most, bytes of them free now) under the cgroup limits of it and its ancestors.

    Page cache that the kernel can drop (inactive files) counts as free.
    """
    table: dict[str, str] = dict(re.findall(r"^(\w+):\s+(\d+) kB", _read(root / "proc/meminfo"), re.M))
    if table:
        total, free = int(table["MemTotal"]) * 1024, int(table.get("MemAvailable", table.get("MemFree", "0"))) * 1024
    else:  # not Linux
        import psutil

        total, free = psutil.virtual_memory().total, psutil.virtual_memory().available
    for folder in _cgroup_folders(root, "memory"):
        limit = _read(folder / "memory.max") or _read(folder / "memory.limit_in_bytes")
        used = _read(folder / "memory.current") or _read(folder / "memory.usage_in_bytes")
        if limit.isdigit() and used.isdigit():  # "max", or a number beyond any machine, is no limit
            dropped: dict[str, str] = dict(re.findall(r"^(\w+) (\d+)$", _read(folder / "memory.stat"), re.M))
            cache = int(dropped.get("total_inactive_file", dropped.get("inactive_file", "0")))
            total, free = min(total, int(limit)), min(free, int(limit) - max(0, int(used) - cache))
    return total, max(0, min(free, total))


def trim() -> None:
    """Give what the heap has freed back to the system, where the C library can: loading a model leaves a third of its size in holes."""
    with contextlib.suppress(AttributeError, OSError):  # not glibc
        ctypes.CDLL(None).malloc_trim(0)


M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h


def few_holes(budget: int) -> str | None:
    """Have each block above a 256th of the budget (64 KiB to 1 MiB) given back to the system when it is freed, for good, so that a limit on data
    (RLIMIT_DATA) of the budget and 15 % holds. None, or why it cannot be done.

    Else glibc's heap keeps blocks of up to 32 MiB as holes that such a limit counts. Costs 9 to 42 % of a step's time in fresh pages (benchmarks/memory.md).
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return "the C library is not glibc: it has no mallopt"
    threshold = min(max(budget >> 8, 1 << 16), 1 << 20)
    return None if mallopt(M_MMAP_THRESHOLD, threshold) and mallopt(M_TRIM_THRESHOLD, threshold) else "mallopt refused the thresholds"


def data_limit() -> int | None:
    """Bytes of RLIMIT_DATA; None where there is no limit."""
    try:
        import resource
    except ImportError:  # not Unix
        return None
    limit = resource.getrlimit(resource.RLIMIT_DATA)[0]
    return None if limit == resource.RLIM_INFINITY else limit


def resident_bytes(root: Path = ROOT) -> int:
    """Bytes of this process that are in memory now."""
    if statm := _read(root / "proc/self/statm"):
        return int(statm.split()[1]) * os.sysconf("SC_PAGE_SIZE")
    import psutil  # not Linux

    resident: int = psutil.Process().memory_info().rss
    return resident


def _sized(table: Mapping[str, Any], **fixed: Any) -> dict[str, Any]:
    """Device keywords from a TOML table: memory is in bytes; a declared device is all free."""
    flops = {k: float(v) for k, v in table.get("flops", {}).items()}
    return {**fixed, **table, "flops": flops, "memory": int(table["memory"]), "bandwidth": float(table["bandwidth"]), "free": int(table["memory"])}


def _read(path: Path) -> str:
    """A small kernel file, stripped; empty when it is not there."""
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return ""


def _cgroup_folders(root: Path, controller: str) -> list[Path]:
    """Folders of the process's cgroup and its ancestors, for a controller, v1 and v2. A container may see only the mount's root."""
    folders = []
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        for mount in (controllers, controller) if controllers else ("", "unified"):
            here = Path(path.lstrip("/"))
            folders += [root / "sys/fs/cgroup" / mount / p for p in (here, *here.parents)]
    return [f for f in dict.fromkeys(folders) if f.is_dir()]


def _cpuinfo(root: Path) -> list[dict[str, str]]:
    """One dictionary a logical CPU of /proc/cpuinfo."""
    blocks = re.split(r"\n\s*\n", _read(root / "proc/cpuinfo"))
    parsed = [{k.strip(): v.strip() for k, _, v in (line.partition(":") for line in block.splitlines())} for block in blocks]
    return [p for p in parsed if "processor" in p]


def _isa(info: list[dict[str, str]]) -> tuple[str, ...]:
    """Vector extensions, widest first where the name says so. Off Linux: what the architecture guarantees."""
    if not info:
        return ("neon",) if platform.machine().lower() in ("arm64", "aarch64") else ("sse",)
    flags = set((info[0].get("flags") or info[0].get("Features") or "").split())
    told = {
        "avx512": {"avx512f", "avx512bw", "avx512vl"}, "avx512_vnni": {"avx512_vnni"}, "avx512_bf16": {"avx512_bf16"}, "amx": {"amx_tile"},
        "avx_vnni": {"avx_vnni"}, "avx2": {"avx2", "fma"}, "avx": {"avx"}, "f16c": {"f16c"}, "sse": {"sse2"}, "sve": {"sve"}, "neon": {"asimd"},
    }  # fmt: skip
    return tuple(name for name, needs in told.items() if needs <= flags)


def _cores_with_units(info: list[dict[str, str]], threads: int) -> int:
    """Physical cores behind the allowed threads: two hyperthreads share one core's vector units."""
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
    cores = {(p["physical id"], p["core id"]) for p in info if "core id" in p and "physical id" in p and (allowed is None or int(p["processor"]) in allowed)}
    return min(threads, len(cores)) if cores else threads


def _clock(info: list[dict[str, str]], root: Path) -> float:
    """Highest clock in Hz that the kernel states, else the clock now, else 2 GHz."""
    if text := _read(root / "sys/devices/system/cpu/cpu0/cpufreq/cpuinfo_max_freq"):
        return int(text) * 1e3
    clocks = [float(p["cpu MHz"]) for p in info if "cpu MHz" in p]
    return max(clocks) * 1e6 if clocks else 2e9


def _gpus() -> tuple[DeviceSpec, ...]:
    """GPUs that nvidia-smi shows and CUDA_VISIBLE_DEVICES allows; equal ones are one spec with a count."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return ()
    query = [tool, "--query-gpu=index,uuid,name,memory.total,memory.free", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ()
    rows = [[cell.strip() for cell in line.split(",")] for line in answer.stdout.splitlines()]
    rows = [row for row in rows if len(row) == 5]
    visible = env.visible_gpus()
    if visible is not None:
        rows = [row for want in visible for row in rows if want == row[0] or row[1].startswith(want)]
    sheets = [device for name in names() for device in declared(name).devices if device.kind == "cuda"]
    specs: list[DeviceSpec] = []
    for _, _, name, total, free in rows:
        sheet = next((s for s in sheets if s.match and re.search(s.match, name)), None)
        flops, bandwidth = (sheet.flops, sheet.bandwidth) if sheet else ({}, 0.0)
        spec = DeviceSpec("cuda", name, int(total) << 20, flops, bandwidth, 1, int(free) << 20)
        twin = next((i for i, s in enumerate(specs) if s.name == name and s.memory == spec.memory), None)
        if twin is None:
            specs.append(spec)
        else:
            specs[twin] = replace(specs[twin], count=specs[twin].count + 1, free=min(specs[twin].free, spec.free))
    return tuple(specs)
