"""Structured output: answers that are JSON, of a schema, of a regular expression, one of some choices, or of a grammar.

Before each token a parser says which tokens can still lead to a complete answer, as one bit a token; all others get no probability.
So whatever the model is, the answer is valid once it is complete; cut short by max_tokens it is a prefix of a valid one. The parser
is llguidance (an Earley parser over lexemes, 20 to 500 us a token); here lies what it is asked.

JSON is written on one line with one blank after `,` and `:`. A schema that allows any blanks lets small models write blanks for ever.
A keyword that would be ignored is a UserError that names it: nothing of a schema is dropped silently. Annotations (title, ...) are no
keywords in this sense, but `format` is one. llguidance: github.com/guidance-ai/llguidance, docs/json_schema.md.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from threading import Lock
from typing import TYPE_CHECKING, Any

from lilliput.base.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from lilliput.data.tokenizer import Tokenizer
    from lilliput.serve.request import Guide

Json = dict[str, Any]
STYLE: Any = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
ENFORCED = frozenset((
    "type", "enum", "const", "anyOf", "oneOf", "allOf", "$ref", "properties", "additionalProperties", "patternProperties", "required",
    "minProperties", "maxProperties", "items", "prefixItems", "minItems", "maxItems", "minLength", "maxLength", "pattern", "format",
    "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf",
))  # fmt: skip
ANNOTATIONS = frozenset((
    "title", "description", "default", "examples", "$schema", "$id", "$comment", "$defs", "definitions", "deprecated", "readOnly", "writeOnly", "discriminator",
))  # fmt: skip
MAPS, LISTS = ("properties", "patternProperties", "$defs", "definitions"), ("anyOf", "oneOf", "allOf", "prefixItems")
SINGLES = ("items", "additionalProperties")
SINGLE_HYPHENS = {"pattern": "^[^-]+(-[^-]+)*$"}  # `ab--` begins a label of punycode, which would have to decode
STRICTER: dict[str, list[Json]] = {  # where llguidance's form of a format is wider than the standard: leap seconds at any time, names of any length
    "time": [{"pattern": "^..:..:[0-5]"}],
    "date-time": [{"pattern": "^.{10}T..:..:[0-5]"}],
    "hostname": [{"maxLength": 253}, SINGLE_HYPHENS],
    "email": [{"pattern": r"^[^@]{1,64}@([^@.]{1,63}\.)*[^@.]{1,63}$", "maxLength": 254}, SINGLE_HYPHENS],
}
KEPT = 64  # compiled grammars
LARGEST = 100_000  # characters of one grammar or schema


class Grammars:
    """Compiles what answers may be, for one tokenizer and a model of `vocab` logits; the latest ones are kept."""

    def __init__(self, tokenizer: Tokenizer, vocab: int, eos_ids: Sequence[int]) -> None:
        """UserError where llguidance is not installed or the model has no end token."""
        try:
            import llguidance
        except ModuleNotFoundError as error:
            raise UserError("structured output needs llguidance", "it is not installed", "pip install 'lilliput[structured]'") from error
        if not eos_ids:
            raise UserError("structured output needs an end token", "this model's tokenizer names none", "serve a model with eos_token_id")
        self._lib, self.vocab = llguidance, vocab
        self._tokens = llguidance.LLTokenizer(llguidance.TokenizerWrapper(_Spelling(tokenizer, vocab, eos_ids)), n_vocab=vocab, eos_token=list(eos_ids))
        self._kept: OrderedDict[str, Any] = OrderedDict()
        self._lock = Lock()

    def json_object(self) -> Callable[[], Matched]:
        """Any JSON object."""
        return self.json_schema({"type": "object"})

    def json_schema(self, schema: Any) -> Callable[[], Matched]:
        """JSON that the schema validates. UserError names the keywords that cannot be enforced."""
        return self._guides(self._lib.LLMatcher.grammar_from_json_schema(checked(schema), overrides=STYLE), "the JSON schema")

    def regex(self, pattern: str) -> Callable[[], Matched]:
        """Text that the pattern (Rust's syntax: no look-around, no back references) matches as a whole."""
        return self._guides(self._lib.LLMatcher.grammar_from_regex(pattern), "the regular expression")

    def choice(self, options: Sequence[str]) -> Callable[[], Matched]:
        """One of these texts."""
        if not options or not all(options):
            raise UserError("choices must be texts, none of them empty", f"got {list(options)[:5]!r}", '["yes", "no"]')
        return self.grammar("start: " + " | ".join(literal(option) for option in options))

    def grammar(self, text: str) -> Callable[[], Matched]:
        """A context-free grammar: Lark's notation as llguidance reads it, or llama.cpp's GBNF (with ::=)."""
        if "::=" in text:
            from llguidance.gbnf_to_lark import any_to_lark

            try:
                text = any_to_lark(text)
            except Exception as error:  # its parser raises whatever it meets
                raise UserError("the grammar is not valid GBNF", _first_line(error), 'root ::= "yes" | "no"') from error
        return self._guides(self._lib.LLMatcher.grammar_from_lark(text), "the grammar")

    def _guides(self, grammar: str, what: str) -> Callable[[], Matched]:
        if len(grammar) > LARGEST:
            raise UserError(f"{what} is too large", f"{len(grammar):,} characters, at most {LARGEST:,}", "make it smaller")
        with self._lock:
            matcher = self._kept.pop(grammar, None)
        if matcher is None:
            matcher = self._lib.LLMatcher(self._tokens, grammar, log_level=0)
            first = b"" if matcher.is_error() else matcher.compute_bitmask()  # an answer must be able to begin, or it never ends
            if matcher.is_error() or not any(first):
                raise UserError(f"{what} cannot be followed", _reason(matcher.get_error() or "no text satisfies it"), "leave out what is named, or simplify it")
        with self._lock:
            self._kept[grammar] = matcher
            while len(self._kept) > KEPT:
                self._kept.popitem(last=False)
        return lambda: Matched(matcher.deep_copy(), self.vocab)


class Matched:
    """A guide (serve/request.py): one answer on its way through a grammar."""

    def __init__(self, matcher: Any, vocab: int) -> None:
        """`matcher`: a fresh LLMatcher that nobody else uses."""
        import torch

        self._matcher = matcher
        self._mask_W = torch.zeros(-(-vocab // 32), dtype=torch.int32)

    def mask(self) -> Tensor:
        """int32 words, bit i of word i // 32: token i may come. The same memory at every call."""
        self._matcher.unsafe_compute_mask_ptr(self._mask_W.data_ptr(), 4 * len(self._mask_W))
        if self._matcher.is_error():
            raise UserError("the answer's grammar became too complex", _reason(self._matcher.get_error()), "simplify the schema or the grammar")
        return self._mask_W

    def accept(self, token: int) -> None:
        """The token that was chosen; it must have been in the mask."""
        if not self._matcher.consume_token(token):
            raise UserError("the answer left its grammar", _reason(self._matcher.get_error()), "report it with the schema")

    @property
    def finished(self) -> bool:
        """Whether nothing but the end can follow."""
        return bool(self._matcher.is_stopped())


def allowing(ids: Iterable[int], vocab: int) -> Tensor:
    """A guide's mask of these tokens alone (ids below vocab)."""
    import torch

    words = [0] * -(-vocab // 32)
    for number in ids:
        words[number // 32] |= 1 << number % 32
    return torch.tensor([word - (word >> 31 << 32) for word in words], dtype=torch.int32)


class Among:
    """A guide that allows these tokens alone, and of them what another guide allows."""

    def __init__(self, ids: Sequence[int], vocab: int, other: Guide | None = None) -> None:
        """`other`: says what may come, and when it ends; None = nobody does."""
        self._mask_W, self._other = allowing(ids, vocab), other

    def mask(self) -> Tensor:
        """See Guide."""
        return self._mask_W if self._other is None else self._mask_W & self._other.mask()[: len(self._mask_W)]

    def accept(self, token: int) -> None:
        """See Guide."""
        if self._other is not None:
            self._other.accept(token)

    @property
    def finished(self) -> bool:
        """See Guide."""
        return self._other is not None and self._other.finished


class _Spelling:
    """Our tokenizer as llguidance's TokenizerWrapper wants it."""

    def __init__(self, tokenizer: Tokenizer, vocab: int, eos_ids: Sequence[int]) -> None:
        self.eos_token_id, self.bos_token_id = eos_ids[0], tokenizer.bos_id
        self.tokens = [tokenizer.token_bytes(number) for number in range(vocab)]
        known = min(vocab, tokenizer.vocab_size)
        self.special_token_ids = sorted({*(number for number in tokenizer.special_ids if number < vocab), *range(known, vocab)})
        self._encode = tokenizer.encode

    def __call__(self, text: bytes) -> list[int]:
        return self._encode(text.decode("utf-8", "replace"))


def literal(text: str) -> str:
    """A text as a terminal of a Lark grammar."""
    return json.dumps(text, ensure_ascii=False)


def json_rule(schema: Any) -> str:
    """A schema as a terminal of a Lark grammar, checked."""
    return "%json " + json.dumps({**json.loads(checked(schema)), "x-guidance": STYLE})


def checked(schema: Any) -> str:
    """The schema as JSON text. UserError for what is no schema, and for keywords that would be ignored, all of them named."""
    if isinstance(schema, bool) or not isinstance(schema, Mapping):
        raise UserError("the JSON schema is no object", f"it is {json.dumps(schema)[:80]}", '{"type": "object", "properties": {...}}')
    strange = sorted({keyword for keyword in _keywords(schema, 0) if keyword not in ENFORCED | ANNOTATIONS})
    if strange:
        why = f"an answer could break {'it' if len(strange) == 1 else 'them'} unseen; enforced are {', '.join(sorted(ENFORCED))}"
        raise UserError(f"unsupported JSON schema keyword{'s' * (len(strange) > 1)}: {', '.join(strange)}", why, "leave them out of the schema")
    return json.dumps(_exact(schema))


def _exact(schema: Any) -> Any:
    """The schema with each format as narrow as its standard."""
    if not isinstance(schema, Mapping):
        return schema
    found = dict(schema)
    for key in MAPS:
        if isinstance(found.get(key), Mapping):
            found[key] = {name: _exact(part) for name, part in found[key].items()}
    for key in LISTS:
        if isinstance(found.get(key), list):
            found[key] = [_exact(part) for part in found[key]]
    for key in SINGLES:
        if key in found:
            found[key] = _exact(found[key])
    if (stricter := STRICTER.get(str(found.get("format")))) is not None:
        found["allOf"] = [*found.get("allOf", []), *stricter] if isinstance(found.get("allOf", []), list) else found["allOf"]
    return found


def _keywords(schema: Any, depth: int) -> Iterator[str]:
    """Every keyword at every place where a schema stands."""
    if depth > 64:
        raise UserError("the JSON schema is nested too deeply", "more than 64 levels", "flatten it, or use $ref")
    if not isinstance(schema, Mapping):
        return
    for key, value in schema.items():
        yield str(key)
        inner: list[Any] = []
        if key in MAPS and isinstance(value, Mapping):
            inner = list(value.values())
        elif key in LISTS and isinstance(value, Sequence) and not isinstance(value, str):
            inner = list(value)
        elif key in SINGLES:
            if isinstance(value, Sequence):
                yield "items as a list (prefixItems is the name today)"
            inner = [value]
        for part in inner:
            yield from _keywords(part, depth + 1)


def _first_line(error: object) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


def _reason(text: str) -> str:
    """What llguidance says, on one line, without the state of its parser."""
    return " ".join(text.partition("<state>")[0].split())[:300]
