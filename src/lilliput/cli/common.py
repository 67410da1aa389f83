"""What every verb shares: the same three flags, `key=value` words, and one way for a fault to leave the process.

Nothing heavy is imported here: help and completion answer before pydantic, rich or torch are needed.
"""

from __future__ import annotations

import functools
import os
import re
import sys
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lilliput.base.errors import INTERRUPTED, OK, OUR_FAULT, UserError

if TYPE_CHECKING:
    from lilliput.base.config import Settings
    from lilliput.base.show import Show

Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout; everything else goes to stderr.")]
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


def verb(act: Callable[..., int | None]) -> Callable[..., None]:
    """Wrap a verb: its faults become messages on stderr and exit codes. The verb returns its own code, None meaning 0.

    UserError: what, why, fix, and the error's own code. Ctrl-C: 130. A reader that closed the pipe: silence. Anything
    else is our fault: code 1, one line, and the traceback only where LILLIPUT_DEBUG is set.
    """

    @functools.wraps(act)
    def guarded(**arguments: Any) -> None:
        from lilliput.base import env
        from lilliput.base.show import Show

        try:
            code = act(**arguments) or OK
            sys.stdout.flush()
        except UserError as error:
            Show(json=arguments.get("json", False)).error(error)
            code = error.exit_code
        except KeyboardInterrupt:
            code = INTERRUPTED
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the interpreter complains when it flushes at exit
            code = OK
        except Exception as error:
            if env.debug():
                raise
            Show(json=arguments.get("json", False)).error(our_fault(error))
            code = OUR_FAULT
        raise typer.Exit(code)

    return guarded


def our_fault(error: Exception) -> UserError:
    """The message for an exception that no user caused."""
    what = f"this is Lilliput's fault, not yours: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"
    return UserError(what, fix="LILLIPUT_DEBUG=1 before the command shows the traceback; please report it with the command you ran")


def show_settings(show: Show, settings: Settings) -> None:
    """Print every value with its source (default, file, flag, argument, auto and its reason)."""
    from lilliput.base.config import toml_value

    plain = settings.to_dict()
    rows = []
    for key, source in settings.sources.items():
        section, _, short = key.rpartition(".")
        rows.append({"key": key, "value": toml_value(plain[section][short] if section else plain[short]), "source": source})
    show.data({row["key"]: {"value": row["value"], "source": row["source"]} for row in rows})
    show.table(rows, ("key", "value", "source"), "configuration")
