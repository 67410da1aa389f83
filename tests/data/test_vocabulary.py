"""Vocabularies rebuilt from checkpoints, against plain reference implementations."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lilliput.base.errors import UserError
from lilliput.data import vocabulary
from lilliput.data.tokenizer import Tokenizer

WORDS = "the cat sat on a mat. The dog ate then and that was all he had. one two three aa bb ere erere banana\n"


def spm_pieces() -> list[tuple[str, float]]:
    """A llama2.c vocabulary learned by merging: specials, bytes, then merges and characters, best score first."""
    characters = sorted(set(WORDS) | {" "})
    merges = [" t", "he", " a", "nd", " the", "er", "re", "at", "ere", " th", "an", "ana", "aa", " c", " cat", "in", "on", "é", "▁"]
    learned = [*merges, *(c for c in characters if c not in merges)]
    return [("<unk>", 0.0), ("\n<s>\n", 0.0), ("\n</s>\n", 0.0), *((f"<0x{b:02X}>", 0.0) for b in range(256)), *((p, -float(i)) for i, p in enumerate(learned))]


def write_llama2c(path: Path, pieces: list[tuple[str, float]]) -> Path:
    content = struct.pack("<i", max(len(piece.encode()) for piece, _ in pieces))
    for piece, score in pieces:
        content += struct.pack("<fi", score, len(piece.encode())) + piece.encode()
    path.write_bytes(content)
    return path


def read_llama2c(path: Path) -> list[tuple[str, float]]:
    content, offset, pieces = path.read_bytes(), 4, []
    while offset < len(content):
        score, size = struct.unpack_from("<fi", content, offset)
        pieces.append((content[offset + 8 : offset + 8 + size].decode(), score))
        offset += 8 + size
    return pieces


def llama2c_encode(text: str, pieces: list[tuple[str, float]]) -> list[int]:
    """encode() of llama2.c's run.c, line by line: dummy blank, characters or bytes, then the best pair again and again."""
    lookup = {piece: i for i, (piece, _) in enumerate(pieces)}
    ids = [lookup[" "]] if text else []
    for character in text:
        ids += [lookup[character]] if character in lookup else [byte + 3 for byte in character.encode()]
    return merge_by_score(ids, pieces)


def merge_by_score(ids: list[int], pieces: list[tuple[str, float]]) -> list[int]:
    lookup = {piece: i for i, (piece, _) in enumerate(pieces)}
    while True:
        best, at = -1e10, -1
        for i in range(len(ids) - 1):
            merged = lookup.get(pieces[ids[i]][0] + pieces[ids[i + 1]][0])
            if merged is not None and pieces[merged][1] > best:
                best, at, joined = pieces[merged][1], i, merged
        if at < 0:
            return ids
        ids[at : at + 2] = [joined]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, list[tuple[str, float]]]:
    pieces = spm_pieces()
    return Tokenizer.from_llama2c(write_llama2c(tmp_path_factory.mktemp("spm") / "tok.bin", pieces)), pieces


@settings(deadline=None, max_examples=300)
@given(text=st.text(st.sampled_from(list("the cat erno\n▁é日🙂x")), max_size=40))
def test_llama2c_encodes_as_run_c(small, text):
    tokenizer, pieces = small
    assert tokenizer.encode(text) == llama2c_encode(text, pieces)
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode(text, special=True) == [1, *tokenizer.encode(text)]


@pytest.mark.parametrize("seed", range(60))
def test_merges_replay_scores_on_any_vocabulary(seed):
    random = Random(seed)
    letters = ["ab", "abc"][seed % 2]
    pieces = list(letters)
    for _ in range(random.randint(2, 10)):  # unions of two pieces, overlapping themselves and each other
        union = random.choice(pieces) + random.choice(pieces)
        pieces += [union] if union not in pieces and len(union) < 9 else []
    random.shuffle(pieces)
    scores = {piece: -float(i) for i, piece in enumerate(pieces)}
    backend = vocabulary.sentencepiece({piece: i for i, piece in enumerate(pieces)}, scores, pieces[0], " ", prefix=False)
    for _ in range(20):
        text = "".join(random.choice(letters) for _ in range(random.randint(1, 24)))
        assert backend.encode(text).ids == merge_by_score([pieces.index(letter) for letter in text], list(scores.items())), text


def test_llama2c_special_tokens_lose_their_line_ends(small):
    assert small[0].decode([1, 2, 0], skip_special=False) == "<s></s><unk>"


@pytest.mark.shared
@settings(deadline=None, max_examples=200)
@given(text=st.one_of(st.text(max_size=60), st.text(st.sampled_from(list(" etaonhisrdlu.,\n'\"")), max_size=120)))
def test_tok512_encodes_as_run_c(shared_data, text):
    path = shared_data / "stories260K" / "tok512.bin"
    tokenizer, pieces = Tokenizer.from_llama2c(path), read_llama2c(path)
    text = text.replace("<", "(").replace("\x00", "")  # <s> in a text is a special token here; C strings end at 0
    assert tokenizer.encode(text) == llama2c_encode(text, pieces)
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda b: b[:-3], "says"),
        (lambda b: b[:8] + b"\xff\xff\xff\x7f" + b[12:], "says"),
        (lambda b: b[:200], "byte"),
        (lambda b: b[: b.index(b" cat") + 2], "says 4 bytes"),
        (lambda b: b"", "0 pieces"),
    ],
)
def test_damaged_llama2c_file(tmp_path, damage, message):
    path = write_llama2c(tmp_path / "tok.bin", spm_pieces())
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError, match=r"tok\.bin: not a llama2\.c tokenizer") as error:
        Tokenizer.from_llama2c(path)
    assert message in error.value.why


# ---- GGUF


def gguf_metadata(pre: str, tokens: list[str], merges: list[str], **keys: object) -> dict[str, object]:
    special = [token.startswith("<|") for token in tokens]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.token_type": [3 if s else 1 for s in special],
        "tokenizer.ggml.bos_token_id": tokens.index("<|endoftext|>"),
        "tokenizer.ggml.eos_token_id": tokens.index("<|im_end|>"),
        "tokenizer.chat_template": "{{ messages }}",
    } | {f"tokenizer.ggml.{key}": value for key, value in keys.items()}


@pytest.fixture(scope="module")
def learned() -> tuple[list[str], list[str]]:
    """(tokens, merges) of a small byte-level BPE."""
    model = json.loads(Tokenizer.train_bpe([WORDS * 3 + "1234 5678 12345 " * 3], 300).backend.to_str())["model"]
    return sorted(model["vocab"], key=model["vocab"].get), [" ".join(merge) for merge in model["merges"]]


def test_gguf_rebuilds_the_tokenizer(learned):
    tokens, merges = learned
    tokenizer = Tokenizer.from_gguf(gguf_metadata("gpt-2", tokens, merges))
    original = Tokenizer.train_bpe([WORDS * 3 + "1234 5678 12345 " * 3], 300)
    text = WORDS + " 1234<|im_end|>\n\n  é🙂 don't"
    assert tokenizer.encode(text) == original.encode(text)
    assert tokenizer.decode(tokenizer.encode(text), skip_special=False) == text
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_ids, tokenizer.pad_id) == (300, 0, (2,), None)
    assert tokenizer.chat_template == "{{ messages }}"
    assert tokenizer.encode("a", special=True) == tokenizer.encode("a")


@pytest.mark.parametrize(
    ("pre", "text", "words"),
    [
        ("gpt-2", "don't 1234 A\n\nB²", ["don", "'t", "Ġ1234", "ĠA", "Ċ", "Ċ", "B", "Â²"]),
        ("smollm", "don't 1234 A\n\nB²", ["don", "'t", "Ġ", "1", "2", "3", "4", "ĠA", "Ċ", "Ċ", "B", "Â²"]),
        ("llama-bpe", "DON'T 1234 A.\n\nB", ["DON", "'T", "Ġ", "123", "4", "ĠA", ".ĊĊ", "B"]),
        ("qwen2", "DON'T 1234 A.\n\nB", ["DON", "'T", "Ġ", "1", "2", "3", "4", "ĠA", ".ĊĊ", "B"]),
    ],
)
def test_gguf_pre_tokenizers_cut_words_as_their_models_do(learned, pre, text, words):
    backend = Tokenizer.from_gguf(gguf_metadata(pre, *learned)).backend
    assert [word for word, _ in backend.pre_tokenizer.pre_tokenize_str(text)] == words


def test_gguf_llama3_adds_bos_and_takes_whole_words(learned):
    tokens, merges = learned
    word = next(token for token in tokens if token[0] == "Ġ" and len(token) > 2)
    merges = [merge for merge in merges if merge.replace(" ", "") != word]  # then it is reachable as a whole word only
    tokenizer = Tokenizer.from_gguf(gguf_metadata("llama-bpe", tokens, merges, eot_token_id=1))
    assert tokenizer.encode(word.replace("Ġ", " "), special=True) == [0, tokens.index(word)]
    assert tokenizer.eos_ids == (2, 1)
    assert Tokenizer.from_gguf(gguf_metadata("llama-bpe", tokens, merges, add_bos_token=False)).encode("a", special=True) == tokenizer.encode("a")


def test_gguf_sentencepiece_equals_the_llama2c_reference():
    pieces = [(piece.replace(" ", "▁"), score) for piece, score in spm_pieces() if piece != "▁"]
    pieces[1:3] = [("<s>", 0.0), ("</s>", 0.0)]
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [piece for piece, _ in pieces],
        "tokenizer.ggml.scores": [score for _, score in pieces],
        "tokenizer.ggml.token_type": [2, 3, 3, *[6] * 256, *[1] * (len(pieces) - 259)],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }
    tokenizer = Tokenizer.from_gguf(metadata)
    plain = [(piece.replace("▁", " "), score) for piece, score in pieces]
    for text in ("the cat sat on the mat", "banana erere\n日🙂é", " ", "", "  two  blanks  "):
        assert tokenizer.encode(text) == llama2c_encode(text, plain), text
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode("a", special=True)[0] == 1 and tokenizer.eos_ids == (2,)
    bare = Tokenizer.from_gguf(metadata | {"tokenizer.ggml.add_space_prefix": False})
    assert bare.encode(" the") == tokenizer.encode("the") and bare.decode(bare.encode(" the")) == " the"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"tokenizer.ggml.tokens": None}, "has no tokenizer"),
        ({"tokenizer.ggml.pre": "falcon"}, "pre-tokenizer `falcon`"),
        ({"tokenizer.ggml.pre": "default"}, "pre-tokenizer `default`"),
        ({"tokenizer.ggml.pre": None}, "pre-tokenizer `None`"),
        ({"tokenizer.ggml.model": "bert"}, "model `bert`"),
        ({"tokenizer.ggml.token_type": [1]}, "damaged"),
        ({"tokenizer.ggml.eos_token_id": 300}, "damaged"),
        ({"tokenizer.ggml.merges": ["zz yy"]}, "merges do not fit"),
        ({"tokenizer.ggml.model": "llama"}, "damaged"),
    ],
)
def test_gguf_faults_are_named(learned, change, words):
    with pytest.raises(UserError, match=words):
        Tokenizer.from_gguf(gguf_metadata("gpt-2", *learned) | change)


# ---- made here


def test_bpe_training_is_deterministic_and_exact_in_size():
    texts = [WORDS * 2, "a second text about a cat and the mat " * 2]
    first, second = Tokenizer.train_bpe(texts, 320), Tokenizer.train_bpe(iter(texts), 320)
    assert first.digest() == second.digest() and first.vocab_size == 320
    assert first.eos_ids == (0, 2) and first.encode("<|endoftext|><|im_start|><|im_end|>") == [0, 1, 2]
    with pytest.raises(UserError, match="too small for 5000 tokens") as error:
        Tokenizer.train_bpe(texts, 5000)
    size = int(error.value.fix.partition(":")[2])
    assert Tokenizer.train_bpe(texts, size).vocab_size == size
    with pytest.raises(UserError, match="100 tokens is too small"):
        Tokenizer.train_bpe(texts, 100)


def test_chars_is_nanogpts_vocabulary():
    text = "hello\nWörld 🙂"
    tokenizer = Tokenizer.chars(text)
    stoi = {character: i for i, character in enumerate(sorted(set(text)))}
    assert tokenizer.encode(text) == [stoi[character] for character in text]
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.vocab_size == len(stoi) and tokenizer.eos_ids == () and tokenizer.chat_template is None
    assert Tokenizer.chars(["hello\nWör", "ld 🙂"]).digest() == tokenizer.digest()
    with pytest.raises(UserError, match=r"character 'z' \(U\+007A\) is not in the vocabulary of 11 characters"):
        tokenizer.encode("z")
    with pytest.raises(UserError, match="no characters"):
        Tokenizer.chars("")


def test_bytes_are_ids():
    tokenizer = Tokenizer.bytes_()
    assert tokenizer.encode("aé\n ") == list("aé\n ".encode())
    assert tokenizer.decode(range(256)) == bytes(range(256)).decode("utf-8", "replace")
    assert tokenizer.vocab_size == 259 and tokenizer.eos_ids == (256, 258)


def test_byte_characters_are_gpt2s():
    table = vocabulary.byte_characters()
    assert len(set(table.values())) == 256
    assert (table[ord(" ")], table[ord("\n")], table[ord("a")], table[0xAD]) == ("Ġ", "Ċ", "a", "Ń")
