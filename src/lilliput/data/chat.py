"""Conversations -> token rows in which only the assistant's words are scored.

The model's own chat template writes the conversation. For the assistant turn i, the template is rendered up to the
prompt of that turn and up to its end; the characters between are the turn, and the tokens on them are scored up to
and including the end token, so the model learns to stop. This needs a template that only appends; one that rewrites
earlier turns (dropping old reasoning, say) is refused for conversations of several turns.

Rows are padded to the longest of their batch: no conversation sees another.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from lilliput.base.errors import UserError
from lilliput.data.batch import IGNORE, MicroBatch, Order, micro_batch, token_dtype
from lilliput.data.sources import Progress, Reader, shape
from lilliput.data.text import check_state
from lilliput.data.tokenizer import Tokenizer

SPEAKERS = {  # ShareGPT's `from` -> role
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "observation": "tool",
    "tool": "tool",
}


@dataclass(frozen=True)
class Conversation:
    """Messages as the template takes them, and the tools they may call."""

    where: str  # file and line
    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None


def conversations(files: Sequence[Path], form: str = "auto", progress: Progress | None = None) -> Iterator[Conversation]:
    """Every conversation of the files. `form`: messages, instruction or auto (the first record's, which all must have)."""
    reader = Reader(files, progress)
    for file in files:
        for where, record in reader.records(file):
            found, keys = shape(record, where, form)
            if found == "text":
                raise UserError(f"{where}: a record with text among conversations", "keys that came: " + ", ".join(record), "put it into a file of its own")
            form = found
            yield to_conversation(record, keys, where)


def to_conversation(record: dict[str, Any], keys: tuple[str, ...], where: str) -> Conversation:
    """A record (its shape's keys) as messages; UserError when they are not what the keys promise."""
    if len(keys) == 2:
        return Conversation(where, _instruction(record, keys, where))
    turns = record[keys[0]]
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, dict) for turn in turns):
        raise UserError(f"{where}: `{keys[0]}` is not a list of turns", f"it is {json.dumps(turns)[:80]}", '{"messages": [{"role": "user", "content": "..."}]}')
    messages = [_message(turn, where) for turn in turns]
    if keys[0] == "conversations" and isinstance(record.get("system"), str) and record["system"]:
        messages.insert(0, {"role": "system", "content": record["system"]})
    if not any(message["role"] == "assistant" for message in messages):
        roles = ", ".join(str(message["role"]) for message in messages)
        raise UserError(f"{where}: no assistant turn", f"nothing to learn from; roles: {roles}", "remove the record, or add the answer")
    return Conversation(where, messages, _tools(record.get("tools"), where))


def _instruction(record: dict[str, Any], keys: tuple[str, ...], where: str) -> list[dict[str, Any]]:
    question, answer = keys
    texts = {key: record.get(key) for key in (question, "input", answer)}
    wrong = [key for key, value in texts.items() if not isinstance(value, str) and not (key == "input" and value is None)]
    if wrong:
        raise UserError(f"{where}: `{wrong[0]}` is not a string", f"it is a {type(texts[wrong[0]]).__name__}", f'{{"{question}": "...", "{answer}": "..."}}')
    asked = "\n".join(part for part in (texts[question], texts["input"]) if part)
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": texts[answer]}]


def _message(turn: dict[str, Any], where: str) -> dict[str, Any]:
    """One turn: {"role", "content", ...} as it is, or ShareGPT's {"from", "value"}."""
    if "role" in turn:
        return turn
    speaker, value = turn.get("from"), turn.get("value")
    if speaker == "function_call" and isinstance(value, str):
        try:
            call = json.loads(value)
            function = {"name": call["name"], "arguments": call["arguments"]}
            return {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": function}]}
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{where}: a broken function_call", f"{value[:80]}", '{"name": "...", "arguments": {...}}') from error
    if speaker not in SPEAKERS:
        known = ", ".join([*SPEAKERS, "function_call"])
        raise UserError(f"{where}: a turn without a known speaker", f"keys that came: {', '.join(turn)}; from: {speaker}; known: {known}")
    return {"role": SPEAKERS[speaker], "content": value}


def _tools(value: Any, where: str) -> list[dict[str, Any]] | None:
    if not value:
        return None
    try:
        tools = json.loads(value) if isinstance(value, str) else value
    except ValueError as error:
        raise UserError(f"{where}: `tools` is not JSON", str(error), '{"tools": "[{...}]"}') from error
    return tools or None


def tokenize_conversation(conversation: Conversation, tokenizer: Tokenizer) -> tuple[list[int], list[bool]]:
    """(ids, scored): the whole conversation as the template writes it; scored are assistant turns with their end token."""
    messages, tools = conversation.messages, conversation.tools
    try:
        whole = tokenizer.apply_chat(messages, False, tools)
        turns = []
        for i, message in enumerate(messages):
            if message["role"] == "assistant":
                upto = whole if i + 1 == len(messages) else tokenizer.apply_chat(messages[: i + 1], False, tools)
                turns.append((tokenizer.apply_chat(messages[:i], True, tools), upto))
    except UserError as error:
        raise UserError(f"{conversation.where}: {error.what}", error.why, error.fix) from error
    ids, spans = tokenizer.encode_spans(whole)
    scored = [False] * len(ids)
    for prompt, upto in turns:
        if not (upto.startswith(prompt) and whole.startswith(upto)):
            why = "it writes an assistant turn differently once later turns follow, so what to score is not defined"
            raise UserError(f"{conversation.where}: the chat template rewrites earlier turns", why, "one assistant turn a record: split the conversation")
        inside = [t for t, (start, end) in enumerate(spans) if start >= len(prompt) and end <= len(upto)]
        ends = [t for t in inside if ids[t] in tokenizer.eos_ids]
        for t in inside:
            scored[t] = not ends or t <= ends[-1]
    return ids, scored


class Conversations:
    """A stream of padded conversations; see the module and batch.Stream. `sequence` is the most inputs a row may have."""

    def __init__(self, tokenized: Iterable[tuple[list[int], list[bool]]], tokenizer: Tokenizer, sequence: int, seed: int) -> None:
        self.sequence, self.seed = sequence, seed
        self._pad = tokenizer.pad_id if tokenizer.pad_id is not None else (*tokenizer.eos_ids, 0)[0]
        dtype = token_dtype(tokenizer.vocab_size)
        self._rows: list[tuple[np.ndarray, np.ndarray]] = []  # (ids, scored) of at most sequence + 1
        self._shortened = self._dropped = 0
        for ids, scored in tokenized:
            if any(scored[1 : sequence + 1]):
                self._shortened += len(ids) > sequence + 1
                self._rows.append((np.array(ids[: sequence + 1], dtype), np.array(scored[: sequence + 1], bool)))
            else:
                self._dropped += 1
        if not self._rows:
            why = f"of {self._dropped} conversations none has an assistant token within {sequence + 1} tokens"
            raise UserError("no conversation to train on", why, f"data.sequence={4 * sequence}")
        self._order = Order(len(self._rows), seed)
        self._position = 0

    def next(self, sequences: int) -> MicroBatch:
        """The next conversations in shuffled order, [sequences, longest of them]; goes on into the next epoch."""
        rows = [self._order.row(self._position + i) for i in range(sequences)]
        self._position += sequences
        return self._batch(rows)

    def eval_batches(self, sequences: int, max_tokens: int) -> Iterator[MicroBatch]:
        """Conversations in file order while at most `max_tokens` targets are scored (one batch at least)."""
        scored = 0
        for first in range(0, len(self._rows), sequences):
            batch = self._batch(range(first, min(first + sequences, len(self._rows))))
            scored += batch.weight
            if first and scored > max_tokens:
                return
            yield batch

    def state(self) -> dict[str, Any]:
        """Position and identity of the data."""
        return {"position": self._position, "sequence": self.sequence, "seed": self.seed, "data": self._digest}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on at a saved position; UserError when the conversations are not those of the state."""
        check_state(state, self.state())
        self._position = int(state["position"])

    def summary(self) -> dict[str, int]:
        """tokens, rows, scored tokens, and the conversations cut at the sequence length or dropped (nothing to score within it)."""
        tokens, scored = sum(len(ids) for ids, _ in self._rows), sum(int(mask[1:].sum()) for _, mask in self._rows)
        return {"tokens": tokens, "rows": len(self._rows), "scored": scored, "shortened": self._shortened, "dropped": self._dropped}

    @cached_property
    def _digest(self) -> str:
        digest = hashlib.blake2b(digest_size=16)
        for ids, scored in self._rows:
            digest.update(len(ids).to_bytes(8, "little") + ids.tobytes() + scored.tobytes())
        return digest.hexdigest()

    def _batch(self, rows: Sequence[int]) -> MicroBatch:
        longest = max(len(self._rows[row][0]) for row in rows) - 1
        tokens_BT = np.full((len(rows), longest), self._pad, np.int64)
        targets_BT = np.full((len(rows), longest), IGNORE, np.int64)
        for b, row in enumerate(rows):
            ids, scored = self._rows[row]
            tokens_BT[b, : len(ids) - 1] = ids[:-1]
            targets_BT[b, : len(ids) - 1] = np.where(scored[1:], ids[1:].astype(np.int64), IGNORE)  # NOTE uint16 would wrap IGNORE
        return micro_batch(tokens_BT, targets_BT)
