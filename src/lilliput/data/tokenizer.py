"""Text <-> token ids, for every tokenizer a decoder-only checkpoint carries.

Encoding runs in the `tokenizers` package. Decoding is a table of bytes, one entry an id: ids -> bytes -> UTF-8. One
table serves whole texts and streams: a stream holds back the bytes of an unfinished character instead of showing `�`,
and what it pushes adds up to exactly what decode() gives.

Special tokens written in a text (`<|im_end|>`) become their single ids, as in transformers: chat templates rely on it.
"""

from __future__ import annotations

import codecs
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers

from lilliput.base.errors import UserError
from lilliput.data import folder as files
from lilliput.data import template, vocabulary
from lilliput.data.vocabulary import Parts


class Tokenizer:
    """Made by one of the class methods; see the module. `backend` is the tokenizers.Tokenizer that encodes."""

    def __init__(self, parts: Parts) -> None:
        self.backend: tokenizers.Tokenizer = parts.backend
        self.bos_id, self.eos_ids, self.pad_id = parts.bos_id, parts.eos_ids, parts.pad_id
        self.chat_template = parts.chat_template
        self._parts = parts
        self._special = frozenset(number for number, token in parts.backend.get_added_tokens_decoder().items() if token.special)

    @classmethod
    def from_folder(cls, path: str | Path) -> Tokenizer:
        """From a model folder (tokenizer.json and its companions, or GPT-2's vocab.json + merges.txt)."""
        return cls(files.read_folder(Path(path)))

    @classmethod
    def from_file(cls, path: str | Path) -> Tokenizer:
        """From a tokenizer.json alone: BOS, EOS and chat template stay unknown."""
        return cls(Parts(files.read_tokenizer(Path(path))))

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any]) -> Tokenizer:
        """From the metadata of a GGUF file: {"tokenizer.ggml.tokens": [...], ...}."""
        return cls(vocabulary.from_gguf(metadata))

    @classmethod
    def from_llama2c(cls, path: str | Path) -> Tokenizer:
        """From llama2.c's tokenizer file (tok512.bin)."""
        return cls(vocabulary.from_llama2c(Path(path)))

    @classmethod
    def train_bpe(cls, texts: Iterable[str], size: int) -> Tokenizer:
        """Byte-level BPE of `size` tokens learned from the texts; the same texts give the same tokenizer."""
        return cls(vocabulary.train_bpe(texts, size))

    @classmethod
    def chars(cls, text: str | Iterable[str]) -> Tokenizer:
        """One token a character that occurs in the text, in code point order (nanoGPT's vocabulary)."""
        return cls(vocabulary.chars(text))

    @classmethod
    def bytes_(cls) -> Tokenizer:
        """One token a byte, id = byte value, and three special tokens."""
        return cls(vocabulary.bytes_())

    @property
    def vocab_size(self) -> int:
        """Highest id + 1."""
        return len(self._bytes)

    @property
    def special_ids(self) -> frozenset[int]:
        """Ids of control tokens (<|im_end|>): they stand for no text."""
        return self._special

    def token_bytes(self, number: int) -> bytes:
        """The bytes that an id stands for, part of a character perhaps; those of a special token are its name. Nothing beyond the vocabulary."""
        return self._piece(number, skip_special=False)

    def encode(self, text: str, special: bool = False) -> list[int]:
        """Ids of the text; special=True adds BOS (EOS) where the model was trained with it. UserError for what it cannot spell."""
        return self.encode_batch([text], special)[0]

    def encode_batch(self, texts: Sequence[str], special: bool = False) -> list[list[int]]:
        """encode() of several texts, over all cores."""
        self._check(texts)
        return [encoding.ids for encoding in self.backend.encode_batch_fast(list(texts), add_special_tokens=special)]

    def encode_spans(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids without BOS/EOS, and the (start, end) characters of the text that each stands for."""
        self._check([text])
        encoding = self.backend.encode(text, add_special_tokens=False)
        return encoding.ids, encoding.offsets

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """The text of the ids. Ids beyond the vocabulary (padded embeddings) are nothing; broken UTF-8 gives U+FFFD."""
        text = b"".join(self._piece(number, skip_special) for number in ids)
        return self._strip(text).decode("utf-8", "replace")

    def stream(self, after: Sequence[int] = (), skip_special: bool = True) -> TextStream:
        """A decoder for one token at a time. `after`: the ids before, when the text goes on from theirs (a blank then stays a blank)."""
        return TextStream(self, started=any(self._piece(number, True) for number in after), skip_special=skip_special)

    def apply_chat(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True, tools: Sequence[Mapping[str, Any]] | None = None,
                   more: Mapping[str, Any] | None = None) -> str:  # fmt: skip
        """Messages [{"role", "content"}, ...] as the model's prompt string (encode it with special=False). `more`: the template's own variables."""
        if self.chat_template is None:
            fix = "use a chat model (smollm2-135m), or complete plain text"
            raise UserError("this model has no chat template", "its tokenizer files hold none: it was not trained to chat", fix)
        eos_id = self.eos_ids[0] if self.eos_ids else None
        ids = {"bos_token": self.bos_id, "eos_token": eos_id, "pad_token": self.pad_id}
        special = {name: self.backend.id_to_token(number) for name, number in ids.items() if number is not None}
        known = {name: token for name, token in special.items() if token is not None}
        return template.render(self.chat_template, messages, add_generation_prompt, tools, known, more)

    def save(self, folder: str | Path) -> None:
        """Write tokenizer.json, tokenizer_config.json and special_tokens_map.json (from_folder and transformers read them)."""
        files.write_folder(Path(folder), self._parts)

    def digest(self) -> str:
        """sha256 of everything that decides ids and prompts, in hex."""
        content = [self.backend.to_str(), self.bos_id, list(self.eos_ids), self.pad_id, self.chat_template]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    # ---- ids -> bytes

    @cached_property
    def _steps(self) -> list[dict[str, Any]]:
        """The decoder's steps as tokenizer.json writes them."""
        state: Any = None if self.backend.decoder is None else self.backend.decoder.__getstate__()
        decoder: dict[str, Any] = {"type": "none"} if state is None else json.loads(state)
        steps: list[dict[str, Any]] = decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
        unknown = [step["type"] for step in steps if step["type"] not in ("ByteLevel", "Replace", "ByteFallback", "Fuse", "Strip")]
        if unknown:
            raise UserError(f"decoder `{unknown[0]}` of this tokenizer is not supported", "known: ByteLevel, Replace, ByteFallback, Fuse, Strip")
        return steps

    @cached_property
    def _bytes(self) -> list[bytes]:
        """Id -> the bytes it stands for, before a leading blank is stripped."""
        vocab = self.backend.get_vocab(with_added_tokens=True)
        table = [b""] * (max(vocab.values()) + 1)
        stand_ins = {character: byte for byte, character in vocabulary.byte_characters().items()}
        kinds = {step["type"] for step in self._steps}
        replaces = [(step["pattern"]["String"], step["content"]) for step in self._steps if step["type"] == "Replace"]
        for token, number in vocab.items():
            if "ByteLevel" in kinds and all(character in stand_ins for character in token):
                table[number] = bytes(stand_ins[character] for character in token)
            elif "ByteFallback" in kinds and len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
                table[number] = bytes.fromhex(token[3:5])
            else:
                for old, new in replaces:
                    token = token.replace(old, new)
                table[number] = token.encode()
        return table

    @cached_property
    def strips_blank(self) -> bool:
        """Does the first blank of a text belong to the tokenizer (SentencePiece) and not to the text?"""
        return any(step["type"] == "Strip" and step["content"] == " " and step["start"] for step in self._steps)

    def _piece(self, number: int, skip_special: bool) -> bytes:
        if skip_special and number in self._special:
            return b""
        return self._bytes[number] if 0 <= number < len(self._bytes) else b""

    def _strip(self, text: bytes) -> bytes:
        return text[1:] if self.strips_blank and text.startswith(b" ") else text

    # ---- what it cannot spell

    @cached_property
    def _alphabet(self) -> frozenset[str] | None:
        """The characters it can spell, when it drops all others without a word; None when it can spell everything."""
        model = self.backend.model
        covers = getattr(model, "byte_fallback", False) or getattr(model, "unk_token", None) or any(step["type"] == "ByteLevel" for step in self._steps)
        return None if covers else frozenset(token for token in self.backend.get_vocab() if len(token) == 1)

    def _check(self, texts: Sequence[str]) -> None:
        for text in texts:
            try:
                text.encode()
            except UnicodeEncodeError as error:
                why = f"character {error.start} is half of a surrogate pair (U+{ord(text[error.start]):04X})"
                raise UserError("the text is not valid Unicode", why, "write the text as UTF-8") from error
            strange = () if self._alphabet is None else sorted(set(text) - self._alphabet)
            if strange:
                what = f"character {strange[0]!r} (U+{ord(strange[0]):04X}) is not in the vocabulary of {self.vocab_size} characters"
                raise UserError(what, f"{len(strange)} such characters in the text", "data.tokenizer=bytes, or train on text that has them")


class TextStream:
    """Incremental decoder: text as soon as its characters are whole."""

    def __init__(self, tokenizer: Tokenizer, started: bool, skip_special: bool) -> None:
        self._tokenizer, self._started, self._skip_special = tokenizer, started, skip_special
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, number: int) -> str:
        """The text this id completes; "" while a character is unfinished."""
        piece = self._tokenizer._piece(number, self._skip_special)
        if piece and not self._started:
            piece, self._started = self._tokenizer._strip(piece), True
        return self._utf8.decode(piece)

    def flush(self) -> str:
        """The end: U+FFFD for an unfinished character, else ""."""
        return self._utf8.decode(b"", final=True)


def make_tokenizer(choice: str, texts: Iterable[str]) -> Tokenizer:
    """data.tokenizer: `bytes`, `chars`, `bpe:SIZE` (both learned from the texts) or the folder of a model."""
    if choice == "bytes":
        return Tokenizer.bytes_()
    if choice == "chars":
        return Tokenizer.chars(texts)
    kind, _, size = choice.partition(":")
    if kind == "bpe":
        if not size.isdecimal():
            raise UserError(f"data.tokenizer={choice} has no size", fix="data.tokenizer=bpe:4096")
        return Tokenizer.train_bpe(texts, int(size))
    if not Path(choice).is_dir():
        raise UserError(f"unknown tokenizer `{choice}`", "it is none of auto, bytes, chars, bpe:SIZE, and no folder", "data.tokenizer=bpe:4096")
    return Tokenizer.from_folder(choice)
