"""Text -> one long row of tokens -> packed training rows.

Documents are tokenised and joined by the end token into tokens_N; row i is tokens[i*S : i*S + S + 1], so rows are
full (no padding), and in each epoch every token is an input exactly once, except the last (N-1) % S + 1, which do
not fill a row. A row may hold the end of one document and the start of the next; attention sees both.

Files are read in blocks and tokenised block by block. A block is cut only where the tokens on both sides come out as
they would in the whole text, which is checked with the tokenizer itself, 64 characters left and right of the cut.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from lilliput.base.errors import UserError
from lilliput.data.batch import MicroBatch, Order, micro_batch, token_dtype
from lilliput.data.sources import Progress, Reader, is_text, shape
from lilliput.data.tokenizer import Tokenizer

CUT_OVER = 1 << 17  # characters; shorter texts are tokenised whole
AROUND = 64  # characters on each side of a cut that are tokenised to check it
TRIES = 32  # borders tried, from the end of a block
TOGETHER = 8  # blocks tokenised in one call, over all cores


def documents(files: Sequence[Path], progress: Progress | None = None) -> Iterator[Iterable[str]]:
    """Each document of the files, as an iterable of pieces of its text."""
    reader = Reader(files, progress)
    for file in files:
        if is_text(file):
            yield reader.chunks(file)
            continue
        for where, record in reader.records(file):
            text = record[shape(record, where, "text")[1][0]]
            if not isinstance(text, str):
                raise UserError(f"{where}: `text` is not a string", f"it is a {type(text).__name__}", '{"text": "..."}')
            yield (text,)


def cut(text: str, tokenizer: Tokenizer) -> tuple[str, str] | None:
    """Two texts whose tokens, one after the other, are those of the text; None where no border was found.

    A border is one blank between words. It starts the second text, or is left out where the tokenizer itself puts a
    blank before every text (SentencePiece).
    """
    start = max(0, len(text) - 4096)
    borders = [match.start() + start for match in re.finditer(r"(?<=\S)\s(?=\S)", text[start:])]
    for at in reversed(borders[-TRIES:]):
        rest = at + 1 if tokenizer.strips_blank else at
        whole, left, right = tokenizer.encode_batch([text[max(0, at - AROUND) : at + AROUND], text[max(0, at - AROUND) : at], text[rest : at + AROUND]])
        if left + right == whole:
            return text[:at], text[rest:]
    return None


def _pieces(document: Iterable[str], tokenizer: Tokenizer) -> Iterator[str]:
    held = ""
    for chunk in document:
        held += chunk
        halves = cut(held, tokenizer) if len(held) > CUT_OVER else None
        if halves is not None:
            yield halves[0]
            held = halves[1]
    yield held


def tokenize(texts: Iterable[Iterable[str]], tokenizer: Tokenizer) -> np.ndarray:
    """All documents as one array tokens_N, the first end token after each (none where the tokenizer has no end token)."""
    dtype = token_dtype(tokenizer.vocab_size)
    end = np.array(tokenizer.eos_ids[:1], dtype)
    parts: list[np.ndarray] = []
    waiting: list[tuple[str, bool]] = []

    def encode() -> None:
        for ids, (_, last) in zip(tokenizer.encode_batch([piece for piece, _ in waiting]), waiting):
            parts.append(np.array(ids, dtype))
            if last:
                parts.append(end)
        waiting.clear()

    characters = 0
    for document in texts:
        for piece in _pieces(document, tokenizer):
            waiting.append((piece, False))
            characters += len(piece)
            if characters > TOGETHER << 18:
                encode()
                characters = 0
        waiting.append(("", True))
    encode()
    return np.concatenate(parts) if parts else np.empty(0, dtype)


def read_tokens(files: Sequence[Path], tokenizer: Tokenizer, progress: Progress | None = None) -> np.ndarray:
    """The tokens of text files or of records with a `text`, joined by the end token."""
    return tokenize(documents(files, progress), tokenizer)


class PackedText:
    """A stream of full rows of S tokens over tokens_N; see the module and batch.Stream."""

    def __init__(self, tokens_N: np.ndarray, sequence: int, seed: int) -> None:
        self.tokens_N, self.sequence, self.seed = tokens_N, sequence, seed
        self._position = 0
        self._order = Order(max(0, (len(tokens_N) - 1) // sequence), seed)

    @property
    def rows(self) -> int:
        """Full rows of one epoch."""
        return self._order.rows

    def next(self, sequences: int) -> MicroBatch:
        """The next rows in shuffled order, [sequences, S]; goes on into the next epoch."""
        if self.rows < 1:
            raise too_short(len(self.tokens_N), self.sequence)
        rows = [self._order.row(self._position + i) * self.sequence for i in range(sequences)]
        self._position += sequences
        return self._batch(rows, self.sequence)

    def eval_batches(self, sequences: int, max_tokens: int) -> Iterator[MicroBatch]:
        """Rows in file order; exactly min(max_tokens, N-1) targets are scored, the last row may be shorter (a batch of its own)."""
        end = min(len(self.tokens_N) - 1, max_tokens)
        full = [row * self.sequence for row in range(end // self.sequence)]
        for i in range(0, len(full), sequences):
            yield self._batch(full[i : i + sequences], self.sequence)
        if end % self.sequence:
            yield self._batch([end - end % self.sequence], end % self.sequence)

    def state(self) -> dict[str, Any]:
        """Position and identity of the data."""
        return {"position": self._position, "sequence": self.sequence, "seed": self.seed, "data": self._digest}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on at a saved position; UserError when rows or tokens are not those of the state."""
        check_state(state, self.state())
        self._position = int(state["position"])

    def summary(self) -> dict[str, int]:
        """tokens, rows, and the tokens at the end that fill no row."""
        tokens = len(self.tokens_N)
        return {"tokens": tokens, "rows": self.rows, "left over": max(0, tokens - self.rows * self.sequence - 1)}

    @cached_property
    def _digest(self) -> str:
        return hashlib.blake2b(np.ascontiguousarray(self.tokens_N).data, digest_size=16).hexdigest()

    def _batch(self, starts: Sequence[int], length: int) -> MicroBatch:
        rows_BS = np.stack([self.tokens_N[start : start + length + 1] for start in starts])
        return micro_batch(rows_BS[:, :-1], rows_BS[:, 1:])


def check_state(saved: dict[str, Any], now: dict[str, Any]) -> None:
    """UserError unless everything but the position is equal."""
    changed = [key for key in now if key != "position" and saved.get(key) != now[key]]
    if changed:
        key = changed[0]
        raise UserError(
            "the data is not the data of this checkpoint",
            f"`{key}` was {saved.get(key)} and is {now[key]}",
            "give back the files, data.sequence and seed of the first run, or start a new run folder",
        )


def too_short(tokens: int, sequence: int) -> UserError:
    """The error for data that fills not one row."""
    fits = max(2, tokens - 1)
    return UserError(f"the data is shorter than one sequence of {sequence}", f"it has {tokens} tokens, {sequence + 1} are needed", f"data.sequence={fits}")
