"""POST /v1/responses: OpenAI's newer call, as far as it goes without memory: nothing is stored, so no previous_response_id.

It is the chat of chat.py in other words: items become messages, and what the model writes becomes items, one after the other: a message
of text, or a function call. In a stream each item is announced, filled and closed by events that have a number and a name.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator
from contextlib import aclosing
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from lilliput.serve.openai import chat
from lilliput.serve.openai.errors import ApiError
from lilliput.serve.openai.protocol import Body, ChatRequest, Json, Number, Part
from lilliput.serve.openai.reply import Events, event
from lilliput.serve.openai.served import Served


class MessageItem(Body):
    """Something that was said."""

    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Part]
    id: str | None = None
    status: str | None = None


class CallItem(Body):
    """A call that the model made."""

    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str
    id: str | None = None
    status: str | None = None


class OutputItem(Body):
    """What the call gave."""

    type: Literal["function_call_output"]
    call_id: str
    output: str | list[Part]
    id: str | None = None
    status: str | None = None


class Thought(Body):
    """A piece of what the model thought."""

    type: Literal["reasoning_text"]
    text: str


class ReasoningItem(Body):
    """What the model thought before its next item."""

    type: Literal["reasoning"]
    content: list[Thought] | None = None
    summary: Annotated[list[Any], Field(max_length=0)] | None = None
    encrypted_content: None = None
    id: str | None = None
    status: str | None = None


class Reasoning(Body):
    """How much it thinks."""

    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = None
    summary: None = None
    generate_summary: None = None


class FunctionTool(Body):
    """A function the model may call."""

    type: Literal["function"]
    name: str
    description: str | None = None
    parameters: Json | None = None
    strict: bool | None = None


class NamedChoice(Body):
    """tool_choice: this one."""

    type: Literal["function"]
    name: str


class Format(Body):
    """What the text has to be."""

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    schema_: Json | None = Field(None, alias="schema")
    strict: bool | None = None
    description: str | None = None


class TextOptions(Body):
    """Options of the text."""

    format: Format | None = None
    verbosity: Literal["medium"] | None = None


class ResponsesRequest(Body):
    """The stateless part of OpenAI's request."""

    input: str | Annotated[list[CallItem | OutputItem | ReasoningItem | MessageItem], Field(min_length=1)]
    model: str | None = None
    instructions: str | None = None
    max_output_tokens: int | None = None
    temperature: Number | None = None
    top_p: Number | None = None
    stream: bool | None = None
    tools: list[FunctionTool] | None = Field(None, max_length=128)
    tool_choice: Literal["none", "auto", "required"] | NamedChoice | None = None
    parallel_tool_calls: bool | None = None
    text: TextOptions | None = None
    metadata: dict[str, str] | None = None
    user: str | None = None
    store: Literal[False] | None = None
    background: Literal[False] | None = None
    truncation: Literal["disabled"] | None = None
    service_tier: Literal["auto", "default"] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    reasoning: Reasoning | None = None
    include: list[str] | None = None

    @field_validator("include")
    @classmethod
    def _nothing_more(cls, value: list[str] | None) -> list[str] | None:
        if value:
            raise ValueError(f"{value[0]} is not to be had here: nothing is stored or encrypted, and log probabilities are /v1/chat/completions'")
        return value

    def as_chat(self) -> ChatRequest:
        """The same as a chat. ApiError for what does not fit together."""
        messages: list[Json] = [{"role": "system", "content": self.instructions}] if self.instructions else []
        items = [MessageItem(role="user", content=self.input)] if isinstance(self.input, str) else self.input
        thought: Json = {}  # goes with the message or the calls that follow it
        for item in items:
            if isinstance(item, ReasoningItem):
                thought = {"reasoning_content": "".join(part.text for part in item.content or ())}
            elif isinstance(item, MessageItem):
                messages.append({"role": item.role, "content": _text(item.content), **(thought if item.role == "assistant" else {})})
                thought = {}
            elif isinstance(item, OutputItem):
                messages.append({"role": "tool", "tool_call_id": item.call_id, "content": _text(item.output)})
            else:
                call = {"id": item.call_id, "type": "function", "function": {"name": item.name, "arguments": item.arguments}}
                if not messages or messages[-1]["role"] != "assistant":
                    messages.append({"role": "assistant", "content": None, "tool_calls": [], **thought})
                    thought = {}
                messages[-1].setdefault("tool_calls", []).append(call)
        body: Json = {name: value for name in ("model", "temperature", "top_p", "stream", "parallel_tool_calls") if (value := getattr(self, name)) is not None}
        if self.reasoning is not None and self.reasoning.effort is not None:
            body["reasoning_effort"] = self.reasoning.effort
        if self.tools:
            body["tools"] = [{"type": "function", "function": tool.model_dump(exclude={"type"})} for tool in self.tools]
            choice = self.tool_choice
            body["tool_choice"] = {"type": "function", "function": {"name": choice.name}} if isinstance(choice, NamedChoice) else choice
        wanted = self.text.format if self.text is not None else None
        if wanted is not None and wanted.type == "json_schema":
            if wanted.schema_ is None:
                raise ApiError("a format of type json_schema needs a schema", "text.format.schema")
            body["response_format"] = {"type": "json_schema", "json_schema": {"name": wanted.name or "answer", "schema": wanted.schema_}}
        elif wanted is not None:
            body["response_format"] = {"type": wanted.type}
        try:
            return ChatRequest.model_validate(body | {"messages": messages, "max_tokens": self.max_output_tokens})
        except ValueError as error:
            raise ApiError(str(error).splitlines()[-2].strip() if "\n" in str(error) else str(error), "input") from error


def _text(content: str | list[Part]) -> str:
    return content if isinstance(content, str) else "".join(part.content for part in content)


async def start(served: Served, body: ResponsesRequest) -> Answering:
    """The request, checked and ready to run. ApiError for what cannot be answered."""
    if body.tool_choice not in (None, "none", "auto") and not body.tools:
        raise ApiError("tool_choice needs tools", "tool_choice")
    return Answering(await chat.start(served, body.as_chat()), body)


class Answering:
    """One response on its way."""

    def __init__(self, talk: chat.Chat, body: ResponsesRequest) -> None:
        """`talk`: the chat that answers."""
        self.talk, self.body, self.items = talk, body, Items()
        self._id, self._created = f"resp_{secrets.token_hex(12)}", int(time.time())

    async def whole(self) -> Json:
        """The one document."""
        async for _ in self.events():
            pass
        return self._document()

    async def events(self) -> Events:
        """The stream."""
        count = 0

        def numbered(kind: str, data: Json) -> bytes:
            nonlocal count
            count += 1
            return event({"type": kind, "sequence_number": count - 1, **data}, kind)

        yield numbered("response.created", {"response": self._document()})
        yield numbered("response.in_progress", {"response": self._document()})
        answer = self.talk.answers[0]
        try:
            async with aclosing(self.talk.run.deltas()) as stream:
                async for _, delta in stream:
                    for part in answer.take(delta):
                        for kind, data in self.items.take(part):
                            yield numbered(kind, data)
        except ApiError as error:
            if not self.body.stream:
                raise
            fault = {"code": error.code or "server_error", "message": error.message}
            yield numbered("response.failed", {"response": {**self._document(), "status": "failed", "error": fault}})
            return
        for kind, data in self.items.close():
            yield numbered(kind, data)
        document = self._document()
        yield numbered(f"response.{document['status']}", {"response": document})

    def _document(self) -> Json:
        reason, usage, body = self.talk.answers[0].reason, self.talk.run.usage(), self.body
        status = "in_progress" if reason is None else "incomplete" if reason == "length" else "completed"
        wanted = body.text.format if body.text is not None else None
        counts = {
            "input_tokens": usage["prompt_tokens"],
            "input_tokens_details": usage["prompt_tokens_details"],
            "output_tokens": usage["completion_tokens"],
            "output_tokens_details": {"reasoning_tokens": self.talk.answers[0].thoughts},
            "total_tokens": usage["total_tokens"],
        }
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "status": status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata or {},
            "model": self.talk.run.model,
            "output": self.items.output,
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": None,
            "reasoning": {"effort": body.reasoning.effort if body.reasoning is not None else None, "summary": None},
            "store": False,
            "temperature": self.talk.run.sampling.temperature,
            "text": {"format": {"type": "text"} if wanted is None else wanted.model_dump(by_alias=True, exclude_none=True)},
            "tool_choice": body.tool_choice if isinstance(body.tool_choice, str) else "auto" if body.tool_choice is None else body.tool_choice.model_dump(),
            "tools": [{"strict": False, **tool.model_dump(exclude_none=True)} for tool in body.tools or ()],
            "top_p": self.talk.run.sampling.top_p,
            "truncation": "disabled",
            "usage": None if reason is None else counts,
            "user": body.user,
        }


class Items:
    """What the model writes, as a list of items; each change is an event (name, data)."""

    def __init__(self) -> None:
        self.output: list[Json] = []
        self._open = False  # the last item is not finished

    def take(self, part: Json) -> Iterator[tuple[str, Json]]:
        """A piece of a chat's message: {"reasoning_content": text}, {"content": text} or {"tool_calls": [...]}."""
        if "reasoning_content" in part:
            if not (self._open and self.output[-1]["type"] == "reasoning"):
                yield from self.close()
                thought: Json = {"type": "reasoning", "id": f"rs_{secrets.token_hex(12)}", "status": "in_progress", "summary": [], "content": []}
                yield from self._begin(thought)
                thought["content"] = [{"type": "reasoning_text", "text": ""}]
            self.output[-1]["content"][0]["text"] += part["reasoning_content"]
            yield "response.reasoning_text.delta", self._at({"content_index": 0, "delta": part["reasoning_content"]})
            return
        if "content" in part:
            if not (self._open and self.output[-1]["type"] == "message"):
                yield from self.close()
                item: Json = {"type": "message", "id": f"msg_{secrets.token_hex(12)}", "status": "in_progress", "role": "assistant", "content": []}
                yield from self._begin(item)
                yield "response.content_part.added", self._at({"content_index": 0, "part": _part("")})
                item["content"] = [_part("")]
            self.output[-1]["content"][0]["text"] += part["content"]
            yield "response.output_text.delta", self._at({"content_index": 0, "delta": part["content"], "logprobs": []})
            return
        call = part["tool_calls"][0]
        if "id" in call:
            yield from self.close()
            named = {"call_id": call["id"], "name": call["function"]["name"], "arguments": ""}
            yield from self._begin({"type": "function_call", "id": f"fc_{secrets.token_hex(12)}", "status": "in_progress", **named})
            return
        self.output[-1]["arguments"] += call["function"]["arguments"]
        yield "response.function_call_arguments.delta", self._at({"delta": call["function"]["arguments"]})

    def close(self) -> Iterator[tuple[str, Json]]:
        """The last item is whole."""
        if not self._open:
            return
        item, self._open = self.output[-1], False
        item["status"] = "completed"
        if item["type"] == "reasoning":
            yield "response.reasoning_text.done", self._at({"content_index": 0, "text": item["content"][0]["text"]})
        elif item["type"] == "message":
            yield "response.output_text.done", self._at({"content_index": 0, "text": item["content"][0]["text"], "logprobs": []})
            yield "response.content_part.done", self._at({"content_index": 0, "part": item["content"][0]})
        else:
            yield "response.function_call_arguments.done", self._at({"arguments": item["arguments"], "name": item["name"]})
        yield "response.output_item.done", {"output_index": len(self.output) - 1, "item": item}

    def _begin(self, item: Json) -> Iterator[tuple[str, Json]]:
        self.output.append(item)
        self._open = True
        yield "response.output_item.added", {"output_index": len(self.output) - 1, "item": dict(item)}

    def _at(self, data: Json) -> Json:
        return {"item_id": self.output[-1]["id"], "output_index": len(self.output) - 1, **data}


def _part(text: str) -> Json:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
