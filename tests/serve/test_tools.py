"""Tool calls: any cut of a text gives the same calls; what is no call stays text; prompts and grammars say one form."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lilliput.serve import tools
from lilliput.serve.tools import CLOSE, OPEN, Parser

NAMES = ("f", "weather")


def read(pieces: list[str], bare: bool = False) -> tuple[str, list[tuple[str, str]]]:
    """The text outside of calls, and (name, arguments) of each call."""
    parser, text, calls = Parser(NAMES, bare), "", []
    for event in [event for piece in pieces for event in parser.push(piece)] + parser.flush():
        if event.kind == "text":
            text += event.text
        elif event.kind == "call":
            assert event.call == len(calls), "calls are numbered in order"
            calls.append((event.text, ""))
        else:
            assert event.call == len(calls) - 1, "arguments belong to the last call"
            calls[-1] = (calls[-1][0], calls[-1][1] + event.text)
    assert parser.calls == len(calls)
    return text, calls


def call(name: str, arguments: str) -> str:
    return f'{OPEN}\n{{"name": "{name}", "arguments": {arguments}}}\n{CLOSE}'


CASES = {
    "one": (call("f", '{"a": "}<x"}'), "", [("f", '{"a": "}<x"}')]),
    "text before": ("Let me see. \n" + call("f", "{}"), "Let me see.", [("f", "{}")]),
    "text after": (call("f", "{}") + "\n done", "\n done", [("f", "{}")]),
    "two": (call("f", "{}") + "\n" + call("weather", '{"city": "Oslo"}') + "\n", "", [("f", "{}"), ("weather", '{"city": "Oslo"}')]),
    "a list": (f'{OPEN}[{{"name": "f", "arguments": {{}}}}, {{"name": "weather"}}]{CLOSE}', "", [("f", "{}"), ("weather", "{}")]),
    "arguments first": (f'{OPEN}{{"arguments": [1, {{"x": "\\""}}], "name": "f"}}{CLOSE}', "", [("f", '[1, {"x": "\\""}]')]),
    "arguments in a string": (f'{OPEN}{{"name": "f", "arguments": "{{\\"a\\": 1}}"}}{CLOSE}', "", [("f", '{"a": 1}')]),
    "the tag inside a string": (call("f", f'{{"a": "{CLOSE}{OPEN}"}}'), "", [("f", f'{{"a": "{CLOSE}{OPEN}"}}')]),
    "other keys": (f'{OPEN}{{"id": 7, "name": "f", "x": [{{}}], "arguments": null}}{CLOSE}', "", [("f", "null")]),
    "no closing tag": (f'{OPEN}{{"name": "f", "arguments": {{"a": 1}}}}', "", [("f", '{"a": 1}')]),
    "cut in the arguments": (f'{OPEN}{{"name": "f", "arguments": {{"a": ', "", [("f", '{"a": ')]),
    "cut before the name": (f'x {OPEN}{{"nam', f'x {OPEN}{{"nam', []),
    "an unknown tool": (f'x {OPEN}{{"name": "g"}}{CLOSE} y', f'x {OPEN}{{"name": "g"}}{CLOSE} y', []),
    "no JSON": (f"a {OPEN} f() {CLOSE}", f"a {OPEN} f() {CLOSE}", []),
    "broken after the name": (f'{OPEN}{{"name": "f", "arguments": {{]}} }}{CLOSE} y', " y", [("f", "{]")]),
    "a call in a broken one": (f'{OPEN}{{"a {OPEN}{{"name": "f"}}{CLOSE}', f'{OPEN}{{"a', [("f", "{}")]),
    "half a tag": ("a < b <tool_ca", "a < b <tool_ca", []),
    "only blanks": (" \n ", " \n ", []),
    "nothing": ("", "", []),
    "a bare call is text": ('{"name": "f", "parameters": {}}', '{"name": "f", "parameters": {}}', []),
}


@pytest.mark.parametrize("name", CASES)
def test_what_a_text_holds(name: str) -> None:
    text, outside, calls = CASES[name]
    assert read([text]) == (outside, calls)


@given(st.data())
@settings(max_examples=400, deadline=None)
def test_any_cut_gives_the_same_calls(data: st.DataObject) -> None:
    parts = [case[0] for case in CASES.values()] + ["<", ">", "{", "}", '"', "\\", "[", "]", " ", "\n", "a"]
    parts += [OPEN, CLOSE, '"name"', ":", ",", '"f"', '"arguments"', "é"]
    text = "".join(data.draw(st.lists(st.sampled_from(parts), max_size=8)))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=12)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)])]
    bare = data.draw(st.booleans())
    assert read(pieces, bare) == read([text], bare) == read(list(text), bare)


@given(st.text(alphabet="<tol_ca>/ \n{[x", max_size=40))
def test_a_text_without_calls_stays_as_it_is(text: str) -> None:
    assert read([text]) == (text, [])


def test_arguments_come_as_they_are_written() -> None:
    parser = Parser(NAMES)
    parser.push(f'{OPEN}{{"name": "f", "arguments": {{"a": ')
    assert [event.text for event in parser.push("12")] == ["12"]
    assert [event.text for event in parser.push("3")] == ["3"]


def test_bare_calls() -> None:
    assert read([' {"name": "f", "parameters": {"a": 1}} '], bare=True) == ("", [("f", '{"a": 1}')])
    assert read(['{"name": "g", "parameters": {}}'], bare=True) == ('{"name": "g", "parameters": {}}', [])
    assert read(['It is {"name": "f"}'], bare=True) == ('It is {"name": "f"}', [])


FUNCTION = {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}}


def test_a_template_without_tools_gets_them_as_text() -> None:
    function = {"name": "f", "arguments": '{"a": 1'}
    called = {"role": "assistant", "content": None, "tool_calls": [{"id": "1", "type": "function", "function": function}]}
    messages = [{"role": "user", "content": "hi"}, called, {"role": "tool", "tool_call_id": "1", "content": "3"}, {"role": "tool", "content": "4"}]
    plain = tools.plain(messages, [FUNCTION])
    assert [message["role"] for message in plain] == ["system", "user", "assistant", "user"]
    assert json.dumps(FUNCTION) in plain[0]["content"]
    assert plain[2]["content"] == f'{OPEN}\n{{"name": "f", "arguments": {{"a": 1}}\n{CLOSE}'
    assert plain[3] == {"role": "user", "content": "<tool_response>\n3\n</tool_response>\n<tool_response>\n4\n</tool_response>"}
    assert tools.plain([{"role": "system", "content": "Be brief."}], [FUNCTION])[0]["content"].startswith("Be brief.\n\nYou have")
    assert tools.plain([{"role": "user", "content": "hi"}], []) == [{"role": "user", "content": "hi"}]


def test_which_form_a_template_asks_for() -> None:
    assert not tools.speaks_tools("{% for m in messages %}") and tools.speaks_tools("{% if tools %}")
    assert tools.is_bare('{% if tools %}{"name": x, "parameters": y}') and not tools.is_bare('{% if tools %}<tool_call> "parameters"')
