"""The models of one server. A request goes to the one that its `model` names, by its own name or by one of its adapters; to the first
when it names none. Each has an engine, a cache and a thread of its own; they share the kernels' threads, the limits and the metrics page."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from lilliput.base.errors import UserError
from lilliput.serve.metrics import Board
from lilliput.serve.openai.errors import ApiError
from lilliput.serve.openai.served import Served


class House:
    """What one server serves."""

    def __init__(self, models: Sequence[Served], board: Board) -> None:
        """`board`: where all of them count. UserError for two of one name."""
        self.models, self.board = tuple(models), board
        names = [served.name for served in self.models]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise UserError(f"two models are named `{twice}`", "requests ask for a model by its name", "serve each once")

    @property
    def first(self) -> Served:
        """Who answers requests that name no model; its options are the server's."""
        return self.models[0]

    @property
    def ending(self) -> bool:
        """Whether it is stopping."""
        return any(served.engine.ending for served in self.models if served.engine is not None)

    def pick(self, asked: str | None) -> Served:
        """The model of a request. ApiError 404 for one that is not served here."""
        if asked is None:
            return self.first
        found = next((served for served in self.models if asked == served.name), None)
        found = found or next((served for served in self.models if asked in served.adapters), None)
        if found is None:
            known = ", ".join(f"`{name}`" for served in self.models for name in (served.name, *served.adapters))
            raise ApiError(f"the model `{asked}` is not served here; there is {known}", "model", 404, "model_not_found")
        return found

    def holder(self, adapter: str) -> Served:
        """The model that has an adapter; the first where none has."""
        return next((served for served in self.models if adapter in served.adapters), self.first)

    def refused(self, status: int) -> None:
        """A request that got an error before a model was asked."""
        self.first.metrics.refused(status)

    def start(self) -> None:
        """Start every engine."""
        for served in self.models:
            if served.engine is not None:
                served.engine.start()

    async def stop(self) -> None:
        """Let the open answers end for http.drain seconds; nothing where that has been asked for."""
        engines = [served.engine for served in self.models if served.engine is not None and not served.engine.ending]
        await asyncio.gather(*(engine.stop(drain=True, timeout=self.first.options.drain) for engine in engines))

    async def close(self) -> None:
        """Send the traces that are left."""
        for served in self.models:
            if served.metrics.tracer is not None:
                await asyncio.to_thread(served.metrics.tracer.close)
