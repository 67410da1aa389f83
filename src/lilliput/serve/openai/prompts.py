"""A conversation as the model's prompt: what its chat template is told, and where the answer begins."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lilliput.base.errors import UserError
from lilliput.data import template as jinja
from lilliput.serve import reasoning, tools
from lilliput.serve.openai.errors import ApiError, from_user_error
from lilliput.serve.openai.served import Served
from lilliput.serve.request import Scored

Json = dict[str, Any]


@dataclass(frozen=True)
class Prompt:
    """The ids, and where the answer begins."""

    ids: list[int]
    at: reasoning.Begin


async def of_chat(served: Served, messages: Sequence[Mapping[str, Any]], functions: Sequence[Mapping[str, Any]], switches: Json | None = None,
                  *, opens: bool = True, goes_on: bool = False, special: bool = False) -> Prompt:  # fmt: skip
    """The messages through the template. `switches`: its own variables, checked by `told`; `opens`: begin the assistant's message; `goes_on`: the answer
    continues the last message; `special`: add the tokenizer's own tokens."""
    template = served.tokenizer.chat_template or ""
    wrapped: list[Json] | None = [{"type": "function", "function": function} for function in functions] or None
    if not tools.speaks_tools(template):
        messages, wrapped = tools.plain(messages, wrapped or ()), None
    try:
        text = served.tokenizer.apply_chat(messages, opens and not goes_on, tools=wrapped, more=switches)
    except UserError as error:
        raise from_user_error(error, "messages") from error
    at = reasoning.begin(template, text)
    if goes_on:
        text, at = _unclosed(text, messages[-1]["content"]), "after"
    return Prompt(await served.encode(text, special, "messages"), at)


def _unclosed(text: str, last: str) -> str:
    """The prompt up to the end of the last message's content."""
    at = text.rfind(last.strip())
    if not last.strip() or at < 0:
        raise ApiError("continue_final_message: the chat template does not show the last message as it is", "continue_final_message")
    kept = last.lstrip() if text.startswith(last.lstrip(), at) else last.strip()  # a template may strip the blanks
    return text[: at + len(kept)]


def cut(served: Served, ids: list[int], to: int | None, answer: int | None) -> list[int]:
    """The last `to` ids (truncate_prompt_tokens; -1: what an answer of `answer` tokens leaves of the context), all of them for None."""
    if to is None:
        return ids
    return ids[-(max(1, served.generator.engine.context - (answer or 1)) if to == -1 else to) :]


def scored(served: Served, logprobs: Sequence[Scored | None] | None) -> list[Json | None] | None:
    """The prompt's log probabilities as vLLM writes them: for each token {id: {logprob, rank, decoded_token}}, itself and the likeliest. The rank
    of one that is not among those asked for is not known."""
    if logprobs is None:
        return None
    named = lambda id, logprob, rank: {"logprob": max(logprob, -9999.0), "rank": rank, "decoded_token": served.spelled(id)[0]}
    return [None if one is None else {str(one.token): named(one.token, one.logprob, None)}
            | {str(id): named(id, value, rank) for rank, (id, value) in enumerate(one.top, 1)} for one in logprobs]  # fmt: skip


def told(served: Served, given: Mapping[str, Any] | None, effort: str | None) -> Json:
    """The template's own variables: chat_template_kwargs and reasoning_effort. ApiError for what this template does not read."""
    if not given and effort is None:
        return {}
    known = jinja.switches(served.tokenizer.chat_template or "")
    if strangers := sorted(set(given or {}) - known):
        reads = f"it reads {', '.join(sorted(known))}" if known else "it reads none of its own"
        raise ApiError(f"the chat template of `{served.name}` does not read `{strangers[0]}`; {reads}", "chat_template_kwargs")
    found = dict(given or {})
    if effort is not None and "reasoning_effort" in known:
        found["reasoning_effort"] = effort
    elif effort == "none" and "enable_thinking" in known:
        found["enable_thinking"] = False
    elif effort is not None and "enable_thinking" in known:
        raise ApiError(f"`{served.name}` thinks or does not, it knows no degrees: reasoning_effort is \"none\" or left out", "reasoning_effort")
    elif effort is not None:
        raise ApiError(f"the chat template of `{served.name}` does not read `reasoning_effort`: it would have no effect", "reasoning_effort")
    return found
