"""What all routes share: the engine, the tokenizer, the names, the limits; and `Run`, one request from prompts to deltas.

A Run cancels its requests in the engine whenever its iterator is closed: the client left, the time is over, the server stops.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, cast

from lilliput.base.errors import UserError
from lilliput.serve.async_engine import AsyncEngine
from lilliput.serve.metrics import Metrics, Watch
from lilliput.serve.openai.errors import ApiError, from_user_error
from lilliput.serve.reasoning import Begin, afterwards
from lilliput.serve.request import Delta, Guide, Sampling

if TYPE_CHECKING:
    from lilliput.base.job import Http
    from lilliput.data.tokenizer import Tokenizer
    from lilliput.serve.adapters import Library
    from lilliput.serve.beams import Beam
    from lilliput.serve.embeddings import Embedder
    from lilliput.serve.openai.protocol import Common
    from lilliput.serve.structured import Grammars

THEIRS = ("too complex", "forbid all")  # in the message of an answer that broke off because of what was asked for
LONG = 4096  # characters; a longer text is encoded beside the event loop


@dataclass
class Served:
    """One model behind the API. `engine` is None where the model only embeds."""

    name: str
    options: Http
    tokenizer: Tokenizer
    metrics: Metrics
    engine: AsyncEngine | None = None
    embedder: Embedder | None = None
    defaults: Mapping[str, Any] = field(default_factory=dict)  # of sampling, where a request says nothing
    library: Library | None = None  # where adapters are loaded from; None: from nowhere
    created: int = field(default_factory=lambda: int(time.time()))
    open: int = 0  # requests in flight

    @cached_property
    def grammars(self) -> Grammars:
        """The compiler of structured output. UserError where it is not installed."""
        from lilliput.serve.structured import Grammars

        return Grammars(self.tokenizer, self.generator.engine.model.facts.vocab, self.ends)

    @property
    def ends(self) -> tuple[int, ...]:
        """Tokens that end an answer."""
        return tuple(dict.fromkeys((*self.tokenizer.eos_ids, *self.generator.engine.model.spec.eos_ids)))

    @property
    def generator(self) -> AsyncEngine:
        """The engine. ApiError where this model only embeds."""
        if self.engine is None:
            raise ApiError(f"`{self.name}` is an encoder: it gives embeddings and writes no text", "model")
        return self.engine

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names of the loaded adapters."""
        return () if self.engine is None else self.engine.engine.adapters.names

    def adapter_of(self, asked: str | None) -> str:
        """The adapter that a request's `model` names, empty for the model itself. ApiError 404 for what is not served here."""
        if asked is None or asked == self.name:
            return ""
        if asked not in self.adapters:
            others = f", with the adapters {', '.join(self.adapters)}" if self.adapters else ""
            raise ApiError(f"the model `{asked}` is not served here; this is `{self.name}`{others}", "model", 404, "model_not_found")
        return asked

    def check(self, body: Common) -> None:
        """ApiError for a field that nothing here would heed."""
        if body.priority and not self.generator.engine.priorities:
            raise ApiError("requests run in order of arrival here; start the server with serve.scheduling=priority", "priority")

    def among(self, ids: Sequence[int] | None, guide: Callable[[], Guide] | None) -> Callable[[], Guide] | None:
        """The guide that allows these tokens alone. ApiError for ids that do not exist."""
        if ids is None:
            return guide
        from lilliput.serve.structured import Among

        vocab = self.generator.engine.model.facts.vocab
        if strangers := [number for number in ids if not 0 <= number < vocab]:
            raise ApiError(f"token id {strangers[0]} is not in the vocabulary of {vocab}", "allowed_token_ids")
        return lambda: Among(ids, vocab, guide and guide())

    def admit(self) -> None:
        """ApiError 503 when as many requests are in flight as may be, or the server is stopping."""
        if self.engine is not None and self.engine.ending:
            raise ApiError("the server is stopping", status=503)
        if self.open >= self.options.max_requests:
            raise ApiError(f"{self.open} requests are in flight, and at most {self.options.max_requests} may be", status=503, code="overloaded")

    async def encode(self, text: str, special: bool, param: str) -> list[int]:
        """Token ids; long texts do not stop the event loop."""
        try:
            if len(text) < LONG:
                return self.tokenizer.encode(text, special)
            return await asyncio.to_thread(self.tokenizer.encode, text, special)
        except UserError as error:
            raise from_user_error(error, param) from error

    async def guide(self, make: Callable[[], Callable[[], Guide]], param: str, at: Begin = "after") -> Callable[[], Guide]:
        """Compile a grammar beside the event loop. `at`: where the answer begins; the grammar begins behind its thought."""
        try:
            guide = await asyncio.to_thread(make)
        except UserError as error:
            raise from_user_error(error, param) from error
        return afterwards(guide, self.tokenizer, self.generator.engine.model.facts.vocab, self.ends, at)

    def room(self, prompt: int, asked: int | None, otherwise: int | None) -> int:
        """max_tokens: what is asked for, else `otherwise`, else the rest of the context. ApiError where it is above the server's limit."""
        limit, left = self.options.max_tokens, max(1, self.generator.engine.context - prompt)
        if asked is not None:
            if limit and asked > limit:
                raise ApiError(f"max_tokens={asked} is above this server's limit of {limit}", "max_tokens")
            return asked
        return min(otherwise or left, left, limit or left)

    def spelled(self, token: int) -> tuple[str, list[int]]:
        """A token for people, and its bytes."""
        raw = self.tokenizer.token_bytes(token)
        try:
            return raw.decode(), list(raw)
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw), list(raw)


class Run:
    """Prompts with their sampling, checked: deltas come from `deltas`, counts from `usage`."""

    def __init__(self, served: Served, prompts: Sequence[Sequence[int]], sampling: Sampling, param: str, search: Beam | None = None) -> None:
        """ApiError for what can never run; `param`: the field that holds the prompt; `search`: instead of drawing."""
        self.served, self.prompts, self.sampling = served, prompts, search.sampling if search is not None else sampling
        self.how: Sampling | Beam = search or sampling
        self.model = sampling.adapter or served.name
        self.watches: list[Watch] = []
        served.admit()
        for prompt in prompts:
            try:
                served.generator.engine.request(prompt, self.how)
            except UserError as error:
                raise from_user_error(error, param) from error

    async def deltas(self) -> AsyncGenerator[tuple[int, Delta]]:
        """(number of the answer over all prompts, delta), as they come. ApiError when one breaks off or the time is over."""
        seconds = self.served.options.timeout or None
        self.served.open += 1
        try:
            async with asyncio.timeout(seconds):
                async with contextlib.aclosing(self._one(0) if len(self.prompts) == 1 else self._many()) as stream:
                    async for number, delta in stream:
                        yield number, delta
        except TimeoutError:
            raise ApiError(f"the request took longer than this server's limit of {seconds:g} s", status=504, code="timeout") from None
        finally:
            self.served.open -= 1

    async def _one(self, number: int) -> AsyncGenerator[tuple[int, Delta]]:
        watch = self.served.metrics.request(len(self.prompts[number]), self.sampling)
        self.watches.append(watch)
        first = number * self.sampling.n
        try:
            async with contextlib.aclosing(cast(AsyncGenerator[Delta], self.served.generator.stream(self.prompts[number], self.how))) as stream:
                async for delta in stream:
                    watch.see(delta)
                    if delta.finish_reason == "error":
                        ours = not any(words in delta.message for words in THEIRS)
                        raise ApiError(f"the answer broke off: {delta.message}", status=500 if ours else 400)
                    if delta.finish_reason == "cancelled":
                        raise ApiError("the server is stopping", status=503)
                    yield first + delta.index, delta
        except UserError as error:  # it stopped between the check and now
            raise ApiError(str(error), status=503) from error
        finally:
            watch.end()

    async def _many(self) -> AsyncGenerator[tuple[int, Delta]]:
        """Several prompts at once; the first fault ends all."""
        queue: asyncio.Queue[tuple[int, Delta] | BaseException | None] = asyncio.Queue()

        async def pump(number: int) -> None:
            try:
                async with contextlib.aclosing(self._one(number)) as stream:
                    async for item in stream:
                        queue.put_nowait(item)
                queue.put_nowait(None)
            except ApiError as error:
                queue.put_nowait(error)

        tasks = [asyncio.create_task(pump(number)) for number in range(len(self.prompts))]
        try:
            left = len(tasks)
            while left:
                item = await queue.get()
                if isinstance(item, BaseException):
                    raise item
                left -= item is None
                if item is not None:
                    yield item
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def usage(self) -> dict[str, Any]:
        """OpenAI's token counts, of what has come so far."""
        prompt, answer = sum(len(prompt) for prompt in self.prompts), sum(watch.tokens for watch in self.watches)
        cached = sum(watch.cached for watch in self.watches)
        return {"prompt_tokens": prompt, "completion_tokens": answer, "total_tokens": prompt + answer, "prompt_tokens_details": {"cached_tokens": cached}}
