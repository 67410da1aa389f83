"""Picture: the device's memory through one micro-batch, as it is simulated: what stays, and what the forward and the backward pass add.

The blue area is the job as it will run, under its memory plan where it has one; the grey line is the same model with everything kept.
Nothing is loaded and nothing is computed: the step is traced on tensors without memory (about a second for thirty blocks).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lilliput.base import records
from lilliput.base.errors import UserError
from lilliput.base.protocols import Phase
from lilliput.base.show import parse_size

if TYPE_CHECKING:
    from lilliput.base.job import Job
    from lilliput.models.spec import DecoderSpec
    from lilliput.parallel.rig import Rig
    from lilliput.plan.estimate import Estimate

KINDS = (".svg", ".png")


@dataclass(frozen=True)
class Timeline:
    """Bytes of the device after each event of a micro-batch; `standing` of them are weights and optimizer, there all the time."""

    name: str
    standing: int
    line: tuple[int, ...]
    forwards: int  # events of the forward pass

    @property
    def peak(self) -> int:
        """The most."""
        return max(self.line)


def timelines(job: Job, spec: DecoderSpec, estimate: Estimate) -> tuple[Timeline, Timeline]:
    """(the job as planned, the same with every activation kept). Loads torch."""
    rig = _outlined(job, spec, estimate, estimate.rooms)
    blind = {name: room for name, room in estimate.rooms.items() if not _plans(room)}
    limits = [parse_size(room.budget) for room in estimate.rooms.values() if getattr(room, "evicts", False)]
    return _simulated("as planned", rig, min(limits, default=None)), _simulated("everything kept", _outlined(job, spec, estimate, blind))


def check(path: Path) -> None:
    """UserError for a picture of another kind than .svg and .png."""
    if path.suffix not in KINDS:
        raise UserError(f"cannot draw {path}", f"`{path.suffix}` is no kind of picture that is made here", f"--picture {path.with_suffix('.svg')}")


def draw(planned: Timeline, plain: Timeline, path: Path, title: str) -> Path:
    """Write the picture; its suffix says whether it is .svg or .png."""
    check(path)
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4), layout="constrained")
    spread = lambda t: [i / len(t.line) for i in range(len(t.line))]
    mib = lambda values: [v / 2**20 for v in values]
    axes.plot(spread(plain), mib(plain.line), color="#9a9a9a", linewidth=1, drawstyle="steps-post", label=f"{plain.name}: {plain.peak / 2**20:,.0f} MiB")
    axes.fill_between(spread(planned), mib(planned.line), step="post", color="#b9cbe0")
    axes.plot(spread(planned), mib(planned.line), color="#1f5a96", linewidth=1.4, drawstyle="steps-post",
              label=f"{planned.name}: {planned.peak / 2**20:,.0f} MiB")  # fmt: skip
    axes.axhspan(0, planned.standing / 2**20, color="#7f9ab8", label=f"weights and optimizer: {planned.standing / 2**20:,.0f} MiB")
    axes.axvline(planned.forwards / len(planned.line), color="#c2541b", linewidth=1, linestyle=":", label="the backward pass begins")
    axes.set(xlabel="events of one micro-batch", ylabel="MiB on the device", title=title, xlim=(0, 1), ylim=(0, None))
    axes.set_xticks([])
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, fontsize="small")
    records.picture(path, figure)
    pyplot.close(figure)
    return path


def _plans(room: Any) -> bool:
    return Phase.REMAT in room.acts()


def _outlined(job: Job, spec: DecoderSpec, estimate: Estimate, rooms: Any) -> Rig:
    import torch

    from lilliput.models.decoder import Decoder, init_tensor
    from lilliput.parallel.rig import outline

    with torch.device("meta"):
        model = Decoder(spec)
    model.dropout = job.train.dropout
    fresh = lambda name, shape, seed: init_tensor(name, shape, seed, spec)
    return outline(
        model, rooms, site=estimate.site, device=torch.device("cpu"), seed=0, dtype=estimate.dtype, read=None, init=fresh, clip=job.train.clip,
        before=Phase.STORE,  # no tier is made, no file
    )  # fmt: skip


def _simulated(name: str, rig: Rig, limit: int | None = None) -> Timeline:
    """limit: bytes above which moments leave, the last ones first, until the update."""
    from lilliput.memory.simulate import simulate
    from lilliput.parallel.budget import under
    from lilliput.parallel.rig import MOMENTS

    if rig.plan is None:
        rig = under(rig, lambda trace: (name, {}))
    schedule = max(rig.objective.ready.values(), key=lambda ready: ready.simulation.peak["device"]).schedule  # type: ignore[attr-defined]
    found = simulate(schedule, timeline=True)
    standing = rig.standing() + sum(s.bytes for s in schedule.trace.storages if s.external and s.kind == "gradient")
    middle = next((i for i, (event, _) in enumerate(found.timeline) if event >= _turn(schedule.trace)), len(found.timeline))
    line, gone = [], 0
    pages = [MOMENTS * p.numel() for p in rig.trainable().values()] if limit is not None else []
    for _, count in found.timeline:
        while pages and limit is not None and standing + count - gone > limit:
            gone += pages.pop()
        line.append(standing + count - gone)
    return Timeline(name, standing, tuple(line), middle)


def _turn(trace: Any) -> int:
    """The event by which the forward pass is over."""
    from lilliput.memory.trace import OP

    return next((i for i, (kind, number) in enumerate(trace.events) if kind == OP and number >= trace.forwards), len(trace.events))
