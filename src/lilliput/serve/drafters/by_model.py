"""A model guesses: a smaller one of the same vocabulary, or the first layers of the model itself.

    a model   a cache of its own over the same blocks: whatever the scheduler does to a block, it does to both, so found prefixes, swaps
              and copies need no care. It reads every chunk that the model reads. Memory: its weights, and its keys and values a token.
    layers:N  the first N layers, then the head: their keys and values are the model's own, in the model's own cache, and the pass that
              judges writes the same numbers again. No memory; but a model that was not trained to stop early guesses badly.

A greedy request gets the likeliest tokens as certain guesses, a sampled one gets draws from q, which is standardised as the model's p is.

Leviathan et al. 2023, arXiv 2211.17192, section 2.1; Zhang et al. 2024, arXiv 2309.08168 (self-speculation).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from lilliput.base.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from lilliput.ops.sampling import Draw
    from lilliput.serve.adapters import Adapter
    from lilliput.serve.scheduler import Chunk, Moves
    from lilliput.serve.speculative import Place

DrawOf = Callable[[int, int], "Draw"]  # sequence, position -> how its token is drawn


class ByModel:
    """Guesses by running a model ahead. `forward` gives the logits of the rows that chunks want; `own`: it has a cache of its own to keep."""

    def __init__(self, forward: Callable[[Sequence[Chunk]], Tensor], own: bool) -> None:
        self.forward, self.own = forward, own
        self._last: dict[int, tuple[int, int]] = {}  # sequence -> position and id of its last guess, which this model has not read

    def plan(self, id: int, tokens: Sequence[int], gamma: int) -> list[int]:
        """Room for gamma guesses, which `fill` makes."""
        return [0] * gamma

    def fill(self, chunks: Sequence[Chunk], draw: DrawOf) -> dict[int, Tensor]:
        """Write the guesses into the chunks. Sequence -> q [gamma, vocab] of those that are sampled."""
        guessed = [chunk for chunk in chunks if chunk.draft]
        read = [self._known(chunk) for chunk in chunks if self.own or chunk.draft]
        if not read or (not guessed and not self.own):
            return {}
        logits_NV, left = self.forward(read), guessed
        rows: dict[int, list[Tensor]] = {}
        for step in range(max((chunk.draft for chunk in guessed), default=0)):
            if step:
                left = [chunk for chunk in left if chunk.draft > step]
                logits_NV = self.forward([self._one(chunk, step) for chunk in left])
            for chunk, logits_V in zip(left, logits_NV):
                at = len(chunk.ids) - chunk.draft + step
                chunk.ids[at], q_V = self._pick(logits_V, draw(chunk.id, chunk.start + at))  # type: ignore[index]
                if q_V is not None:
                    rows.setdefault(chunk.id, []).append(q_V)
        import torch

        for chunk in guessed:
            self._last[chunk.id] = (chunk.stop - 1, chunk.ids[-1])
        return {id: torch.stack(q) for id, q in rows.items()}

    def move(self, moves: Moves) -> None:
        """What happens to blocks; nothing where the cache is the model's own."""

    def forget(self, id: int) -> None:
        """The sequence has ended."""
        self._last.pop(id, None)

    def _known(self, chunk: Chunk) -> Chunk:
        """Its known rows, and the guess before them that was accepted and not read yet."""
        ids, start = list(chunk.ids[: len(chunk.ids) - chunk.draft]), chunk.start
        position, token = self._last.pop(chunk.id, (-2, 0))
        if self.own and position == start - 1:
            ids, start = [token, *ids], position
        return chunk._replace(start=start, stop=chunk.stop - chunk.draft, ids=ids, wants=min(1, chunk.draft), draft=0, adapter=self._adapter(chunk))

    def _adapter(self, chunk: Chunk) -> Adapter | None:
        """Another model has none of this one's adapters: it guesses as if there were none."""
        return None if self.own else chunk.adapter

    def _one(self, chunk: Chunk, step: int) -> Chunk:
        """The guess before guess `step`, alone."""
        at = len(chunk.ids) - chunk.draft + step - 1
        return chunk._replace(start=chunk.start + at, stop=chunk.start + at + 1, ids=[chunk.ids[at]], wants=1, draft=0,
                       adapter=self._adapter(chunk))  # fmt: skip

    @staticmethod
    def _pick(logits_V: Tensor, how: Draw) -> tuple[int, Tensor | None]:
        import torch

        from lilliput.ops import sampling
        from lilliput.serve.speculative import another, standardised

        if how.temperature == 0:
            return int(logits_V.argmax()), None
        q_V = standardised(logits_V, how)
        return sampling.draw(torch.arange(len(q_V), device=q_V.device), q_V, another(how.u, "guess")), q_V


class Layers(ByModel):
    """The model's own first layers."""

    def __init__(self, argument: str, place: Place) -> None:
        """`argument`: how many. UserError where that is no number of layers, or the runner cannot stop early."""
        layers, most = int(argument) if argument.isdigit() else 0, place.model.spec.layers
        if not 0 < layers < most:
            raise UserError(f"draft=layers:{argument} names no number of layers", f"the model has {most}", f"draft=layers:{most * 2 // 3}")
        if not hasattr(place.runner, "partly"):
            raise UserError("draft=layers needs the native runner", "the eager one runs all layers", "draft=ngram")
        super().__init__(lambda chunks: place.runner.partly(chunks, layers), own=False)


class Model(ByModel):
    """Another model of the same vocabulary."""

    def __init__(self, argument: Any, place: Place) -> None:
        """`argument`: a loaded model. UserError for another vocabulary or a shorter context."""
        from lilliput.serve.runners import runner_of

        if isinstance(argument, str):
            raise UserError("draft=draft_model names no model", "a model that guesses is named by itself", "draft=lilliput-tiny")
        mine, theirs = argument.facts, place.model.facts
        if mine.vocab != theirs.vocab:
            raise UserError("the model that guesses has another vocabulary", f"{mine.vocab:,} tokens beside {theirs.vocab:,}", "draft=ngram")
        if mine.context < place.context:
            why = f"{mine.context:,} tokens beside {place.context:,}"
            raise UserError("the model that guesses has a shorter context", why, f"serve.context={mine.context}, or draft=ngram")
        self.runner = runner_of(argument, place.blocks, place.kv, place.swap)
        super().__init__(self.runner.forward, own=True)

    def move(self, moves: Moves) -> None:
        """The same for its cache."""
        self.runner.move(moves)
