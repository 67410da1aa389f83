"""The `data` section of a job -> a stream to train on and a stream to evaluate on.

Held out are the last `holdout` of the tokens of a text (contiguous: neighbouring rows share their wording), or every
k-th conversation. No token is in both streams.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from lilliput.base.errors import UserError
from lilliput.base.job import Data
from lilliput.data.batch import Stream
from lilliput.data.chat import Conversations, conversations, tokenize_conversation
from lilliput.data.sources import Progress, Reader, expand, is_text, shape
from lilliput.data.text import PackedText, documents, read_tokens, too_short
from lilliput.data.tokenizer import Tokenizer


def form_of(files: list[Path], wanted: str) -> str:
    """"text", "messages" or "instruction": what was asked for, else what the first record is."""
    if is_text(files[0]):
        if wanted not in ("auto", "text"):
            raise UserError(f"{files[0]} is plain text", f"data.format={wanted} needs records", "data.format=text, or a .jsonl file")
        return "text"
    if wanted != "auto":
        return wanted
    where, record = next(Reader(files[:1]).records(files[0]))
    return shape(record, where)[0]


def texts(data: Data) -> Iterator[str]:
    """All text of data.path, in pieces, to learn a tokenizer from (of conversations: the contents of the messages)."""
    files = expand(data.path)
    form = form_of(files, data.format)
    if form == "text":
        for document in documents(files):
            yield from document
        return
    for conversation in conversations(files, form):
        yield from (message["content"] for message in conversation.messages if isinstance(message.get("content"), str))


def open_data(data: Data, tokenizer: Tokenizer, model_context: int, seed: int, progress: Progress | None = None) -> tuple[Stream, Stream | None]:
    """(train, eval); eval is None when data.holdout is 0 and there is no data.eval_path. `data:` names must be paths by now.

    UserError for whatever is wrong with the files, and for sequences longer than the model or the data.
    """
    if data.sequence > model_context:
        raise UserError(f"data.sequence={data.sequence} is longer than the model", f"it was made for {model_context} tokens", f"data.sequence={model_context}")
    files = expand(data.path)
    form = form_of(files, data.format)
    held = expand(data.eval_path) if data.eval_path else []
    if form == "text":
        return _texts(data, files, held, tokenizer, seed, progress)
    return _conversations(data, form, files, held, tokenizer, seed, progress)


def _texts(
    data: Data, files: list[Path], held: list[Path], tokenizer: Tokenizer, seed: int, progress: Progress | None
) -> tuple[PackedText, PackedText | None]:
    tokens_N = read_tokens(files, tokenizer, progress)
    keep = len(tokens_N) if held else len(tokens_N) - round(len(tokens_N) * data.holdout)
    train = PackedText(tokens_N[:keep], data.sequence, seed)
    if train.rows < 1:
        raise too_short(keep, data.sequence)
    rest_N = read_tokens(held, tokenizer) if held else tokens_N[keep:]
    if not held and not data.holdout:
        return train, None
    if len(rest_N) < 2:
        what = "the held-out text is too short to evaluate on"
        raise UserError(what, f"{len(rest_N)} of {len(tokens_N)} tokens", "a larger data.holdout, data.holdout=0, or data.eval_path=FILE")
    return train, PackedText(rest_N, data.sequence, seed)


def _conversations(
    data: Data, form: str, files: list[Path], held: list[Path], tokenizer: Tokenizer, seed: int, progress: Progress | None
) -> tuple[Conversations, Conversations | None]:
    train = [tokenize_conversation(c, tokenizer) for c in conversations(files, form, progress)]
    rest = [tokenize_conversation(c, tokenizer) for c in conversations(held, form)]
    if not held and data.holdout:
        out = [int((i + 1) * data.holdout) > int(i * data.holdout) for i in range(len(train))]
        if not any(out) or all(out):
            why = f"data.holdout={data.holdout} of {len(train)} conversations is {sum(out)}"
            raise UserError("cannot hold out conversations to evaluate on", why, "data.holdout=0, another share, or data.eval_path=FILE")
        train, rest = [c for c, o in zip(train, out) if not o], [c for c, o in zip(train, out) if o]
    stream = Conversations(train, tokenizer, data.sequence, seed)
    return stream, Conversations(rest, tokenizer, data.sequence, seed) if rest else None
