"""POST /v1/chat/completions: messages in; text, tool calls, log probabilities out, whole or as a stream.

What the answer may be becomes one grammar: response_format, the tools that must or may be called, or structured_outputs. With
tool_choice auto the text is free until the model opens a call, which is then bound to the tool's schema.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from contextlib import aclosing
from typing import Any

from lilliput.base.errors import UserError
from lilliput.serve import tools
from lilliput.serve.openai.errors import ApiError, from_user_error
from lilliput.serve.openai.protocol import ChatRequest, Json, NamedTool, ResponseFormat, Structured
from lilliput.serve.openai.reply import DONE, Events, event
from lilliput.serve.openai.served import Run, Served
from lilliput.serve.request import Delta
from lilliput.serve.structured import Matched


async def start(served: Served, body: ChatRequest) -> Chat:
    """The request, checked and ready to run. ApiError for what cannot be answered."""
    adapter = served.adapter_of(body.model)
    bare = tools.is_bare(served.tokenizer.chat_template or "")
    functions = [] if body.tool_choice == "none" else [tool.function.plain() for tool in body.tools or ()]
    prompt = await served.encode_chat([message.plain() for message in body.messages], functions)
    guide = await _guide(served, body, functions, bare)
    asked = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    more: dict[str, Any] = {"logprobs": (body.top_logprobs or 0) if body.logprobs else None, "guide": guide, "adapter": adapter}
    try:
        sampling = body.sampling(served.room(len(prompt), asked, None), served.defaults, **more)
    except UserError as error:
        raise from_user_error(error) from error
    run = Run(served, [prompt], sampling, "messages")
    return Chat(run, body, [function["name"] for function in functions], bare)


async def _guide(served: Served, body: ChatRequest, functions: list[Json], bare: bool) -> Callable[[], Matched] | None:
    if body.structured_outputs is not None:
        if functions or body.response_format is not None:
            raise ApiError("structured_outputs goes without tools and response_format", "structured_outputs")
        return await structured(served, body.structured_outputs)
    schema = schema_of(body.response_format)
    if not functions:
        return None if schema is None else await served.guide(lambda: served.grammars.json_schema(schema), "response_format")
    if isinstance(body.tool_choice, NamedTool):
        functions = [function for function in functions if function["name"] == body.tool_choice.function.name]
    required, many = body.tool_choice not in (None, "auto"), body.parallel_tool_calls is not False
    try:
        grammars = served.grammars
    except UserError as error:
        if required or schema is not None:
            raise from_user_error(error, "tool_choice" if required else "response_format") from error
        return None  # free text, and calls as well as the model writes them
    return await served.guide(lambda: grammars.grammar(tools.rule(functions, required=required, many=many, bare=bare, answer=schema)), "tools")


def schema_of(wanted: ResponseFormat | None) -> Json | None:
    """The JSON schema of a response_format; None for free text."""
    if wanted is None or wanted.type == "text":
        return None
    return {"type": "object"} if wanted.json_schema is None else wanted.json_schema.schema_


async def structured(served: Served, wanted: Structured) -> Callable[[], Matched]:
    """The guide of vLLM's structured_outputs."""

    def make() -> Callable[[], Matched]:
        grammars = served.grammars
        if wanted.json_object is not None:
            return grammars.json_object()
        if wanted.regex is not None:
            return grammars.regex(wanted.regex)
        if wanted.choice is not None:
            return grammars.choice(wanted.choice)
        return grammars.grammar(wanted.grammar) if wanted.grammar is not None else grammars.json_schema(wanted.json_)

    return await served.guide(make, "structured_outputs")


class Chat:
    """One chat completion on its way."""

    def __init__(self, run: Run, body: ChatRequest, names: list[str], bare: bool) -> None:
        """`names`: of the tools that may be called."""
        self.run, self.body = run, body
        self.answers = [Answer(run.served, names, bare) for _ in range(run.sampling.n)]
        self._head = {"id": f"chatcmpl-{secrets.token_hex(12)}", "created": int(time.time()), "model": run.model}

    async def whole(self) -> Json:
        """The one document."""
        async with aclosing(self.run.deltas()) as stream:
            async for number, delta in stream:
                self.answers[number].take(delta)
        choices = [{"index": index, **answer.choice(self.body.logprobs is True)} for index, answer in enumerate(self.answers)]
        return {**self._head, "object": "chat.completion", "choices": choices, "usage": self.run.usage()}

    async def events(self) -> Events:
        """The stream."""
        head, wanted = {**self._head, "object": "chat.completion.chunk"}, self.body.usage_wanted
        options = self.body.stream_options

        def chunk(index: int, delta: Json, logprobs: list[Json] | None = None, reason: str | None = None) -> bytes:
            shown = {"content": logprobs, "refusal": None} if logprobs else None
            said = {**head, "choices": [{"index": index, "delta": delta, "logprobs": shown, "finish_reason": reason}]}
            if wanted:
                said["usage"] = self.run.usage() if options is not None and options.continuous_usage_stats else None
            return event(said)

        begun: set[int] = set()
        async with aclosing(self.run.deltas()) as stream:
            async for number, delta in stream:
                answer = self.answers[number]
                if number not in begun:
                    begun.add(number)
                    yield chunk(number, {"role": "assistant", "content": ""})
                scores = [answer.score(delta)] if self.body.logprobs and delta.token is not None else None
                parts = answer.take(delta)
                if scores and not parts:
                    parts = [{"content": ""}]
                for at, part in enumerate(parts):
                    yield chunk(number, part, scores if at == 0 else None)
                if delta.finish_reason is not None:
                    yield chunk(number, {}, reason=answer.reason)
        if wanted:
            yield event({**head, "choices": [], "usage": self.run.usage()})
        yield DONE


class Answer:
    """One choice: its text and calls so far."""

    def __init__(self, served: Served, names: list[str], bare: bool) -> None:
        """`names`: of the tools; none = the text is never searched for calls."""
        self._served = served
        self._parser = tools.Parser(names, bare) if names else None
        self.text = ""
        self.calls: list[Json] = []
        self.scores: list[Json] = []
        self.reason: str | None = None
        self.stop_reason: str | int | None = None

    def take(self, delta: Delta) -> list[Json]:
        """Add a delta; what is new of the message, as the stream shows it."""
        if delta.token is not None and delta.logprob is not None:
            self.scores.append(self.score(delta))
        if delta.finish_reason is not None:
            self.reason, self.stop_reason = delta.finish_reason, delta.stop_reason
        if self._parser is None:
            self.text += delta.text
            return [{"content": delta.text}] if delta.text else []
        events = self._parser.push(delta.text)
        if delta.finish_reason is not None:
            events += self._parser.flush()
        if delta.finish_reason == "stop" and self._parser.calls:
            self.reason = "tool_calls"
        return [self._show(one) for one in events]

    def _show(self, one: tools.Event) -> Json:
        if one.kind == "text":
            self.text += one.text
            return {"content": one.text}
        if one.kind == "call":
            call: Json = {"id": f"call_{secrets.token_hex(12)}", "type": "function", "function": {"name": one.text, "arguments": ""}}
            self.calls.append(call)
            return {"tool_calls": [{"index": one.call, **call, "function": dict(call["function"])}]}
        self.calls[one.call]["function"]["arguments"] += one.text
        return {"tool_calls": [{"index": one.call, "function": {"arguments": one.text}}]}

    def score(self, delta: Delta) -> Json:
        """OpenAI's log probability of one token."""
        assert delta.token is not None and delta.logprob is not None, "a sampled token has its probability"
        named = [self._named(token, logprob) for token, logprob in delta.top]
        return {**self._named(delta.token, delta.logprob), "top_logprobs": named}

    def _named(self, token: int, logprob: float) -> Json:
        text, raw = self._served.spelled(token)
        return {"token": text, "bytes": raw, "logprob": max(logprob, -9999.0)}

    def choice(self, logprobs: bool) -> Json:
        """The whole choice, without its index."""
        message: Json = {"role": "assistant", "content": self.text if self.text or not self.calls else None, "refusal": None}
        if self.calls:
            message["tool_calls"] = self.calls
        shown = {"content": self.scores, "refusal": None} if logprobs else None
        return {"message": message, "logprobs": shown, "finish_reason": self.reason, "stop_reason": self.stop_reason}
