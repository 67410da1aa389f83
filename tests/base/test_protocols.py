from types import SimpleNamespace

import pytest

from lilliput.base.errors import UserError
from lilliput.base.protocols import in_order


def rooms(**needs: tuple[str, ...]) -> dict:
    return {name: SimpleNamespace(needs=wanted) for name, wanted in needs.items()}


def test_a_room_comes_after_those_it_needs_and_otherwise_in_the_given_order() -> None:
    given = rooms(a=("c",), b=(), c=("absent",), d=("a", "b"))
    assert [name for name, _ in in_order(given)] == ["b", "c", "a", "d"]
    assert set(given) == set("abcd"), "the rooms given are left as they are"


def test_rooms_that_wait_for_each_other_are_named() -> None:
    with pytest.raises(UserError, match="wait for each other: a, b"):
        list(in_order(rooms(a=("b",), b=("a",), c=())))
