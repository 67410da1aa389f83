"""Structured output: whatever tokens are drawn inside the mask, the finished answer is valid; what cannot be enforced is named."""

from __future__ import annotations

import json
import random
import re

import pytest

from lilliput.base.errors import UserError
from lilliput.data.tokenizer import Tokenizer
from lilliput.models import hub
from lilliput.serve import tools
from lilliput.serve.structured import Grammars

pytest.importorskip("llguidance", reason="needs the extra `structured`")
validator = pytest.importorskip("jsonschema_rs", reason="needs jsonschema_rs, which schemathesis brings")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_folder(hub.SHIPPED / "lilliput-tiny")


@pytest.fixture(scope="module")
def grammars(tokenizer: Tokenizer) -> Grammars:
    return Grammars(tokenizer, 1030, tokenizer.eos_ids)  # more logits than the tokenizer has ids, as padded models have


def allowed(guide) -> list[int]:
    words = guide.mask().tolist()
    return [number for number in range(len(words) * 32) if words[number // 32] >> (number % 32) & 1]


def walk(make, tokenizer: Tokenizer, seed: int, most: int = 300) -> str | None:
    """Random tokens out of the mask, the end where it may come (often, so that the walk ends); None where it did not end."""
    draw, guide, ids = random.Random(seed), make(), []
    short = {number for number in range(tokenizer.vocab_size) if len(tokenizer.token_bytes(number)) <= 2}
    for _ in range(most):
        options = allowed(guide)
        assert options, "there is always a way on"
        assert max(options) < 1024, "ids that the tokenizer lacks never come"
        ends = [number for number in options if number in tokenizer.eos_ids]
        few = [number for number in options if number in short and tokenizer.token_bytes(number) in (b'"', b"}", b"]", b'"}', b"0", b"1", b"a")]
        token = ends[0] if ends and draw.random() < 0.5 else draw.choice(few if few and draw.random() < 0.6 else options)
        if token in tokenizer.eos_ids:
            return tokenizer.decode(ids)
        guide.accept(token)
        ids.append(token)
        if guide.finished:
            return tokenizer.decode(ids)
    return None


SCHEMAS = [
    {"type": "object", "properties": {"n": {"type": "string", "maxLength": 5}, "age": {"type": "integer", "minimum": 0}}, "required": ["n", "age"]},
    {"enum": ["red", 3, None, {"a": [1]}]},
    {"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 4},
    {"anyOf": [{"type": "string", "pattern": "^[ab]+$"}, {"type": "null"}]},
    {"$ref": "#/$defs/tree", "$defs": {"tree": {"type": "object", "properties": {"l": {"$ref": "#/$defs/tree"}}, "additionalProperties": False}}},
    {"type": "string", "format": "date"},
    {"type": "number", "multipleOf": 0.5, "exclusiveMinimum": 1},
]


@pytest.mark.parametrize("number", range(len(SCHEMAS)))
def test_every_finished_walk_is_valid(number: int, grammars: Grammars, tokenizer: Tokenizer) -> None:
    schema, make = SCHEMAS[number], grammars.json_schema(SCHEMAS[number])
    texts = [walk(make, tokenizer, seed) for seed in range(30)]
    finished = [text for text in texts if text is not None]
    assert len(finished) >= 10
    for text in finished:
        assert validator.validator_for(schema, validate_formats=True).is_valid(json.loads(text)), text


def test_regex_choice_and_grammar(grammars: Grammars, tokenizer: Tokenizer) -> None:
    for make, good in (
        (grammars.regex(r"[a-c]{2,4}-\d"), lambda text: re.fullmatch(r"[a-c]{2,4}-\d", text)),
        (grammars.choice(['say "yes"', "no\n", "é\\"]), lambda text: text in ('say "yes"', "no\n", "é\\")),
        (grammars.grammar('start: A+\nA: "x" | "y"'), lambda text: re.fullmatch("[xy]+", text)),
        (grammars.grammar('root ::= "x" ("y" | "z")'), lambda text: text in ("xy", "xz")),
    ):
        texts = [walk(make, tokenizer, seed) for seed in range(12)]
        assert all(text is None or good(text) for text in texts), texts
        assert sum(text is not None for text in texts) >= 6


def test_guides_of_one_grammar_do_not_share_their_state(grammars: Grammars, tokenizer: Tokenizer) -> None:
    make = grammars.choice(["ab", "cd"])
    one, other = make(), make()
    one.accept(tokenizer.encode("a")[0])
    assert tokenizer.encode("c")[0] in allowed(other) and tokenizer.encode("c")[0] not in allowed(one)
    with pytest.raises(UserError, match="left its grammar"):
        one.accept(tokenizer.encode("c")[0])


@pytest.mark.parametrize(
    ("schema", "said"),
    [
        ({"type": "array", "uniqueItems": True}, "keyword: uniqueItems"),
        ({"type": "object", "properties": {"a": {"not": {}, "nullable": True}}}, "keywords: not, nullable"),
        ({"anyOf": [{"if": {}, "then": {}}]}, "keywords: if, then"),
        ({"type": "object", "x-guidance": {"lenient": True}}, "x-guidance"),
        ({"type": "array", "items": [{"type": "string"}]}, "items as a list"),
        ({"$ref": "http://example.com/a"}, "cannot be followed"),
        ({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}, "cannot be followed"),
        ({"enum": []}, "cannot be followed"),
        ({"type": "strin"}, "cannot be followed"),
        ({"type": "string", "format": "color"}, "cannot be followed"),
        ({"type": "string", "pattern": "(?=a)b"}, "cannot be followed"),
        ([], "no object"),
        (True, "no object"),
    ],
)
def test_what_cannot_be_enforced_is_refused_by_name(schema, said: str, grammars: Grammars) -> None:
    with pytest.raises(UserError, match=re.escape(said)):
        grammars.json_schema(schema)


def test_what_is_no_grammar_is_refused(grammars: Grammars) -> None:
    no_grammar = [(grammars.regex, "("), (grammars.grammar, "start: ("), (grammars.grammar, "root ::= ("), (grammars.choice, []), (grammars.choice, [""])]
    for make, value in no_grammar:
        with pytest.raises(UserError):
            make(value)
    with pytest.raises(UserError, match="too large"):
        grammars.regex("a" * 200_000)


def test_annotations_and_examples_are_no_keywords(grammars: Grammars) -> None:
    grammars.json_schema({"title": "T", "description": "D", "type": "object", "default": {"not": 1}, "properties": {"not": {"const": {"if": 1}}}})


CITY = {"type": "object", "properties": {"city": {"enum": ["Oslo", "Rome"]}}, "required": ["city"], "additionalProperties": False}
TOOLS = [
    {"name": "weather", "parameters": CITY},
    {"name": 'say "hi"', "parameters": None},
]


@pytest.mark.parametrize("bare", [False, True])
@pytest.mark.parametrize("many", [False, True])
def test_required_calls_are_calls_whatever_is_drawn(many: bool, bare: bool, grammars: Grammars, tokenizer: Tokenizer) -> None:
    make = grammars.grammar(tools.rule(TOOLS[:1], required=True, many=many, bare=bare))
    texts = [text for seed in range(20) if (text := walk(make, tokenizer, seed)) is not None]
    assert len(texts) >= 10
    for text in texts:
        parser = tools.Parser(["weather"], bare)
        events = parser.push(text) + parser.flush()
        assert parser.calls >= 1 and not [event for event in events if event.kind == "text"], text
        arguments = [event.text for event in events if event.kind == "arguments"]
        assert all(json.loads(text)["city"] in ("Oslo", "Rome") for text in arguments) and len(arguments) == parser.calls
        assert many or parser.calls == 1
    grammars.grammar(tools.rule(TOOLS, required=True, many=many, bare=bare))


@pytest.mark.parametrize("many", [False, True])
def test_free_text_becomes_bound_once_a_call_is_opened(many: bool, grammars: Grammars, tokenizer: Tokenizer) -> None:
    guide = grammars.grammar(tools.rule(TOOLS, required=False, many=many))()
    for token in tokenizer.encode("Sure, <b>: <tool_call>"):
        assert token in allowed(guide)
        guide.accept(token)
    assert {tokenizer.token_bytes(number)[:1] for number in allowed(guide)} == {b"\n"}
    for token in tokenizer.encode('\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>'):
        assert token in allowed(guide), tokenizer.token_bytes(token)
        guide.accept(token)
    assert tokenizer.eos_ids[0] in allowed(guide)


@pytest.mark.parametrize("name", ["date", "time", "date-time", "duration", "email", "hostname", "ipv4", "ipv6", "uuid"])
def test_a_format_is_as_narrow_as_its_standard(name: str, grammars: Grammars, tokenizer: Tokenizer) -> None:
    schema = {"type": ["string", "null"], "format": name}
    check, make = validator.validator_for(schema, validate_formats=True), grammars.json_schema(schema)
    texts = [text for seed in range(40) if (text := walk(make, tokenizer, seed)) is not None]
    assert sum(text != "null" for text in texts) >= 10
    assert [text for text in texts if not check.is_valid(json.loads(text))] == []
