"""`lilliput eval`: perplexity on a text, and multiple-choice tasks from files."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from lilliput.base.errors import OK
from lilliput.cli import common

if TYPE_CHECKING:
    from lilliput.base.show import Show
    from lilliput.loops.evaluate import Opened

COLUMNS = ("task", "figure", "value", "error", "n", "on")


@common.verb
def evaluate(
    words: Annotated[list[str] | None, typer.Argument(metavar="MODEL | KEY=VALUE", hidden=True)] = None,
    tasks: Annotated[str, typer.Option("--tasks", "-t", help="Names with commas; the same as eval.tasks=...", show_default=False)] = "",
    json: common.Json = False,
    dry_run: common.DryRun = False,
    show_config: common.ShowConfig = False,
) -> int:
    """Measure a model.

    perplexity reads a text; arc_easy, piqa, boolq, winogrande, openbookqa and lambada read their questions from a
    file, or find it in a folder. Files are read and checked before the model is loaded. Only figures of the same text,
    eval.window and eval.stride may be compared; both are printed with the number of scored tokens.

    \b
    Examples:
      lilliput eval smollm2-135m eval.path=wiki.test.raw eval.limit=40
      lilliput eval runs/job/model --tasks arc_easy,piqa eval.path=questions/
      lilliput eval model.gguf eval.path=notes.txt eval.window=512 eval.stride=256 --json
    """
    from lilliput import api
    from lilliput.base.job import Job
    from lilliput.base.show import Show
    from lilliput.loops import evaluate as loop

    show = Show(json=json)
    own, overrides = common.split(words)
    common.at_most(own, 1, "lilliput eval MODEL eval.path=FILE")
    asked = [*(f"model={name}" for name in own), *([f"eval.tasks={tasks}"] if tasks else [])]
    job = Job.load(None, [*asked, *overrides])
    if show_config:
        common.show_settings(show, job.settings)
        return OK
    if dry_run:
        return rehearse(job.top.model, loop.open_tasks(job.eval), show)
    results = api.measure(job, show)
    show.data({"model": job.top.model, "results": loop.to_dict(results)})
    show.table(loop.rows(results), COLUMNS, job.top.model)
    return OK


def rehearse(model: str, opened: Opened, show: Show) -> int:
    """--dry-run: what would be measured, its files read and checked."""
    rows = [{"task": name, "n": f"{len(questions):,} questions", "on": file} for name, (file, questions) in opened.questions.items()]
    if opened.text is not None:
        rows.insert(0, {"task": "perplexity", "n": f"{len(opened.text):,} characters", "on": "text"})
    show.data({"model": model, "would_measure": rows})
    show.table(rows, ("task", "n", "on"), f"would measure {model}")
    return OK
