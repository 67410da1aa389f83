"""Requests: ranges are checked; text never shows a stop string, nor depends on how it was cut into tokens."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lilliput.base.errors import UserError
from lilliput.serve.answer import Answer, Request, StopText
from lilliput.serve.request import Sampling


class Letters:
    """A token stream in which token n is the letter chr(n), and every third character is held back until the next push."""

    def __init__(self) -> None:
        self.held = ""

    def push(self, token: int) -> str:
        out, self.held = (self.held + chr(token), "") if token % 3 else (self.held, chr(token))
        return out

    def flush(self) -> str:
        out, self.held = self.held, ""
        return out


def answer(limit: int, eos: frozenset[int] = frozenset(), **sampling: object) -> Answer:
    return Answer(1, Request(1, [10, 11, 12], Sampling(**sampling), limit, eos, Letters), 0)  # type: ignore[arg-type]


def run(text: str, limit: int = 100, eos: int = 0, **sampling: object) -> tuple[str, str | None, list[int]]:
    request = answer(limit, frozenset({eos}), **sampling)
    shown = ""
    for letter in text:
        delta = request.append(ord(letter), -0.5)
        shown += delta.text
        if delta.finish_reason:
            return shown, delta.finish_reason, request.tokens
    return shown, None, request.tokens


@pytest.mark.parametrize(
    "values",
    [
        dict(max_tokens=0), dict(temperature=-0.1), dict(temperature=float("nan")), dict(top_k=-1), dict(top_p=0.0), dict(top_p=1.1), dict(min_p=2.0),
        dict(repetition_penalty=0.0), dict(stop=("",)), dict(stop="abc"),
        dict(min_tokens=300), dict(presence_penalty=float("inf")), dict(frequency_penalty=float("nan")), dict(bad_words="abc"), dict(bad_words=("",)),
        dict(logit_bias={1: float("inf")}), dict(logprobs=-1), dict(prompt_logprobs=-1), dict(n=0), dict(n=129), dict(best_of=0),
    ],
    ids=str,
)
def test_values_out_of_range_are_named(values: dict[str, object]) -> None:
    (name,) = values
    with pytest.raises(UserError) as error:
        Sampling(**values)  # type: ignore[arg-type]
    assert error.value.what.startswith(f"{name}=") and error.value.why and error.value.fix.startswith(f"{name}=")


def test_the_end_token_ends_the_answer_and_shows_nothing() -> None:
    assert run("hello\0more") == ("hello", "stop", [*map(ord, "hello"), 0])
    assert run("hi\0there", ignore_eos=True)[1] is None


def test_the_limit_gives_out_what_was_held_back() -> None:
    assert run("abcdef", limit=6, stop=("fgh",)) == ("abcdef", "length", [*map(ord, "abcdef")])


def test_a_stop_string_over_several_tokens_never_shows() -> None:
    assert run("one END two", stop=("END",))[:2] == ("one ", "stop")
    request = answer(50, stop=("END",))
    shown = [request.append(ord(c), 0.0).text for c in "xEN."]
    assert "".join(shown) == "xEN." and "E" not in "".join(shown[:3])


def test_a_stop_string_completed_by_the_last_held_character() -> None:
    assert chr(99) == "c" and 99 % 3 == 0  # "c" is held by the stream, so the stop is found in its flush
    assert run("abc\0", stop=("bc",)) == ("a", "stop", [97, 98, 99, 0])
    assert run("abc", limit=3, stop=("bc",)) == ("a", "stop", [97, 98, 99])


def test_min_tokens_keeps_stop_strings_and_the_end_token_away() -> None:
    assert run("a\0b\0c", min_tokens=2)[1:] == ("stop", [97, 0, 98, 0])
    assert run("xEND ENDy", stop=("END",), min_tokens=4)[:2] == ("xEND ", "stop")


def test_a_stop_id_ends_the_answer_and_is_named() -> None:
    request = answer(50, eos=frozenset({5}), stop_ids=(98,))
    assert request.append(ord("a"), -1.0).stop_reason is None
    last = request.append(98, -1.0)
    assert (last.finish_reason, last.stop_reason, last.text) == ("stop", 98, "")
    request = answer(50, eos=frozenset({5}))
    assert request.append(5, 0.0).stop_reason is None, "the model's own end needs no name"
    request = answer(50, stop=("bc",))
    assert [request.append(ord(c), 0.0).stop_reason for c in "abc."] == [None, None, None, "bc"]


def test_without_a_seed_each_request_has_its_own() -> None:
    first, second = answer(5), answer(5)
    assert first.seed != second.seed
    assert answer(5, seed=9).seed == 9
    request = Request(1, [1], Sampling(seed=9, n=2), 5, frozenset(), Letters)
    assert len({Answer(i, request, i).seed for i in range(2)}) == 2, "the answers of one request differ"


@settings(deadline=None, max_examples=400)
@given(text=st.text("ab", max_size=30), stops=st.lists(st.text("ab", min_size=1, max_size=4), max_size=3), data=st.data())
def test_stops_do_not_depend_on_the_cut(text: str, stops: list[str], data: st.DataObject) -> None:
    ends = sorted((text.find(s) + len(s), text.find(s)) for s in stops if s in text)
    expected = text[: ends[0][1]] if ends else text
    scanner, shown, at = StopText(tuple(stops)), "", 0
    while at < len(text) and not scanner.found:
        step = data.draw(st.integers(1, 6))
        shown += scanner.push(text[at : at + step])
        at += step
        assert expected.startswith(shown)
    assert shown + scanner.flush() == expected and bool(scanner.found) == bool(ends)
