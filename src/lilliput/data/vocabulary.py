"""Building a tokenizer from what a checkpoint carries, or from text. Three families cover all decoder-only models:

byte-level BPE    every byte has a printable stand-in; a regex cuts words, merges join bytes inside a word (GPT-2, Llama 3, Qwen, SmolLM)
SentencePiece BPE pieces with scores; the adjacent pair whose union scores best is joined first; unknown characters become bytes `<0xNN>`
characters        one token a character, as in nanoGPT

The `tokenizers` package runs all three. It knows merges (ordered pairs), not scores, so SentencePiece scores are turned
into merges: every split of a piece into two pieces becomes a pair, ordered by the score of the union. Splits of one
piece tie, and their order does not show: checked on random vocabularies against llama2.c's loop.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from lilliput.base.errors import UserError
from lilliput.data.template import CHATML

END, TURN, END_TURN = "<|endoftext|>", "<|im_start|>", "<|im_end|>"  # special tokens of tokenizers made here
LARGEST_PIECE = 1024  # bytes; a longer one in a tok.bin is a damaged file


@dataclass(frozen=True)
class Parts:
    """A runnable tokenizer and the ids a model gives a meaning to."""

    backend: Tokenizer
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()  # the first one ends documents; generation stops at any
    pad_id: int | None = None
    chat_template: str | None = None


def read_bytes(path: Path) -> bytes:
    """A whole file; UserError when it cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}", error.strerror or str(error), f"ls -l {path}") from error


def read_text(path: Path) -> str:
    """A whole UTF-8 file, line ends as they are."""
    try:
        return read_bytes(path).decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8", f"byte 0x{error.object[error.start]:02x} at offset {error.start}", "download the model again") from error


# ---- byte-level BPE


def _word_pattern(digits: str) -> str:
    """The cl100k word pattern of Llama 3 and Qwen 2; they differ in how many digits stay together."""
    contraction = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
    return contraction + r"|[^\r\n\p{L}\p{N}]?\p{L}+|" + digits + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def _split(pattern: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _gpt2_words() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


# tokenizer.ggml.pre -> (pre-tokenizer, normalizer, whole words that are tokens skip the merges, BOS by default)
GGUF_PRE = {
    "gpt-2": (_gpt2_words, None, False, False),
    "smollm": (lambda: pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _gpt2_words()]), None, False, False),
    "llama-bpe": (lambda: _split(_word_pattern(r"\p{N}{1,3}")), None, True, True),
    "qwen2": (lambda: _split(_word_pattern(r"\p{N}")), normalizers.NFC, False, False),
}


def byte_level(vocab: Mapping[str, int], merges: Iterable[str], ignore_merges: bool = False) -> Tokenizer:
    """Byte-level BPE with GPT-2's words from a vocabulary and lines `left right`."""
    pairs = [(left, right) for left, _, right in (merge.partition(" ") for merge in merges)]
    try:
        backend = Tokenizer(models.BPE(vocab=dict(vocab), merges=pairs, ignore_merges=ignore_merges))
    except Exception as error:  # tokenizers raises bare Exception
        raise UserError("the tokenizer's merges do not fit its vocabulary", str(error), "download the model again") from error
    backend.pre_tokenizer = _gpt2_words()
    backend.decoder = decoders.ByteLevel()
    return backend


def add_bos(backend: Tokenizer, bos_id: int, eos_id: int | None = None) -> None:
    """Make encode(special=True) put BOS before the text (and EOS after it when given)."""
    bos = backend.id_to_token(bos_id)
    tokens, template = [(bos, bos_id)], f"{bos}:0 $A:0"
    if eos_id is not None:
        eos = backend.id_to_token(eos_id)
        tokens, template = [*tokens, (eos, eos_id)], f"{template} {eos}:0"
    backend.post_processor = processors.TemplateProcessing(single=template, special_tokens=tokens)


# ---- SentencePiece BPE


def merges_from_scores(scores: Mapping[str, float]) -> list[tuple[str, str]]:
    """Pairs in the order in which SentencePiece would join them: best score of the union first."""
    ranked = []
    for piece in scores:
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in scores and right in scores:
                ranked.append((scores[piece], left, right))
    ranked.sort(key=lambda entry: -entry[0])
    return [(left, right) for _, left, right in ranked]


def sentencepiece(vocab: Mapping[str, int], scores: Mapping[str, float], unknown: str, space: str, prefix: bool) -> Tokenizer:
    """BPE with byte fallback. `space`: how a blank is written in the pieces; `prefix`: put one before the text, and drop it in decoding."""
    merges = merges_from_scores(scores)
    backend = Tokenizer(models.BPE(vocab=dict(vocab), merges=merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    first = [normalizers.Prepend(space)] if prefix else []
    backend.normalizer = normalizers.Sequence([*first, *([] if space == " " else [normalizers.Replace(" ", space)])])
    blanks = [] if space == " " else [decoders.Replace(space, " ")]
    backend.decoder = decoders.Sequence([*blanks, decoders.ByteFallback(), decoders.Fuse(), *([decoders.Strip(" ", 1, 0)] if prefix else [])])
    return backend


def from_llama2c(path: Path) -> Parts:
    """llama2.c's tokenizer file: int32 longest piece, then (float32 score, int32 bytes, UTF-8) for each id; 0 unknown, 1 BOS, 2 EOS."""
    content = read_bytes(path)
    pieces: list[str] = []
    scores: list[float] = []
    offset = 4
    while offset < len(content):
        score, size = struct.unpack_from("<fi", content, offset) if offset + 8 <= len(content) else (0.0, -1)
        offset += 8
        if not 0 <= size <= LARGEST_PIECE or offset + size > len(content):
            raise _not_llama2c(path, f"piece {len(pieces)} at byte {offset} says {size} bytes of {len(content)}")
        try:
            pieces.append(content[offset : offset + size].decode())
        except UnicodeDecodeError as error:
            raise _not_llama2c(path, f"piece {len(pieces)} at byte {offset} is not UTF-8") from error
        scores.append(score)
        offset += size
    if len(pieces) < 259 or pieces[3] != "<0x00>":
        raise _not_llama2c(path, f"{len(pieces)} pieces; ids 3 to 258 must be the bytes <0x00> to <0xFF>")
    pieces[1:3] = ["<s>", "</s>"]  # the file has them as "\n<s>\n", for printing
    vocab = {piece: index for index, piece in enumerate(pieces)}
    backend = sentencepiece(vocab, dict(zip(pieces[259:], scores[259:])), "<unk>", " ", prefix=True)
    backend.add_special_tokens([AddedToken(piece, normalized=False, special=True) for piece in pieces[:3]])
    add_bos(backend, 1)
    return Parts(backend, bos_id=1, eos_ids=(2,))


def _not_llama2c(path: Path, why: str) -> UserError:
    return UserError(f"{path}: not a llama2.c tokenizer", why, "download it again")


# ---- GGUF


def from_gguf(metadata: Mapping[str, Any]) -> Parts:
    """From the `tokenizer.*` keys of a GGUF file (names as in the file, values as Python lists and scalars)."""
    tokens, kinds = metadata.get("tokenizer.ggml.tokens"), metadata.get("tokenizer.ggml.token_type")
    if not tokens:
        raise UserError("this GGUF file has no tokenizer", "the key tokenizer.ggml.tokens is missing", "use a GGUF made by llama.cpp's convert_hf_to_gguf.py")
    tokens = list(tokens)
    vocab = {token: index for index, token in enumerate(tokens)}
    kinds = [1] * len(tokens) if kinds is None else [int(kind) for kind in kinds]
    if len(vocab) != len(tokens) or len(kinds) != len(tokens):
        raise UserError("this GGUF file has a damaged tokenizer", f"{len(tokens)} tokens, {len(vocab)} different, {len(kinds)} types", "download it again")

    def token_id(name: str) -> int | None:
        value = metadata.get(f"tokenizer.ggml.{name}_token_id")
        if value is not None and not 0 <= int(value) < len(tokens):
            raise UserError("this GGUF file has a damaged tokenizer", f"{name}_token_id {value} of {len(tokens)} tokens", "download it again")
        return None if value is None else int(value)

    model = metadata.get("tokenizer.ggml.model")
    if model == "gpt2":
        backend, bos_by_default = _gguf_byte_level(metadata, vocab), GGUF_PRE[metadata["tokenizer.ggml.pre"]][3]
    elif model == "llama":
        backend, bos_by_default = _gguf_sentencepiece(metadata, vocab, kinds, token_id("unknown") or 0), True
    else:
        raise UserError(f"tokenizer model `{model}` of this GGUF file is not supported", "known: gpt2 (byte-level BPE), llama (SentencePiece BPE)")
    # kinds: 1 normal, 2 unknown, 3 control, 4 user defined, 5 unused, 6 byte
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token, kind in zip(tokens, kinds) if kind in (2, 3)])
    backend.add_tokens([AddedToken(token, normalized=False, special=False) for token, kind in zip(tokens, kinds) if kind == 4])
    bos, eos, turn = token_id("bos"), token_id("eos"), token_id("eot")
    if bos is not None and metadata.get("tokenizer.ggml.add_bos_token", bos_by_default):
        add_bos(backend, bos, eos if metadata.get("tokenizer.ggml.add_eos_token") else None)
    eos_ids = tuple(dict.fromkeys(i for i in (eos, turn) if i is not None))
    return Parts(backend, bos, eos_ids, token_id("padding"), metadata.get("tokenizer.chat_template"))


def _gguf_byte_level(metadata: Mapping[str, Any], vocab: Mapping[str, int]) -> Tokenizer:
    pre = metadata.get("tokenizer.ggml.pre")
    if pre not in GGUF_PRE:
        fix = "use the model's safetensors folder, which has the exact tokenizer.json"
        raise UserError(f"pre-tokenizer `{pre}` of this GGUF file is not supported", f"known: {', '.join(GGUF_PRE)}", fix)
    words, normalizer, ignore_merges, _ = GGUF_PRE[pre]
    backend = byte_level(vocab, metadata.get("tokenizer.ggml.merges", ()), ignore_merges)
    backend.pre_tokenizer = words()
    if normalizer is not None:
        backend.normalizer = normalizer()
    return backend


def _gguf_sentencepiece(metadata: Mapping[str, Any], vocab: Mapping[str, int], kinds: Sequence[int], unknown_id: int) -> Tokenizer:
    values = metadata.get("tokenizer.ggml.scores", ())
    if len(values) != len(vocab):
        raise UserError("this GGUF file has a damaged tokenizer", f"{len(vocab)} tokens, {len(values)} scores", "download it again")
    scores = {token: float(values[index]) for token, index in vocab.items() if kinds[index] == 1}
    unknown = next(token for token, index in vocab.items() if index == unknown_id)
    return sentencepiece(vocab, scores, unknown, "▁", prefix=bool(metadata.get("tokenizer.ggml.add_space_prefix", True)))


# ---- made here


def chars(texts: Iterable[str]) -> Parts:
    """One token a character of the text, ids in code point order: nanoGPT's character vocabulary. No special tokens."""
    alphabet = sorted(set().union(*texts))
    if not alphabet:
        raise UserError("no characters to make a vocabulary of", "the text is empty", "data.path=FILE with text in it")
    backend = Tokenizer(models.BPE(vocab={character: index for index, character in enumerate(alphabet)}, merges=[]))
    backend.decoder = decoders.Fuse()
    return Parts(backend)


def bytes_() -> Parts:
    """One token a byte: id = byte value; 256 to 258 are the special tokens."""
    vocab = {character: byte for byte, character in byte_characters().items()}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in (END, TURN, END_TURN)])
    return _made_here(backend)


def train_bpe(texts: Iterable[str], size: int) -> Parts:
    """Byte-level BPE of exactly `size` tokens learned from the texts: ids 0 to 2 are the special tokens, then 256 bytes, then merges."""
    least = 256 + 3
    if size < least:
        raise UserError(f"a BPE vocabulary of {size} tokens is too small", f"256 bytes and 3 special tokens need {least}", f"data.tokenizer=bpe:{4 * least}")
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = _gpt2_words()
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special: list[str | AddedToken] = [AddedToken(token, normalized=False, special=True) for token in (END, TURN, END_TURN)]
    backend.train_from_iterator(
        iter(texts), trainers.BpeTrainer(vocab_size=size, min_frequency=2, show_progress=False, special_tokens=special, initial_alphabet=alphabet)
    )
    got = backend.get_vocab_size()
    if got < size:
        raise UserError(f"the text is too small for {size} tokens", f"after {got - least} merges no pair occurs twice", f"data.tokenizer=bpe:{got}")
    return _made_here(backend)


def _made_here(backend: Tokenizer) -> Parts:
    ids = backend.get_vocab()
    return Parts(backend, eos_ids=(ids[END], ids[END_TURN]), pad_id=ids[END], chat_template=CHATML)


def byte_characters() -> dict[int, str]:
    """Byte -> its printable stand-in in byte-level vocabularies (GPT-2's encoder.py): printable Latin-1 as is, the rest from U+0100 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + index) for index, byte in enumerate(others)}
