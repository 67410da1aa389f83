"""`lilliput train`: run a job, or go on with it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lilliput.base.errors import DOES_NOT_FIT, INTERRUPTED, OK
from lilliput.cli import common


@common.verb
def train(
    words: Annotated[list[str] | None, typer.Argument(metavar="[JOB.toml] [KEY=VALUE]...", show_default=False)] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Run folder; default runs/NAME, after the job file or the model.", show_default=False)] = None,
    json: common.Json = False,
    dry_run: common.DryRun = False,
    show_config: common.ShowConfig = False,
) -> int:
    """Train or fine-tune a model. The same command resumes where it stopped, bitwise.

    The job is a TOML file, key=value words, or both; words win. A technique is on when its section is present
    (lora.rank=8, remat.every=4). Ctrl-C saves and stops. The run folder gets job.toml, metrics.jsonl, checkpoints/,
    loss.png and model/ (loadable by transformers).

    \b
    Examples:
      lilliput train model=smollm2-135m data.path=notes.txt train.steps=50 lora.rank=8
      lilliput train recipes/lilliput-tiny.toml --out runs/tiny
      lilliput train job.toml train.tokens_per_step=8192 --dry-run
    """
    from lilliput.base.show import Show

    show = Show(json=json)
    job, name = common.job_from(words)
    folder = out or Path("runs") / name
    if show_config or dry_run:
        from lilliput.cli.plan import planned

        settled, estimate = planned(job)
        if show_config:
            common.show_settings(show, settled)
            return OK
        report(show, estimate)
        return OK if estimate.fits else DOES_NOT_FIT
    from lilliput.loops.train import train as run

    result = run(job, folder, show)
    return INTERRUPTED if result.interrupted else OK
