"""Routing by prefix: conversations stay, load spreads, the dead are forgotten."""

from __future__ import annotations

import random

from lilliput.serve.routing import MOST_PIECES, PIECE, Affinity, digests, text_of


def chat(system: str, *turns: str) -> dict:
    roles = ("user", "assistant")
    return {"model": "m", "messages": [{"role": "system", "content": system}, *({"role": roles[i % 2], "content": t} for i, t in enumerate(turns))]}


def test_a_conversation_that_goes_on_begins_with_what_it_was() -> None:
    first, later = chat("s" * 200, "hello" * 50), chat("s" * 200, "hello" * 50, "answer" * 40, "more")
    a, b = digests(text_of(first)), digests(text_of(later))
    assert 0 < len(a) <= len(b) and b[: len(a)] == a
    assert digests(text_of(chat("other" * 40, "hello" * 50)))[0] != a[0]
    assert digests(text_of(first | {"model": "n"}))[0] != a[0], "another model or adapter has other keys and values"
    assert len(digests("x" * PIECE * 1000)) == MOST_PIECES and digests("x" * (PIECE - 1)) == []


def test_every_kind_of_request_has_a_text() -> None:
    for body in ({"prompt": "abc"}, {"prompt": [1, 2, 3]}, {"prompt": ["abc", "d"]}, {"input": "abc"}, {"input": [{"role": "user", "content": "abc"}]}, {}):
        assert isinstance(text_of(body), str)
    assert "abc" in text_of({"input": [{"role": "user", "content": "abc"}]})


def test_the_replica_that_has_read_the_most_is_asked_first_unless_it_is_busy() -> None:
    route, keys = Affinity(slack=2), digests("y" * PIECE * 5)
    assert route.order(keys, {"a": 1, "b": 0, "c": 0}) == ["b", "c", "a"], "nobody has read it: the idlest"
    route.sent("a", keys)
    route.sent("c", keys[:2])
    assert route.match("a", keys) == 5 and route.match("c", keys) == 2 and route.match("b", keys) == 0
    assert route.order(keys, {"a": 2, "b": 0, "c": 1}) == ["a", "c", "b"]
    assert route.order(keys, {"a": 3, "b": 0, "c": 1}) == ["c", "b", "a"], "too much to do"
    route.keep(["b", "c"])
    assert route.match("a", keys) == 0


def test_what_is_remembered_is_bounded_and_beginnings_stay_longest() -> None:
    route = Affinity(remembered=6)
    old, new = digests("o" * PIECE * 4), digests("n" * PIECE * 4)
    route.sent("a", old)
    route.sent("a", new)
    assert len(route._read["a"]) == 6 and route.match("a", new) == 4 and route.match("a", old) == 2


def test_many_conversations_stay_and_load_stays_level() -> None:
    """200 conversations of 5 turns over 4 replicas: after its first turn each stays where it was, and no replica gets more than 1.5 of its share."""
    draw, route = random.Random(0), Affinity(slack=4)
    texts = [f"{i}" * 50 + "".join(draw.choice("abc") for _ in range(PIECE * 6)) for i in range(200)]
    homes: dict[int, str] = {}
    counts = dict.fromkeys("abcd", 0)
    moved = 0
    for turn in range(5):
        flying: list[str] = []
        for i, text in enumerate(texts):
            loads = {name: flying[-12:].count(name) for name in counts}  # the last 12 are in flight
            keys = digests(text[: PIECE * (2 + turn)])
            name = route.order(keys, loads)[0]
            route.sent(name, keys)
            flying.append(name)
            counts[name] += 1
            moved += homes.setdefault(i, name) != name
    assert max(counts.values()) <= 1.5 * sum(counts.values()) / 4, counts
    assert moved <= 0.1 * sum(counts.values()), f"{moved} of {sum(counts.values())} turns went elsewhere"


def test_conversations_spread_over_idle_replicas() -> None:
    """One after the other, nobody busy: each new beginning goes where least was read, what goes on stays."""
    affinity, sent = Affinity(), dict[int, str]()
    for turn in range(2):
        for number in range(6):
            keys = digests(f"{number} " + "x" * 400 * (turn + 1))
            first = affinity.order(keys, {"a": 0, "b": 0})[0]
            assert sent.setdefault(number, first) == first
            affinity.sent(first, keys)
    assert sorted(sent.values()) == ["a", "a", "a", "b", "b", "b"]
