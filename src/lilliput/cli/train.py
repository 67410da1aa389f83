"""`lilliput train`: run a job, or go on with it."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lilliput.base.errors import INTERRUPTED, OK
from lilliput.cli import common
from lilliput.cli import plan as planning

if TYPE_CHECKING:
    from lilliput.base.show import Show
    from lilliput.loops.train import TrainResult

USAGE = "lilliput train JOB.toml KEY=VALUE ... --out FOLDER"


@common.verb
def train(
    words: Annotated[list[str] | None, typer.Argument(metavar="JOB.toml | KEY=VALUE", hidden=True)] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Run folder; default runs/NAME, after the job file or the model.", show_default=False)] = None,
    json: common.Json = False,
    dry_run: common.DryRun = False,
    show_config: common.ShowConfig = False,
) -> int:
    """Train or fine-tune a model.

    The same command resumes where it stopped, bitwise; a finished run is not run again. The job is a TOML file,
    key=value words, or both; words win. A technique is on when its section is present (lora.rank=8, remat.every=4).
    Ctrl-C saves and stops. The run folder gets job.toml, metrics.jsonl, checkpoints/, loss.png and model/ (loadable
    by transformers). Exit code 3: it does not fit (see lilliput plan).

    \b
    Examples:
      lilliput train model=smollm2-135m data.path=notes.txt train.steps=50 lora.rank=8
      lilliput train recipes/lilliput-tiny.toml --out runs/tiny
      lilliput train job.toml train.tokens_per_step=8192 --dry-run
      lilliput train job.toml memory.device=600MB memory.host=2GB memory.disk=scratch
    """
    from lilliput.base.job import Job
    from lilliput.base.show import Show

    show = Show(json=json)
    own, overrides = common.split(words)
    file = common.job_file(own, USAGE)
    job = Job.load(file, overrides)
    if show_config:
        common.show_settings(show, planning.settled(job))
        return OK
    folder = out or Path("runs") / (file.stem if file else Path(job.top.model).stem)
    if dry_run:
        from lilliput import api

        show.line(f"would train {job.train.steps} steps into {folder}")
        return planning.present(api.plan(job), show, out=str(folder))
    from lilliput.loops.train import train as run

    result = run(job, folder, show)
    report(result, show)
    return INTERRUPTED if result.interrupted else OK


def report(result: TrainResult, show: Show) -> None:
    """The figures of a run, as one document or one table."""
    from lilliput.base.show import size

    figures = asdict(result)
    show.data(figures)
    shown = {name: size(value) if name.endswith("bytes") else value for name, value in figures.items() if value is not None}
    show.table([{"figure": name.replace("_", " "), "value": value} for name, value in shown.items()], ("figure", "value"))
