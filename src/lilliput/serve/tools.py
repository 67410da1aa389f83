"""Tool calls: how tools get into a prompt, and how calls get out of a stream of text.

A model that was trained on tools has them in its chat template. For others the list of tools goes into the system message, calls and
results into plain messages, in the form most small models know (Hermes, Qwen, SmolLM2):

    <tool_call>
    {"name": "weather", "arguments": {"city": "Oslo"}}
    </tool_call>

`Parser` reads that from text that comes in pieces, and passes a call on while it is written: first its name, then the text of its
arguments as it grows. It looks at one character at a time, so any cut of a text gives the same calls. What looks like a call and is
none (broken JSON before the name, a name that no tool has) comes out as the text it is.

`rule` says the same form as a grammar, so that with structured output every call is one: required, or of a certain tool, or free text
until the model opens a call by itself.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from lilliput.serve.structured import json_rule, literal

OPEN, CLOSE = "<tool_call>", "</tool_call>"
BLANK = " \t\r\n"
PROMPT = """You have access to these tools:
<tools>
{}
</tools>
To call a tool, answer with its name and its arguments:
<tool_call>
{{"name": "NAME", "arguments": {{...}}}}
</tool_call>"""

Scan = Generator[None, str, str]  # takes characters, returns the first one that is not its own


@dataclass(frozen=True)
class Event:
    """Text outside of calls, the beginning of call number `call` (text = its name), or more text of its arguments."""

    kind: Literal["text", "call", "arguments"]
    text: str
    call: int = -1


class _NoCallError(Exception):
    """What is read is no call."""


class Parser:
    """Text in pieces -> events. `calls`: how many have begun."""

    def __init__(self, names: Collection[str], bare: bool = False) -> None:
        """`names`: the tools there are. `bare`: an answer that begins with `{` or `[` is a call too, without tags (Llama 3)."""
        self.names, self.calls = frozenset(names), 0
        self._bare = bare  # ... until something else was seen
        self._held = ""  # outside of calls: blanks, and what may be the beginning of a tag
        self._scan: Scan | None = None  # inside of a call
        self._tag = self._raw = ""  # how it was opened, with the blanks before; what came since
        self._given = False  # was any of it passed on
        self._out: list[Event] = []

    def push(self, text: str) -> list[Event]:
        """The events that this piece makes certain, neighbours of a kind joined."""
        for character in text:
            self._feed(character)
        found, self._out = self._out, []
        return found

    def flush(self) -> list[Event]:
        """The end of the text: what was held back."""
        while self._scan is not None:
            self._leave(complete=False)
        if self._held.strip(BLANK) or not self.calls:
            self._emit("text", self._held)
        self._held = ""
        return self.push("")

    def _feed(self, character: str) -> None:
        if self._scan is None:
            self._outside(character)
            return
        self._raw += character
        try:
            self._scan.send(character)
        except StopIteration:
            self._leave(complete=True)
        except _NoCallError:
            if self._given:  # its name is out: the rest of it is dropped
                self._scan = self._until_closed()
                next(self._scan)
            else:
                self._leave(complete=False)

    def _outside(self, character: str) -> None:
        self._held += character
        word = self._held.lstrip(BLANK)
        if word == OPEN:
            self._enter("")
        elif self._bare and word in ("{", "["):
            self._held = self._held[:-1]
            self._enter(character)
        elif word and not OPEN.startswith(word):  # hold back only an end that may begin a tag, and the blanks before it
            keep = next((n for n in range(min(len(OPEN) - 1, len(word)), 0, -1) if OPEN.startswith(word[-n:])), 0)
            keep += len(self._held[: len(self._held) - keep]) - len(self._held[: len(self._held) - keep].rstrip(BLANK))
            self._emit("text", self._held[: len(self._held) - keep])
            self._held = self._held[len(self._held) - keep :]
            self._bare = False

    def _enter(self, first: str) -> None:
        self._tag, self._raw, self._held, self._given = self._held, "", "", False
        self._scan = self._body(tagged=not first)
        next(self._scan)
        if first:
            self._feed(first)

    def _leave(self, complete: bool) -> None:
        """Leave a call. What was none is text again, and what it held is read once more."""
        tag, raw, self._scan, self._bare = self._tag, self._raw, None, False
        if complete or self._given:
            return
        self._emit("text", tag)
        for character in raw:
            self._feed(character)

    def _emit(self, kind: Literal["text", "call", "arguments"], text: str, call: int = -1) -> None:
        last = self._out[-1] if self._out else None
        if last is not None and kind != "call" and (last.kind, last.call) == (kind, call):
            self._out[-1] = Event(kind, last.text + text, call)
        elif text:
            self._out.append(Event(kind, text, call))

    # ---- the grammar of a call, one character at a time

    def _body(self, tagged: bool) -> Scan:
        c = yield from _after_blanks()
        if c == "[":
            c = yield from _after_blanks()
            while c != "]":
                yield from self._call(c)
                c = yield from _after_blanks()
                if c == ",":
                    c = yield from _after_blanks()
                elif c != "]":
                    raise _NoCallError
        else:
            yield from self._call(c)
        if not tagged:
            while True:  # what follows a bare call is dropped
                yield
        c = yield from _after_blanks()
        for expected in CLOSE:
            if c != expected:
                return (yield from self._until_closed())
            if expected != CLOSE[-1]:
                c = yield
        return ""

    def _until_closed(self) -> Scan:
        while not self._raw.endswith(CLOSE):
            yield
        return ""

    def _call(self, c: str) -> Scan:
        if c != "{":
            raise _NoCallError
        number, waiting, some = -1, "", False

        def take(text: str) -> None:
            nonlocal waiting
            if number < 0:
                waiting += text
            else:
                self._emit("arguments", text, number)

        c = yield from _after_blanks()
        while c != "}":
            if c != '"':
                raise _NoCallError
            key = yield from _string()
            if (yield from _after_blanks()) != ":":
                raise _NoCallError
            c = yield from _after_blanks()
            if key == "name" and number < 0:
                if c != '"' or (name := (yield from _string())) not in self.names:
                    raise _NoCallError
                number, self.calls, self._given = self.calls, self.calls + 1, True
                self._emit("call", name, number)
                take(waiting)
                c = yield from _after_blanks()
            elif key in ("arguments", "parameters") and not some:
                some = True
                if c == '"':  # JSON in a string
                    take((yield from _string()))
                    c = yield from _after_blanks()
                else:
                    c = yield from _value(c, take)
            else:
                c = yield from _value(c, lambda text: None)
            if c == ",":
                c = yield from _after_blanks()
            elif c != "}":
                raise _NoCallError
        if number < 0:
            raise _NoCallError
        if not some:
            take("{}")
        return ""


def _after_blanks() -> Scan:
    while (c := (yield)) in BLANK:
        pass
    return c


def _string() -> Scan:
    """The value of a string whose opening quote was read."""
    raw = '"'
    while True:
        raw += (c := (yield))
        if c == "\\":
            raw += yield
        elif c == '"':
            try:
                return str(json.loads(raw, strict=False))
            except ValueError:
                raise _NoCallError from None


def _value(c: str, take: Callable[[str], None]) -> Scan:
    """Any value that begins with c, its text given to `take`; the first character after it that is no blank."""
    if c not in '{["':
        while c not in ",}]" + BLANK:
            take(c)
            c = yield
        return c if c not in BLANK else (yield from _after_blanks())
    open_, quoted = "", False
    while True:
        take(c)
        if quoted:
            if c == "\\":
                take((yield))
            quoted = c != '"'
        elif c == '"':
            quoted = True
        elif c in "{[":
            open_ += c
        elif c in "}]":
            if open_[-1:] != {"}": "{", "]": "["}[c]:
                raise _NoCallError
            open_ = open_[:-1]
        if not quoted and not open_:
            return (yield from _after_blanks())
        c = yield


# ---- prompts


def speaks_tools(template: str) -> bool:
    """Whether a chat template shows tools by itself."""
    return "tools" in template


def is_bare(template: str) -> bool:
    """Whether the model writes calls without tags: its template asks for {"name", "parameters"} (Llama 3)."""
    return speaks_tools(template) and OPEN not in template and '"parameters"' in template


def plain(messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The conversation for a template that knows no tools: the list in the system message, calls and results as text."""
    listed = PROMPT.format("\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)) if tools else ""
    result: list[dict[str, Any]] = []
    for message in messages:
        role, text = message["role"], message.get("content") or ""
        if role == "tool":
            role, text = "user", f"<tool_response>\n{text}\n</tool_response>"
            if result and result[-1].get("responses"):  # results of several calls are one message
                result[-1]["content"] += "\n" + text
                continue
            result.append({"role": role, "content": text, "responses": True})
            continue
        for call in message.get("tool_calls") or ():
            called = f'{{"name": {json.dumps(call["function"]["name"])}, "arguments": {_as_text(call["function"]["arguments"])}}}'
            text += ("\n" if text else "") + f"{OPEN}\n{called}\n{CLOSE}"
        thought = {"reasoning_content": message["reasoning_content"]} if message.get("reasoning_content") else {}
        result.append({"role": role, "content": text, **thought})
    if listed:
        if not result or result[0]["role"] != "system":
            result.insert(0, {"role": "system", "content": "You are a helpful assistant."})
        result[0] = {"role": "system", "content": f"{result[0]['content']}\n\n{listed}".strip()}
    return [{key: value for key, value in message.items() if key != "responses"} for message in result]


def _as_text(arguments: Any) -> str:
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)


# ---- grammar


def rule(tools: Sequence[Mapping[str, Any]], *, required: bool, many: bool, bare: bool = False, answer: Any = None) -> str:
    """The Lark grammar of an answer that may call these tools. `required`: nothing but calls; `many`: more than one; `answer`: the JSON
    schema of an answer without calls, None = free text, in which calls may come. UserError for a schema that cannot be enforced."""
    begin, end, key = ("", "}", "parameters") if bare else (OPEN + "\n", "}\n" + CLOSE, "arguments")

    def body(tool: Mapping[str, Any], begin: str) -> str:
        head = f'{begin}{{"name": {json.dumps(tool["name"])}, "{key}": '
        return f"{literal(head)} {json_rule(tool.get('parameters') or {'type': 'object'})} {literal(end)}"

    if required or bare or answer is not None:
        calls = "calls: call (BLANK call)*" if many and not bare else "calls: call"
        other = "" if required else " | other"
        free = f"\nother: {json_rule(answer)}" if answer is not None else "\nother: TEXT\nTEXT: /[^{\\[](.|\\n)*/"
        return f'start: calls{other}\n{calls}\nBLANK: "\\n"\ncall: {" | ".join(body(tool, begin) for tool in tools)}' + ("" if required else free)
    rest = " | ".join(body(tool, begin.removeprefix(OPEN)) for tool in tools)
    return f"start: called{'*' if many else '?'} TEXT\nTEXT: /(.|\\n)*/\nopened[lazy]: TEXT {literal(OPEN)}\ncalled: opened body\nbody: {rest}"
