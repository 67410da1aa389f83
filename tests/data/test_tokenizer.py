"""Encoding, decoding, streams, folders; transformers is the oracle for saved folders."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models
from tokenizers import Tokenizer as Backend

from lilliput.base.errors import UserError
from lilliput.data.tokenizer import Tokenizer, make_tokenizer
from lilliput.data.vocabulary import Parts, add_bos, sentencepiece

CORPUS = "The quick brown fox jumps over the lazy dog; the dog sleeps. Größe, 日本語, naïve 🙂🙂!\n\n\tdef f(x): return x ** 2 # 1234\n" * 4
STRANGE = ["", " ", "\n\n", "  two  blanks ", "é", "日本語 🙂", "<|im_end|>", "a<|im_start|>b", "\x00\x7f", "e\u0301", "👩‍👩‍👧", "1234 5678"]


def spm() -> Tokenizer:
    """SentencePiece BPE with byte fallback, blanks as ▁, one added token."""
    learned = ["▁t", "he", "▁the", "▁d", "og", "▁dog", "▁", *"abcdefghijklmnopqrstuvwxyz.é"]
    vocab = {piece: i for i, piece in enumerate(["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *learned])}
    backend = sentencepiece(vocab, {piece: -float(i) for i, piece in enumerate(learned)}, "<unk>", "▁", prefix=True)
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in ("<unk>", "<s>", "</s>")])
    add_bos(backend, 1)
    return Tokenizer(Parts(backend, bos_id=1, eos_ids=(2,)))


@pytest.fixture(scope="module")
def kinds() -> dict[str, Tokenizer]:
    return {"bpe": Tokenizer.train_bpe([CORPUS], 330), "bytes": Tokenizer.bytes_(), "spm": spm(), "chars": Tokenizer.chars(CORPUS + "".join(STRANGE))}


@settings(deadline=None, max_examples=200)
@given(text=st.text(max_size=60), kind=st.sampled_from(["bpe", "bytes", "spm"]))
@example("▁", "bpe")
def test_round_trip(kinds, text, kind):
    tokenizer = kinds[kind]
    text = text.replace("▁", "_") if kind == "spm" else text  # SentencePiece writes blanks as ▁: the two are one to it
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids, skip_special=False) == text
    assert all(0 <= number < tokenizer.vocab_size for number in ids)
    assert tokenizer.encode_batch([text, "a"]) == [ids, tokenizer.encode("a")]


@settings(deadline=None, max_examples=300)
@given(data=st.data(), kind=st.sampled_from(["bpe", "bytes", "spm", "chars"]), skip=st.booleans())
def test_a_stream_adds_up_to_decode(kinds, data, kind, skip):
    tokenizer = kinds[kind]
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size + 3), max_size=30))
    stream = tokenizer.stream(skip_special=skip)
    pushed = [stream.push(number) for number in ids]
    assert "".join(pushed) + stream.flush() == tokenizer.decode(ids, skip_special=skip)


@settings(deadline=None, max_examples=100)
@given(text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\ufffd"), max_size=40), kind=st.sampled_from(["bpe", "bytes", "spm"]))
def test_a_stream_of_good_text_never_shows_a_replacement_character(kinds, text, kind):
    stream = kinds[kind].stream()
    pushed = [stream.push(number) for number in kinds[kind].encode(text)]
    assert "\ufffd" not in "".join(pushed) and stream.flush() == ""


def test_a_stream_holds_back_an_unfinished_character(kinds):
    stream = kinds["bytes"].stream()
    assert [stream.push(byte) for byte in "🙂".encode()] == ["", "", "", "🙂"]
    assert stream.push(0xF0) == "" and stream.flush() == "\ufffd"


def test_a_stream_after_text_keeps_its_first_blank(kinds):
    tokenizer = kinds["spm"]
    prompt, ids = tokenizer.encode("the"), tokenizer.encode("dog")
    assert tokenizer.stream().push(ids[0]) == "dog"
    assert tokenizer.stream(after=prompt).push(ids[0]) == " dog"
    stream = tokenizer.stream()
    assert [stream.push(1), stream.push(ids[0])] == ["", "dog"]  # BOS shows nothing, so the text still starts after it
    assert tokenizer.stream(after=[1]).push(ids[0]) == "dog"  # nothing but BOS before


@pytest.mark.parametrize("kind", ["bpe", "bytes", "spm", "chars"])
def test_saved_folders_load_here_and_in_transformers(kinds, kind, tmp_path):
    from transformers import AutoTokenizer

    tokenizer = kinds[kind]
    tokenizer.save(tmp_path / "model")
    again, theirs = Tokenizer.from_folder(tmp_path / "model"), AutoTokenizer.from_pretrained(tmp_path / "model")
    assert again.digest() == tokenizer.digest()
    assert (again.bos_id, again.eos_ids, again.pad_id, again.chat_template) == (tokenizer.bos_id, tokenizer.eos_ids, tokenizer.pad_id, tokenizer.chat_template)
    for text in [CORPUS, *STRANGE]:
        ids = tokenizer.encode(text)
        assert again.encode(text) == ids == theirs.encode(text, add_special_tokens=False), text
        assert theirs.encode(text) == tokenizer.encode(text, special=True), text
        for skip in (True, False):
            assert theirs.decode(ids, skip_special_tokens=skip) == tokenizer.decode(ids, skip_special=skip), text
    assert theirs.eos_token_id == (tokenizer.eos_ids[0] if tokenizer.eos_ids else None)
    assert (theirs.bos_token_id, theirs.pad_token_id) == (tokenizer.bos_id, tokenizer.pad_id)
    if tokenizer.chat_template:
        messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}, {"role": "user", "content": "é"}]
        assert theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == tokenizer.apply_chat(messages)


def test_digest_sees_every_part(kinds):
    parts = kinds["bpe"]._parts
    changed = [{"bos_id": 1}, {"eos_ids": (0,)}, {"pad_id": None}, {"chat_template": "x"}]
    digests = {Tokenizer(Parts(**{**parts.__dict__, **change})).digest() for change in changed}
    assert len(digests | {kinds["bpe"].digest(), kinds["bytes"].digest()}) == 6


def test_a_folder_without_a_tokenizer_says_what_is_there(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="has no tokenizer") as error:
        Tokenizer.from_folder(tmp_path)
    assert "config.json" in error.value.why
    (tmp_path / "tokenizer.model").write_bytes(b"x")
    with pytest.raises(UserError) as error:
        Tokenizer.from_folder(tmp_path)
    assert "save_pretrained" in error.value.fix
    with pytest.raises(UserError, match="there is no folder"):
        Tokenizer.from_folder(tmp_path / "nowhere")
    with pytest.raises(UserError, match="no tokenizer file"):
        Tokenizer.from_file(tmp_path / "tokenizer.json")


@pytest.mark.parametrize(
    ("file", "content"),
    [("tokenizer.json", "{"), ("tokenizer.json", '{"version": "1.0"}'), ("tokenizer_config.json", "[]"), ("generation_config.json", "}")],
)
def test_broken_tokenizer_files_are_named(kinds, tmp_path, file, content):
    kinds["bytes"].save(tmp_path)
    (tmp_path / file).write_text(content)
    with pytest.raises(UserError, match=file):
        Tokenizer.from_folder(tmp_path)


def test_end_tokens_come_from_every_file_the_tokenizers_own_first(kinds, tmp_path):
    kinds["spm"].save(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 2, 9]}))
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 11}))
    (tmp_path / "chat_template.jinja").write_text("{{ eos_token }}")
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert tokenizer.eos_ids == (2, 7, 9, 11) and tokenizer.apply_chat([]) == "</s>"
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config |= {"eos_token": {"content": "</s>"}, "chat_template": [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "chat_template.jinja").unlink()
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert tokenizer.eos_ids[0] == 2 and tokenizer.chat_template == "d"


def test_tokens_that_only_the_config_knows_are_added(kinds, tmp_path):
    kinds["bytes"].save(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config["added_tokens_decoder"] = {"259": {"content": "<tool>", "special": True, "normalized": False}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert tokenizer.encode("a<tool>") == [97, 259] and tokenizer.decode([97, 259]) == "a" and tokenizer.vocab_size == 260
    config["added_tokens_decoder"] = {"300": {"content": "<tool>", "special": True}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="contradict") as error:
        Tokenizer.from_folder(tmp_path)
    assert "259" in error.value.why and "300" in error.value.why


def test_vocab_json_and_merges_txt(kinds, tmp_path):
    model = json.loads(kinds["bpe"].backend.to_str())["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "".join(" ".join(merge) + "\n" for merge in model["merges"]))
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert tokenizer.encode(CORPUS) == kinds["bpe"].encode(CORPUS)
    assert tokenizer.eos_ids == (0,) and tokenizer.bos_id == 0 and tokenizer.encode("<|endoftext|>") == [0]
    opt = {"bos_token": {"content": "<|im_start|>"}, "eos_token": "<|im_end|>", "add_bos_token": True}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(opt))
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert tokenizer.encode("The", special=True) == [1, *tokenizer.encode("The")] and tokenizer.eos_ids == (2,)


def test_files_that_cannot_be_read(kinds, tmp_path):
    with pytest.raises(UserError, match=r"cannot read .*tok\.bin"):
        Tokenizer.from_llama2c(tmp_path / "tok.bin")
    kinds["bytes"].save(tmp_path)
    (tmp_path / "chat_template.jinja").write_bytes(b"ok \xff")
    with pytest.raises(UserError, match=r"chat_template\.jinja is not UTF-8") as error:
        Tokenizer.from_folder(tmp_path)
    assert "offset 3" in error.value.why


def test_unsupported_decoder_is_refused():
    backend = Backend(models.BPE(vocab={"a": 0}, merges=[]))
    backend.decoder = decoders.WordPiece()
    with pytest.raises(UserError, match="decoder `WordPiece`"):
        Tokenizer(Parts(backend)).decode([0])


def test_half_a_surrogate_is_refused(kinds):
    with pytest.raises(UserError, match="not valid Unicode") as error:
        kinds["bpe"].encode("ab\ud83d")
    assert "character 2" in error.value.why


def test_no_chat_template(kinds):
    with pytest.raises(UserError, match="no chat template"):
        kinds["spm"].apply_chat([{"role": "user", "content": "hi"}])


def test_make_tokenizer(kinds, tmp_path):
    assert make_tokenizer("bytes", []).digest() == kinds["bytes"].digest()
    assert make_tokenizer("bpe:330", [CORPUS]).digest() == kinds["bpe"].digest()
    assert make_tokenizer("chars", ["ab", "bc"]).vocab_size == 3
    kinds["spm"].save(tmp_path)
    assert make_tokenizer(str(tmp_path), []).digest() == kinds["spm"].digest()
    for choice in ("bpe", "bpe:x", "nowhere/else"):
        with pytest.raises(UserError, match=choice):
            make_tokenizer(choice, [CORPUS])


def test_no_torch_is_imported():
    code = "import sys, lilliput.data.tokenizer, lilliput.data.load, lilliput.data.calibration; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.fixture(scope="module")
def smollm2_tokenizer(smollm2) -> Tokenizer:
    from lilliput.models.gguf import read_header

    return Tokenizer.from_gguf(read_header(smollm2).metadata)


def test_the_default_models_tokenizer(smollm2_tokenizer, tmp_path):
    from transformers import AutoTokenizer

    ours = smollm2_tokenizer
    assert (ours.vocab_size, ours.bos_id, ours.eos_ids, ours.pad_id) == (49152, 1, (2,), 2)
    # digits stay single, also those that are not ASCII: transformers' own GGUF loader loses that
    assert ours.encode("Hello world 1234 ²") == [19556, 905, 216, 33, 34, 35, 36, 216, 19133]
    ours.save(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    for text in [CORPUS, *STRANGE, "٣४² 12,345.67"]:
        assert theirs.encode(text) == ours.encode(text, special=True) == ours.encode(text), text
    messages = [{"role": "user", "content": "What is the capital of France?"}, {"role": "assistant", "content": "Paris."}, {"role": "user", "content": "Ok"}]
    prompt = ours.apply_chat(messages)
    assert prompt.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM") and prompt.endswith("<|im_start|>assistant\n")
    assert theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == prompt
    assert theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False) == ours.encode(prompt)


@pytest.mark.shared
def test_the_default_models_token_counts(smollm2_tokenizer, shared_data):
    files = {"tinyshakespeare/input.txt": 341_094, "wikitext-2/valid.txt": 273_868, "wikitext-2/test.txt": 312_144}
    assert {name: len(smollm2_tokenizer.encode((shared_data / name).read_text())) for name in files} == files


@pytest.mark.shared
def test_gpt2s_own_files_equal_transformers(shared_data):
    from transformers import GPT2Tokenizer

    ours = Tokenizer.from_folder(shared_data / "gpt2-tokenizer")
    folder = shared_data / "gpt2-tokenizer"
    theirs = GPT2Tokenizer.from_pretrained(folder)
    assert ours.vocab_size == 50257 and ours.eos_ids == (50256,)
    text = (shared_data / "wikitext-2" / "valid.txt").read_text()[:200_000]
    for sample in [text, CORPUS, *STRANGE]:
        assert ours.encode(sample) == theirs.encode(sample), sample[:80]
        assert ours.decode(ours.encode(sample)) == sample.replace("<|endoftext|>", "")


@pytest.mark.shared
def test_wikitext_has_the_published_number_of_gpt2_tokens(shared_data):
    raw = (shared_data / "wikitext-2" / "wiki.test.raw").read_text()
    rows = [line + "\n" if line.strip() else "" for line in raw.split("\n")[:-1]]
    assert len(Tokenizer.from_folder(shared_data / "gpt2-tokenizer").encode("\n\n".join(rows))) == 287_644
