"""POST /v1/completions: text in, the text that follows out; the older call, which evaluation tools and benchmarks speak.

`echo` puts the prompt before the answer, with its log probabilities where they are asked for; with max_tokens 0 nothing but the prompt
comes back, scored (one token is sampled for it and thrown away).
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Any

from lilliput.base.errors import UserError
from lilliput.serve.openai import guides, prompts
from lilliput.serve.openai.errors import ApiError, from_user_error
from lilliput.serve.openai.protocol import CompletionRequest, Json
from lilliput.serve.openai.reply import DONE, Events, event
from lilliput.serve.openai.served import Run, Served
from lilliput.serve.request import Delta, Scored

DEFAULT_TOKENS = 16  # as at OpenAI
MOST_PROMPTS = 128


async def start(served: Served, body: CompletionRequest) -> Completion:
    """The request, checked and ready to run. ApiError for what cannot be answered."""
    adapter = served.adapter_of(body.model)
    served.check(body)
    asked = body.prompts()
    if not 1 <= len(asked) <= MOST_PROMPTS:
        raise ApiError(f"prompt holds {len(asked)} prompts, 1 to {MOST_PROMPTS} are taken", "prompt")
    ids = [await served.encode(prompt, body.add_special_tokens, "prompt") if isinstance(prompt, str) else prompt for prompt in asked]
    cut = [prompts.cut(served, prompt, body.truncate_prompt_tokens, body.max_tokens or DEFAULT_TOKENS) for prompt in ids]
    asked = [text if len(kept) == len(whole) else kept for text, whole, kept in zip(asked, ids, cut)]
    only_prompt = bool(body.echo) and body.max_tokens == 0
    guide = await guides.of_completion(served, body)
    if body.stream and (body.best_of or 1) > (body.n or 1):
        raise ApiError("best_of cannot be streamed: the best answers are known at the end", "best_of")
    more: dict[str, Any] = {"logprobs": body.logprobs, "best_of": body.best_of, "guide": guide, "adapter": adapter}
    more["prompt_logprobs"] = max((count for count in (body.logprobs if body.echo else None, body.prompt_logprobs) if count is not None), default=None)
    try:
        room = 1 if only_prompt else served.room(max(map(len, cut)), body.max_tokens, DEFAULT_TOKENS)
        sampling = body.sampling(room, served.defaults, **more)
        search = body.beam(room, adapter)
    except UserError as error:
        raise from_user_error(error) from error
    return Completion(Run(served, cut, sampling, "prompt", search), body, asked, only_prompt)


class Completion:
    """One completion request on its way."""

    def __init__(self, run: Run, body: CompletionRequest, asked: Sequence[str | list[int]], only_prompt: bool) -> None:
        """`asked`: the prompts as they were written."""
        self.run, self.body, self.only_prompt = run, body, only_prompt
        tokenizer, n = run.served.tokenizer, run.sampling.n
        texts = [prompt if isinstance(prompt, str) else tokenizer.decode(prompt, skip_special=False) for prompt in asked]
        self.answers = [Answer(run.served, body, texts[at // n], run.prompts[at // n], only_prompt) for at in range(n * len(asked))]
        self._head = {"id": f"cmpl-{secrets.token_hex(12)}", "object": "text_completion", "created": int(time.time()), "model": run.model}

    def _usage(self) -> Json:
        usage = self.run.usage()
        if self.only_prompt:
            usage |= {"completion_tokens": 0, "total_tokens": usage["prompt_tokens"]}
        return usage

    async def whole(self) -> Json:
        """The one document."""
        async with aclosing(self.run.deltas()) as stream:
            async for number, delta in stream:
                self.answers[number].take(delta)
        choices = [{"index": index, **answer.choice()} for index, answer in enumerate(self.answers)]
        return {**self._head, "choices": choices, "usage": self._usage()}

    async def events(self) -> Events:
        """The stream."""
        wanted, options = self.body.usage_wanted, self.body.stream_options
        async with aclosing(self.run.deltas()) as stream:
            async for number, delta in stream:
                answer = self.answers[number]
                text, scores = answer.take(delta)
                if text or scores is not None or answer.reason or self.body.return_token_ids:
                    choice = {"index": number, "text": text, "logprobs": scores, "finish_reason": answer.reason, "stop_reason": answer.stop_reason}
                    if self.body.return_token_ids:
                        choice |= {"token_ids": answer.ids[-1:] if delta.token is not None and not self.only_prompt else []}
                        choice |= {"prompt_token_ids": list(answer.prompt)} if len(answer.ids) <= 1 else {}
                    said: Json = {**self._head, "choices": [choice]}
                    if wanted:
                        said["usage"] = self._usage() if options is not None and options.continuous_usage_stats else None
                    yield event(said)
        if wanted:
            yield event({**self._head, "choices": [], "usage": self._usage()})
        yield DONE


class Answer:
    """One choice: its text so far, and its log probabilities as four lists."""

    def __init__(self, served: Served, body: CompletionRequest, prompt: str, ids: Sequence[int], only_prompt: bool) -> None:
        """`prompt`, `ids`: what was asked, for echo."""
        self._served, self._only_prompt = served, only_prompt
        self._echo = prompt if body.echo else None
        self.prompt, self._wanted, self._named = ids, body.logprobs is not None, body.logprobs or 0
        self._tells, self._scores_prompt = bool(body.return_token_ids), body.prompt_logprobs
        self.ids: list[int] = []
        self._prompt_logprobs: Sequence[Scored | None] | None = None
        self.text = ""
        self.logprobs = _empty()
        self.reason: str | None = None
        self.stop_reason: str | int | None = None

    def take(self, delta: Delta) -> tuple[str, Json | None]:
        """Add a delta; the new text and its log probabilities."""
        text, scores = "", _empty()
        self._prompt_logprobs = self._prompt_logprobs or delta.prompt_logprobs
        self.ids += [] if delta.token is None or self._only_prompt else [delta.token]
        if self._echo is not None:
            if self._wanted:
                for token, scored in zip(self.prompt, delta.prompt_logprobs or [None] * len(self.prompt)):
                    self._score(scores, token, scored)
            text, self._echo = self._echo, None
        if not self._only_prompt:
            if self._wanted and delta.token is not None and delta.logprob is not None:
                scored = Scored(delta.token, delta.logprob, delta.top)
                self._score(scores, delta.token, scored, at=len(self.text) + len(text))
            text += delta.text
        if delta.finish_reason is not None:
            self.reason, self.stop_reason = ("length", None) if self._only_prompt else (delta.finish_reason, delta.stop_reason)
        self.text += text
        for key, values in scores.items():
            self.logprobs[key] += values
        return text, scores if scores["tokens"] else None

    def _score(self, into: Json, token: int, scored: Scored | None, at: int | None = None) -> None:
        text = self._served.spelled(token)[0]
        if at is None:  # in the prompt: tokens follow each other
            at = into["text_offset"][-1] + len(into["tokens"][-1]) if into["tokens"] else len(self.text)
        into["tokens"].append(text)
        into["text_offset"].append(at)
        into["token_logprobs"].append(None if scored is None else max(scored.logprob, -9999.0))
        named = None if scored is None else {self._served.spelled(number)[0]: value for number, value in scored.top[: self._named]} | {text: scored.logprob}
        into["top_logprobs"].append(named)

    def choice(self) -> Json:
        """The whole choice, without its index."""
        logprobs = self.logprobs if self._wanted else None
        found: Json = {"text": self.text, "logprobs": logprobs, "finish_reason": self.reason, "stop_reason": self.stop_reason}
        if self._scores_prompt is not None:
            scored = None if self._prompt_logprobs is None else [one and replace(one, top=one.top[: self._scores_prompt]) for one in self._prompt_logprobs]
            found["prompt_logprobs"] = prompts.scored(self._served, scored)
        return found | ({"token_ids": self.ids, "prompt_token_ids": list(self.prompt)} if self._tells else {})


def _empty() -> Json:
    return {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
