"""Callers that drive the engine themselves: stream() and generate() step it until their own requests have ended.

Every open request has an inbox. Steps also run the requests of others; what they give for those without an inbox is kept for the next step().
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from lilliput.base.errors import UserError
from lilliput.serve.beams import Beam
from lilliput.serve.request import Completion, Delta, Sampling, collect

if TYPE_CHECKING:
    from lilliput.serve.engine import Engine


class Callers:
    """The requests of one engine that somebody reads while stepping."""

    def __init__(self, engine: Engine) -> None:
        """`engine`: puts the deltas of a request that has an inbox into it."""
        self.engine = engine
        self.inboxes: dict[int, deque[Delta]] = {}

    def stream(self, prompt_ids: Sequence[int], sampling: Sampling | Beam | None) -> Iterator[Delta]:
        """See Engine.stream."""
        id = self._open(prompt_ids, sampling)
        try:
            for delta in self._drive(id):
                if delta.finish_reason == "error":
                    raise UserError("the answer broke off", delta.message, "see the reason")
                yield delta
        finally:
            self._close(id)

    def generate(self, prompts: Sequence[str | Sequence[int]], sampling: Sampling | Beam | None) -> list[Completion]:
        """See Engine.generate."""
        ids: list[int] = []
        done: list[Completion] = []
        encode = self.engine.tokenizer.encode
        count = sampling.sampling.n if isinstance(sampling, Beam) else 1 if sampling is None else sampling.n
        try:
            for prompt in prompts:
                ids.append(self._open(encode(prompt, special=True) if isinstance(prompt, str) else prompt, sampling))
            for id in ids:
                deltas = list(self._drive(id))
                done += [collect([delta for delta in deltas if delta.index == index]) for index in range(count)]
            return done
        finally:
            for id in ids:
                self._close(id)

    def _open(self, prompt_ids: Sequence[int], sampling: Sampling | Beam | None) -> int:
        request = self.engine.request(prompt_ids, sampling)
        self.inboxes[request.id] = deque()
        return self.engine.submit(request)

    def _drive(self, id: int) -> Iterator[Delta]:
        inbox = self.inboxes[id]
        while inbox or self.engine.holds(id):
            while not inbox:
                kept = self.engine.step()
                self.engine.later(kept)
            yield inbox.popleft()

    def _close(self, id: int) -> None:
        del self.inboxes[id]
        self.engine.drop(id)
