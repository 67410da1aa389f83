"""POST /v1/chat/completions: messages in; text, tool calls, log probabilities out, whole or as a stream.

What the answer may be becomes one grammar (guides.py). With tool_choice auto the text is free until the model opens a call, which is then
bound to the tool's schema.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from contextlib import aclosing
from typing import Any

from lilliput.base.errors import UserError
from lilliput.serve import tools
from lilliput.serve.openai import guides, prompts
from lilliput.serve.openai.errors import from_user_error
from lilliput.serve.openai.protocol import ChatRequest, Json
from lilliput.serve.openai.reply import DONE, Events, event
from lilliput.serve.openai.served import Run, Served
from lilliput.serve.reasoning import Begin, Thinking
from lilliput.serve.request import Delta, Scored


async def start(served: Served, body: ChatRequest) -> Chat:
    """The request, checked and ready to run. ApiError for what cannot be answered."""
    adapter = served.adapter_of(body.model)
    served.check(body)
    bare = tools.is_bare(served.tokenizer.chat_template or "")
    functions = [] if body.tool_choice == "none" else [tool.function.plain() for tool in body.tools or ()]
    switches = prompts.told(served, body.chat_template_kwargs, body.reasoning_effort)
    prompt = await prompts.of_chat(served, [message.plain() for message in body.messages], functions, switches,
                                   opens=body.add_generation_prompt is not False, goes_on=body.continue_final_message,
                                   special=body.add_special_tokens)  # fmt: skip
    guide = await guides.of_chat(served, body, functions, bare, prompt.at)
    asked = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    ids = prompts.cut(served, prompt.ids, body.truncate_prompt_tokens, asked)
    more: dict[str, Any] = {"logprobs": (body.top_logprobs or 0) if body.logprobs else None, "adapter": adapter, "prompt_logprobs": body.prompt_logprobs}
    try:
        room = served.room(len(ids), asked, None)
        sampling = body.sampling(room, served.defaults, guide=guide, **more)
        search = body.beam(room, adapter)
    except UserError as error:
        raise from_user_error(error) from error
    run = Run(served, [ids], sampling, "messages", search)
    return Chat(run, body, [function["name"] for function in functions], bare, prompt.at)


class Chat:
    """One chat completion on its way."""

    def __init__(self, run: Run, body: ChatRequest, names: list[str], bare: bool, at: Begin) -> None:
        """`names`: of the tools that may be called; `at`: where the answers begin."""
        self.run, self.body = run, body
        self.answers = [Answer(run.served, names, bare, at, body.include_reasoning) for _ in range(run.sampling.n)]
        self._head = {"id": f"chatcmpl-{secrets.token_hex(12)}", "created": int(time.time()), "model": run.model}
        last = body.messages[-1]  # echo puts it before the answer where both are the assistant's, as at vLLM
        self._echo = str(last.plain()["content"]) if body.echo and last.role == "assistant" else ""

    async def whole(self) -> Json:
        """The one document."""
        async with aclosing(self.run.deltas()) as stream:
            async for number, delta in stream:
                self.answers[number].take(delta)
        choices = [{"index": index, **answer.choice(self.body.logprobs is True)} for index, answer in enumerate(self.answers)]
        more: Json = {}
        if self.body.return_token_ids:
            more["prompt_token_ids"] = list(self.run.prompts[0])
            choices = [{**choice, "token_ids": answer.ids} for choice, answer in zip(choices, self.answers)]
        if self.body.prompt_logprobs is not None:
            more["prompt_logprobs"] = prompts.scored(self.run.served, self.answers[0].prompt_logprobs)
        for choice in choices:
            choice["message"]["content"] = self._echo + choice["message"]["content"] if self._echo else choice["message"]["content"]
        return {**self._head, "object": "chat.completion", "choices": choices, "usage": self.usage(), **more}

    def usage(self) -> Json:
        """Token counts so far; those of thoughts are told apart where the model thinks."""
        thoughts = sum(answer.thoughts for answer in self.answers)
        return self.run.usage() | ({"completion_tokens_details": {"reasoning_tokens": thoughts}} if thoughts else {})

    async def events(self) -> Events:
        """The stream."""
        head, wanted = {**self._head, "object": "chat.completion.chunk"}, self.body.usage_wanted
        options, shows = self.body.stream_options, bool(self.body.return_token_ids)

        def chunk(index: int, delta: Json, logprobs: list[Json] | None = None, reason: str | None = None, more: Json | None = None,
                  prompt: bool = False) -> bytes:  # fmt: skip
            shown = {"content": logprobs, "refusal": None} if logprobs else None
            said = {**head, "choices": [{"index": index, "delta": delta, "logprobs": shown, "finish_reason": reason, **(more or {})}]}
            if prompt:
                said["prompt_token_ids"] = list(self.run.prompts[0])
            if wanted:
                said["usage"] = self.usage() if options is not None and options.continuous_usage_stats else None
            return event(said)

        begun: set[int] = set()
        async with aclosing(self.run.deltas()) as stream:
            async for number, delta in stream:
                answer = self.answers[number]
                if number not in begun:
                    begun.add(number)
                    yield chunk(number, {"role": "assistant", "content": self._echo}, prompt=shows)
                scores = [answer.score(delta)] if self.body.logprobs and delta.token is not None else None
                parts = answer.take(delta)
                ids = {"token_ids": [delta.token]} if shows and delta.token is not None else None
                if (scores or ids) and not parts:
                    parts = [{"content": ""}]
                for at, part in enumerate(parts):
                    yield chunk(number, part, scores if at == 0 else None, more=ids if at == 0 else None)
                if delta.finish_reason is not None:
                    yield chunk(number, {}, reason=answer.reason)
        if wanted:
            yield event({**head, "choices": [], "usage": self.usage()})
        yield DONE


class Answer:
    """One choice: its text and calls so far."""

    def __init__(self, served: Served, names: list[str], bare: bool, at: Begin = "after", shows: bool = True) -> None:
        """`names`: of the tools; none = the text is never searched for calls. `at`: where it begins; `shows`: give the thought, too."""
        self._served = served
        self._parser = tools.Parser(names, bare) if names else None
        self._thinking, self._shows = Thinking(at), shows
        self.text = self.thought = ""
        self.thoughts = 0  # tokens
        self.ids: list[int] = []
        self.prompt_logprobs: Sequence[Scored | None] | None = None
        self.calls: list[Json] = []
        self.scores: list[Json] = []
        self.reason: str | None = None
        self.stop_reason: str | int | None = None

    def take(self, delta: Delta) -> list[Json]:
        """Add a delta; what is new of the message, as the stream shows it."""
        self.prompt_logprobs = self.prompt_logprobs or delta.prompt_logprobs
        self.ids += [] if delta.token is None else [delta.token]
        if delta.token is not None and delta.logprob is not None:
            self.scores.append(self.score(delta))
        if delta.finish_reason is not None:
            self.reason, self.stop_reason = delta.finish_reason, delta.stop_reason
        self.thoughts += delta.token is not None and self._thinking.at == "inside"
        thought, text = self._thinking.push(delta.text)
        if delta.finish_reason is not None:
            thought, text = (one + rest for one, rest in zip((thought, text), self._thinking.flush()))
        parts: list[Json] = [{"reasoning_content": thought}] if thought and self._shows else []
        self.thought += thought if self._shows else ""
        return parts + self._spoken(text, delta)

    def _spoken(self, text: str, delta: Delta) -> list[Json]:
        if self._parser is None:
            self.text += text
            return [{"content": text}] if text else []
        events = self._parser.push(text)
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
        message: Json = {"role": "assistant", "content": self.text if self.text or not (self.calls or self.thought) else None, "refusal": None}
        if self.thought:
            message["reasoning_content"] = self.thought
        if self.calls:
            message["tool_calls"] = self.calls
        shown = {"content": self.scores, "refusal": None} if logprobs else None
        return {"message": message, "logprobs": shown, "finish_reason": self.reason, "stop_reason": self.stop_reason}
