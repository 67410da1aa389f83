"""A model guesses: a smaller one of the same vocabulary, or the first layers of the model itself.

    a model   a cache of its own over the same blocks. It reads a sequence when something is to be guessed for it, all that it has not read in the
              blocks that the sequence has now: who guesses nothing pays nothing. What is read twice (blocks that others have read, or that were
              swapped) is written with the same numbers. Memory: its weights, and its keys and values a token.
    layers:N  the first N layers, then the head: their keys and values are the model's own, in the model's own cache, and the pass that
              judges writes the same numbers again. No memory; but a model that was not trained to stop early guesses badly.

A greedy request gets the likeliest tokens as certain guesses, a sampled one gets draws from q, which is standardised as the model's p is.

Leviathan et al. 2023, arXiv 2211.17192, section 2.1; Zhang et al. 2024, arXiv 2309.08168 (self-speculation).
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from lilliput.base.errors import UserError
from lilliput.serve.speculative import matched

if TYPE_CHECKING:
    from torch import Tensor

    from lilliput.ops.sampling import Draw
    from lilliput.serve.adapters import Adapter
    from lilliput.serve.scheduler import Chunk
    from lilliput.serve.speculative import Place

DrawOf = Callable[[int, int], "Draw"]  # sequence, position -> how its token is drawn


READ = 512  # tokens of a sequence that are read at once


class Read(NamedTuple):
    """What a model with a cache of its own has read of a sequence: `upto` tokens, then guesses (all but the last of them). `table`: where. A sequence that
    loses its blocks gets another table; in one, blocks are only added (the one that a fork copies was copied before the first guess)."""

    upto: int
    guesses: Sequence[int]
    table: array[int]


class ByModel:
    """Guesses by running a model ahead. `forward` gives the logits of the rows that chunks want; `own`: it has a cache of its own to keep."""

    def __init__(self, forward: Callable[[Sequence[Chunk]], Tensor], own: bool) -> None:
        self.forward, self.own, self.late = forward, own, False
        self._tokens: dict[int, Sequence[int]] = {}  # sequence -> all its tokens that are known
        self._read: dict[int, Read] = {}

    def plan(self, id: int, tokens: Sequence[int], gamma: int) -> list[int]:
        """Room for gamma guesses, which `fill` makes."""
        self._tokens[id] = tokens
        return [0] * gamma

    def fill(self, chunks: Sequence[Chunk], draw: DrawOf) -> dict[int, Tensor]:
        """Write the guesses into the chunks. Sequence -> q [gamma, vocab] of those that are sampled."""
        guessed = [chunk for chunk in chunks if chunk.draft]
        self.late = False
        if not guessed:
            return {}
        logits_NV, left = self.forward([self._known(chunk) for chunk in guessed]), guessed
        rows: dict[int, list[Tensor]] = {}
        for step in range(max(chunk.draft for chunk in guessed)):
            if step:
                left = [chunk for chunk in left if chunk.draft > step]
                logits_NV = self.forward([self._one(chunk, step) for chunk in left])
            for chunk, logits_V in zip(left, logits_NV):
                at = len(chunk.ids) - chunk.draft + step
                chunk.ids[at], q_V = self._pick(logits_V, draw(chunk.id, chunk.start + at))  # type: ignore[index]
                if q_V is not None:
                    rows.setdefault(chunk.id, []).append(q_V)
        import torch

        for chunk in guessed if self.own else ():
            known = chunk.stop - chunk.draft
            self._read[chunk.id] = Read(known, chunk.ids[-chunk.draft :], chunk.table)
        return {id: torch.stack(q) for id, q in rows.items()}

    def forget(self, id: int) -> None:
        """The sequence has ended."""
        self._read.pop(id, None)
        self._tokens.pop(id, None)

    def _known(self, chunk: Chunk) -> Chunk:
        """Its known rows, and those before them that this model has not read; all but the last READ of them are read here."""
        start, known = chunk.start, chunk.stop - chunk.draft
        if self.own:
            start = self._unread(chunk, self._tokens[chunk.id], known)
            self.late |= known - start > 2 * chunk.draft + 2
        read = chunk._replace(stop=known, wants=1, draft=0, adapter=self._adapter(chunk))
        while known - start > READ:
            self.forward([read._replace(start=start, stop=start + READ, ids=self._tokens[chunk.id][start : start + READ], wants=0)])
            start += READ
        return read._replace(start=start, ids=self._tokens[chunk.id][start:known] if self.own else chunk.ids[: known - start])

    def _unread(self, chunk: Chunk, tokens: Sequence[int], known: int) -> int:
        """The first token that it has not read where the sequence's blocks are now."""
        if (read := self._read.get(chunk.id)) is None or read.table is not chunk.table:
            return 0
        right = matched(read.guesses, tokens[read.upto : read.upto + len(read.guesses)])
        return min(read.upto + min(right, len(read.guesses) - 1), known - 1)

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
        self.runner = runner_of(argument, place.blocks, place.kv)
        super().__init__(self.runner.forward, own=True)
