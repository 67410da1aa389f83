"""What a user sees when something is wrong: what, why with numbers, and a fix to paste.

Exit codes of every verb: 0 ok, 1 our fault, 2 the user's input, 3 it does not fit, 130 stopped by Ctrl-C.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

OK, OUR_FAULT, USER_INPUT, DOES_NOT_FIT, INTERRUPTED = 0, 1, 2, 3, 130


class UserError(Exception):
    """An error the user can mend. `what` is one line, `why` has the numbers, `fix` can be pasted."""

    exit_code = USER_INPUT

    def __init__(self, what: str, why: str = "", fix: str = "") -> None:
        super().__init__(what)
        self.what, self.why, self.fix = what, why, fix

    def __str__(self) -> str:
        return self.what + (f"\n  why: {self.why}" if self.why else "") + (f"\n  fix: {self.fix}" if self.fix else "")


class DoesNotFit(UserError):
    """The plan needs more bytes than the device has (exit code 3). `needs`: the least bytes that would do, 0 = not known."""

    exit_code = DOES_NOT_FIT

    def __init__(self, what: str, why: str = "", fix: str = "", needs: int = 0) -> None:
        super().__init__(what, why, fix)
        self.needs = needs


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`did you mean `x`?` for the nearest of the known words, or the list of all when none is near."""
    known = sorted(known)
    near = difflib.get_close_matches(word, known, 1, cutoff=0.6)
    return f"did you mean `{near[0]}`?" if near else f"known: {', '.join(known)}"
