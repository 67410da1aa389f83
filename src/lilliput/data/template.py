"""Chat templates: the Jinja program a model ships to turn messages into the one string it was trained on.

Templates come with downloaded weights, so they are untrusted code: they run in jinja2's immutable sandbox and see
plain JSON values only. Blocks are trimmed, and `raise_exception`, `strftime_now`, `tojson` and `{% generation %}` exist,
as in transformers (utils/chat_template_utils.py), so that both render the same string.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.nodes
import jinja2.parser
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError

from lilliput.base.errors import UserError

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


GIVEN = frozenset(("messages", "tools", "documents", "add_generation_prompt"))


class _Sandbox(ImmutableSandboxedEnvironment):
    """jinja2's sandbox turns a forbidden attribute into an undefined value; here it stops the template."""

    def unsafe_undefined(self, obj: Any, attribute: str) -> jinja2.Undefined:
        """Called by jinja2 for every forbidden attribute."""
        raise SecurityError(f"access to attribute {attribute!r} of a {type(obj).__name__} is not allowed")


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` marks assistant text in some templates; it changes nothing in what is rendered."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        """The nodes between the tags, as they are."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _environment() -> jinja2.Environment:
    environment = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"])
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda pattern: datetime.now().strftime(pattern)
    return environment


@lru_cache(maxsize=8)
def _compile(template: str) -> jinja2.Template:
    try:
        return _environment().from_string(template)
    except jinja2.TemplateSyntaxError as error:
        raise UserError("the chat template is not valid Jinja", f"line {error.lineno}: {error.message}", "mend chat_template in the model's folder") from error


@lru_cache(maxsize=8)
def switches(template: str) -> frozenset[str]:
    """What a template reads beside what render gives by itself: enable_thinking, ... UserError for one that is not Jinja."""
    _compile(template)
    environment = _environment()
    found = jinja2.meta.find_undeclared_variables(environment.parse(template))
    return frozenset(name for name in found if name not in GIVEN and name not in environment.globals and not name.endswith("_token"))


def render(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    add_generation_prompt: bool,
    tools: Sequence[Mapping[str, Any]] | None,
    special_tokens: Mapping[str, str],
    more: Mapping[str, Any] | None = None,
) -> str:
    """The prompt string. `special_tokens`: {"bos_token": "<s>", ...} as the template's variables; `more`: variables of its own (JSON values).

    UserError when the template is broken, tries to leave the sandbox, or refuses the conversation.
    """
    try:
        plain_messages, plain_tools = json.loads(json.dumps([list(messages), None if tools is None else list(tools)]))
    except TypeError as error:
        raise UserError("messages must hold JSON values only", str(error), 'messages=[{"role": "user", "content": "..."}]') from error
    compiled = _compile(template)
    try:
        return compiled.render(
            messages=plain_messages, tools=plain_tools, documents=None, add_generation_prompt=add_generation_prompt, **special_tokens, **(more or {})
        )
    except SecurityError as error:
        raise UserError("the chat template tries to leave its sandbox", str(error), "do not use this model's template: it reaches into Python") from error
    except Exception as error:  # the template is a foreign program: whatever it raises is its fault or the conversation's
        roles = ", ".join(str(message.get("role")) for message in plain_messages)
        raise UserError("the chat template refuses this conversation", f"{type(error).__name__}: {error} (roles: {roles})") from error
