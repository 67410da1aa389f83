"""What every verb shares: the same three flags, `key=value` words, and one way for a fault to leave the process.

Nothing heavy is imported here: help and completion answer before pydantic, rich or torch are needed.
"""

from __future__ import annotations

import functools
import os
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lilliput.base.errors import INTERRUPTED, OK, OUR_FAULT, UserError

if TYPE_CHECKING:
    from lilliput.base.config import Settings
    from lilliput.base.show import Show

Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout; all else goes to stderr.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and do nothing.")]
ShowConfig = Annotated[bool, typer.Option("--show-config", help="Print every value with its source, and stop.")]


def split(words: Iterable[str] | None) -> tuple[list[str], list[str]]:
    """A verb's words as (its own arguments, `section.key=value` overrides), each in the order given."""
    own: list[str] = []
    overrides: list[str] = []
    for word in words or ():
        (overrides if re.match(r"[A-Za-z_][\w-]*(\.[\w-]+)*=", word) else own).append(word)
    return own, overrides


def at_most(own: list[str], count: int, usage: str) -> None:
    """UserError when a verb got more arguments of its own than it takes."""
    if len(own) > count:
        raise UserError(f"unexpected argument `{own[count]}`", f"got {len(own)} arguments, at most {count} without `=`", usage)


def job_file(own: list[str], usage: str) -> Path | None:
    """The job file among a verb's own arguments, None without one. UserError for anything that is no .toml file."""
    at_most(own, 1, usage)
    if own and not own[0].endswith(".toml"):
        raise UserError(f"`{own[0]}` is no job file", "a job file ends in .toml; settings are written key=value", f"model={own[0]}")
    return Path(own[0]) if own else None


def verb(act: Callable[..., int]) -> Callable[..., None]:
    """Wrap a verb: its faults become messages on stderr and exit codes. The verb returns its own code.

    UserError: what, why, fix, and the error's own code. Ctrl-C: 130. A reader that closed the pipe: silence. Anything
    else is our fault: code 1, one line, and the traceback only where LILLIPUT_DEBUG is set.
    """

    @functools.wraps(act)
    def guarded(**arguments: Any) -> None:
        from lilliput.base import env
        from lilliput.base.show import Show

        show = Show(json=arguments["json"])
        try:
            debug = env.debug()
            code = act(**arguments)
            sys.stdout.flush()
        except UserError as error:
            show.error(error)
            code = error.exit_code
        except KeyboardInterrupt:
            code = INTERRUPTED
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the interpreter complains when it flushes at exit
            code = OK
        except Exception as error:
            if debug:
                raise
            show.error(our_fault(error))
            code = OUR_FAULT
        raise typer.Exit(code)

    return guarded


class OurFault(UserError):
    """How an exception that no user caused is shown."""

    exit_code = OUR_FAULT


def our_fault(error: Exception) -> OurFault:
    """The message for an exception that no user caused: its first line, whose fault it is, and how to see more."""
    said = str(error).strip().splitlines()
    what = f"{type(error).__name__}: {said[0]}" if said else type(error).__name__
    return OurFault(what, "this is Lilliput's fault, not yours", "please report it with the command; LILLIPUT_DEBUG=1 before the command shows the traceback")


def show_settings(show: Show, settings: Settings) -> None:
    """Print every value with its source (default, file, flag, argument, auto and its reason)."""
    from lilliput.base.config import toml_value
    from lilliput.ops import native

    plain = settings.to_dict()
    values = {key: plain[key] if key in plain else plain[key.partition(".")[0]][key.partition(".")[2]] for key in settings.sources}
    kernels = {"value": native.level(), "source": native.missing() or "auto: the best that this CPU has; attention, AdamW, decoding"}
    show.data({key: {"value": values[key], "source": source} for key, source in settings.sources.items()} | {"kernels": kernels})
    rows = [{"key": key, "value": toml_value(values[key]), "source": source} for key, source in settings.sources.items()]
    show.table([*rows, {"key": "kernels", **kernels}], ("key", "value", "source"))


def show_places(show: Show) -> None:
    """The configuration of verbs that read no job: what the environment says."""
    from lilliput.base import env

    values = {"cache": str(env.cache_dir()), "offline": env.offline()}
    show.data({key: {"value": value, "source": "environment"} for key, value in values.items()})
    show.table([{"key": key, "value": value, "source": "environment"} for key, value in values.items()], ("key", "value", "source"))
