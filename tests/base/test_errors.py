"""Errors and the registry: what a user reads, and the nearest word for a wrong one."""

from __future__ import annotations

import pytest

from lilliput.base import registry
from lilliput.base.errors import DOES_NOT_FIT, USER_INPUT, DoesNotFit, UserError, did_you_mean


def test_an_error_reads_what_why_fix() -> None:
    assert str(UserError("a", "b", "c")) == "a\n  why: b\n  fix: c" and str(UserError("a", fix="c")) == "a\n  fix: c"
    assert UserError("a").exit_code == USER_INPUT == 2 and DoesNotFit("a").exit_code == DOES_NOT_FIT == 3


def test_the_nearest_word_or_all_of_them() -> None:
    assert did_you_mean("stpes", ["steps", "lr"]) == "did you mean `steps`?"
    assert did_you_mean("zzz", {"b": 1, "a": 2}) == "known: a, b"


@pytest.mark.parametrize("kind", list(registry.ROOMS))
def test_every_registered_room_is_there(kind: str) -> None:
    for name in registry.names(kind):
        found = registry.find(kind, name)
        assert found.__module__ == registry.ROOMS[kind][name].partition(":")[0]
    with pytest.raises(UserError, match="unknown") as caught:
        registry.find(kind, registry.names(kind)[0] + "x")
    assert "did you mean" in caught.value.fix
