"""`lilliput plan`: what a job will cost, before it runs and without torch."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lilliput.base.errors import DOES_NOT_FIT, OK, UserError
from lilliput.cli import common

if TYPE_CHECKING:
    from lilliput.base.config import Settings
    from lilliput.base.job import Job
    from lilliput.base.show import Show
    from lilliput.plan.estimate import Estimate, ServingEstimate

USAGE = "lilliput plan JOB.toml KEY=VALUE ..."


@common.verb
def plan(
    words: Annotated[list[str] | None, typer.Argument(metavar="JOB.toml | KEY=VALUE", hidden=True)] = None,
    serve: Annotated[int, typer.Option("--serve", help="Plan answering this many requests at once instead of training.", show_default=False)] = 0,
    context: Annotated[int, typer.Option(help="With --serve: tokens of each request; default the model's.", show_default=False)] = 0,
    picture: Annotated[Path | None, typer.Option(help="Draw the device's memory through one micro-batch (.svg or .png).", show_default=False)] = None,
    json: common.Json = False,
    dry_run: common.DryRun = False,
    show_config: common.ShowConfig = False,
) -> int:
    """Predict what a job needs, before it runs.

    Bytes by term, whether it fits, the biggest terms, and the nearest edit that makes it fit. The model is a name, a
    folder, a file or a preset (llama-7b, opt-13b, ...); nothing is downloaded or loaded. hardware=NAME plans for
    another machine: laptop, v100-dgx2, a100-dgx, h100-dgx. Exit code 3: it does not fit.

    \b
    Examples:
      lilliput plan
      lilliput plan model=llama-7b hardware=a100-dgx lora=on dtype=bf16
      lilliput plan job.toml data.sequence=2048 --json
      lilliput plan remat.plan=sqrt --picture memory.svg
      lilliput plan model=llama-7b hardware=laptop --serve 4 --context 2048
    """
    from lilliput import api
    from lilliput.base.job import Job
    from lilliput.base.show import Show

    show = Show(json=json)
    own, overrides = common.split(words)
    job = Job.load(common.job_file(own, USAGE), overrides)
    if show_config:
        common.show_settings(show, settled(job))
        return OK
    if serve and picture is not None:
        raise UserError("--picture draws a training step", "--serve plans answers", "leave one of them out")
    if serve < 0 or context < 0 or (context and not serve):
        raise UserError(f"--serve {serve} --context {context} is no plan", "both count from 1, and --context belongs to --serve", "--serve 1 --context 2048")
    estimate = serving(job, serve, context) if serve else api.plan(job)
    code = present(estimate, show)
    if picture is not None:
        draw(job, picture, show)
    return code


def draw(job: Job, path: Path, show: Show) -> None:
    """Trace a step of the job without computing it, and draw the device's memory through it."""
    from lilliput import api
    from lilliput.models.load import resolve_spec
    from lilliput.plan import picture

    picture.check(path)
    spec, _ = resolve_spec(job.top.model, fetch=False)
    planned, plain = picture.timelines(job, spec, api.plan(job))
    show.line(f"drew {picture.draw(planned, plain, path, f'{job.top.model}: one micro-batch')}")


def serving(job: Job, sequences: int, context: int) -> ServingEstimate:
    """The cost of answering `sequences` requests of `context` tokens (0: the model's) at the same time."""
    from lilliput.base import hardware
    from lilliput.models.facts import facts
    from lilliput.models.load import choose_runner, resolve
    from lilliput.plan.estimate import estimate_serving
    from lilliput.plan.ledgers import ELEMENT
    from lilliput.plan.serving import kv_token_bytes, weight_bytes
    from lilliput.serve.admission import context_of

    spec, checkpoint = resolve(job.top.model, fetch=False)
    machine, about = hardware.find(job.top.hardware).select(job.top.device), facts(spec)
    runner, _ = choose_runner(spec, job.serve, machine.device.kind)
    kept = {"weights": weight_bytes(spec, checkpoint, job.serve, runner, job.top.dtype)[0], "kv_token": kv_token_bytes(spec, job.serve.kv)}
    as_stored = kept if runner == "native" else {}
    context = context or context_of(job.serve.context, spec.context)
    return estimate_serving(about, machine, sequences, context, ELEMENT[job.top.dtype], job.serve.max_batch_tokens, **as_stored)


def present(estimate: Estimate | ServingEstimate, show: Show, **more: str) -> int:
    """An estimate as one document (with `more` beside it), or as a table and three sentences; the exit code."""
    from lilliput.plan import report

    show.data(more | report.to_dict(estimate))
    show.table(report.rows(estimate), report.COLUMNS)
    for sentence in (*report.sentences(estimate), *report.moves(estimate), *report.chosen(estimate)):
        show.line(sentence)
    return OK if estimate.fits else DOES_NOT_FIT


def settled(job: Job) -> Settings:
    """The job's settings with every `auto` that is known before the data is read filled in, reason included."""
    from lilliput import api

    estimate = api.plan(job)
    machine = {"device": (estimate.device.kind, estimate.device.name), "threads": (estimate.site.hardware.cpus(), "what this process may use")}
    settings = job.settings
    for key, (value, reason) in (machine | estimate.settled).items():
        if key in estimate.settled or getattr(job.top, key) == "auto":
            settings = settings.with_auto(key, value, reason)
    return settings
