"""`lilliput`: the verbs, assembled from one file each. Help answers in milliseconds: no verb imports torch to describe itself."""

from __future__ import annotations

import importlib
from typing import Annotated

import typer

from lilliput.base.version import __version__

VERBS = {
    "pull": "lilliput.cli.pull:pull",
    "chat": "lilliput.cli.chat:chat",
    "serve": "lilliput.cli.serve:serve",
    "train": "lilliput.cli.train:train",
    "eval": "lilliput.cli.eval:evaluate",
    "bench": "lilliput.cli.bench:bench",
    "plan": "lilliput.cli.plan:plan",
    "papers": "lilliput.cli.papers:papers",
}


def application() -> typer.Typer:
    """The whole command line, every verb in place."""
    app = typer.Typer(
        name="lilliput",
        context_settings={"help_option_names": ["-h", "--help"]},
        no_args_is_help=True,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
    )
    app.callback()(root)
    for name, place in VERBS.items():
        module, _, attribute = place.partition(":")
        app.command(name, no_args_is_help=False)(getattr(importlib.import_module(module), attribute))
    return app


def _version(wanted: bool) -> None:
    if wanted:
        from lilliput.base.show import Show

        Show().stream(__version__ + "\n")
        raise typer.Exit()


def root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version, and stop.")] = False,
) -> None:
    """Giant models, tied down on small machines.

    \b
    lilliput pull                                  fetch the default model (smollm2-135m)
    lilliput chat "Why is the sky blue?"
    lilliput serve                                 OpenAI's API and a web page on loopback
    lilliput plan model=llama-7b lora=on           what a job will cost, before it runs
    lilliput train job.toml train.steps=200        the same command resumes
    lilliput eval runs/job/model eval.path=notes.txt
    lilliput papers                                the 27 systems, and which work here

    Settings are written section.key=value after a verb, or as TOML in a job file. Exit codes: 0 ok, 1 our fault,
    2 your input, 3 does not fit, 130 stopped.
    """


def run() -> None:
    """Entry point of the `lilliput` command."""
    application()(prog_name="lilliput")
