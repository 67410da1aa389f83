"""Packing: exact coverage, exact resume, cuts that do not show."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lilliput.base.errors import UserError
from lilliput.data import sources, text
from lilliput.data.batch import IGNORE, Order
from lilliput.data.text import PackedText, cut, read_tokens, tokenize
from lilliput.data.tokenizer import Tokenizer

WORDS = "Once upon a time, in a small town. There lived 12 cats — and a naïve dog! It's late.\n\nSo they slept; 日本語も。 The end "


@pytest.fixture(scope="module")
def bpe() -> Tokenizer:
    return Tokenizer.train_bpe([WORDS * 3], 300)


sizes = {"tokens": st.integers(4, 200), "sequence": st.integers(1, 12), "seed": st.integers(0, 3)}


@settings(deadline=None, max_examples=200)
@given(**sizes, data=st.data())
def test_an_epoch_has_every_token_once_but_for_the_stated_tail(tokens, sequence, seed, data):
    stream = PackedText(np.arange(tokens, dtype=np.uint16), min(sequence, tokens - 1), seed)
    rows, left_over = stream.rows, stream.summary()["left over"]
    inputs, targets, got = [], [], 0
    while got < rows:
        n = data.draw(st.integers(1, rows - got))
        batch = stream.next(n)
        assert batch.tokens_BT.shape == batch.targets_BT.shape == (n, stream.sequence) and batch.weight == n * stream.sequence
        assert batch.tokens_BT.dtype == batch.targets_BT.dtype == torch.int64
        assert torch.equal(batch.targets_BT, batch.tokens_BT + 1)  # tokens are 0, 1, 2, ...
        inputs += batch.tokens_BT.flatten().tolist()
        targets += batch.targets_BT.flatten().tolist()
        got += n
    assert sorted(inputs) == list(range(rows * stream.sequence)) and sorted(targets) == list(range(1, rows * stream.sequence + 1))
    assert left_over == tokens - 1 - rows * stream.sequence < stream.sequence


@settings(deadline=None, max_examples=100)
@given(**sizes, before=st.lists(st.integers(1, 5), max_size=6), after=st.lists(st.integers(1, 5), min_size=1, max_size=6))
def test_restore_goes_on_bitwise(tokens, sequence, seed, before, after):
    make = lambda: PackedText(np.arange(tokens, dtype=np.uint16), min(sequence, tokens - 1), seed)
    stream, other = make(), make()
    for n in before:
        stream.next(n)
    other.restore(stream.state())
    for n in after:
        assert torch.equal(stream.next(n).tokens_BT, other.next(n).tokens_BT)
    assert stream.state() == other.state()


def test_the_grouping_does_not_change_the_order():
    one, many = PackedText(np.arange(100), 4, 0), PackedText(np.arange(100), 4, 0)
    assert torch.equal(one.next(60).tokens_BT, torch.cat([many.next(n).tokens_BT for n in (1, 2, 30, 27)]))


def test_shuffles_differ_by_epoch_and_seed():
    orders = {tuple(Order(50, seed).row(epoch * 50 + i) for i in range(50)) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9 and all(sorted(order) == list(range(50)) for order in orders)
    order = Order(50, 0)
    backwards = [order.row(position) for position in reversed(range(150))]
    assert backwards[::-1] == [Order(50, 0).row(position) for position in range(150)]  # stateless: any order of asking


@pytest.mark.parametrize(("change", "key"), [({"sequence": 5}, "sequence"), ({"seed": 1}, "seed"), ({"data": "other"}, "data")])
def test_restore_refuses_other_data(change, key):
    stream = PackedText(np.arange(100), 4, 0)
    with pytest.raises(UserError, match="not the data of this checkpoint") as error:
        stream.restore(stream.state() | change)
    assert f"`{key}`" in error.value.why
    changed = np.arange(100)
    changed[50] = 0
    with pytest.raises(UserError):
        PackedText(changed, 4, 0).restore(stream.state())


@settings(deadline=None, max_examples=200)
@given(tokens=st.integers(2, 100), sequence=st.integers(1, 12), sequences=st.integers(1, 5), most=st.integers(1, 120))
def test_evaluation_scores_each_token_once_in_order(tokens, sequence, sequences, most):
    stream = PackedText(np.arange(tokens, dtype=np.uint16), sequence, 0)
    batches = list(stream.eval_batches(sequences, most))
    scored = [number for batch in batches for number in batch.targets_BT.flatten().tolist()]
    assert scored == list(range(1, min(tokens - 1, most) + 1)) and sum(batch.weight for batch in batches) == len(scored)
    assert all(len(batch.tokens_BT) <= sequences for batch in batches) and stream.state()["position"] == 0


def test_data_shorter_than_a_sequence():
    with pytest.raises(UserError, match="shorter than one sequence of 512") as error:
        PackedText(np.arange(512), 512, 0).next(1)
    assert "512 tokens, 513 are needed" in error.value.why and error.value.fix == "data.sequence=511"


# ---- tokenising


def test_documents_are_joined_by_the_end_token(tmp_path, bpe):
    (tmp_path / "a.txt").write_text("one cat")
    (tmp_path / "b.jsonl").write_text('{"text": "two"}\n{"text": ""}\n{"text": "three"}\n')
    end = [bpe.eos_ids[0]]
    tokens = read_tokens([tmp_path / "a.txt", tmp_path / "b.jsonl"], bpe)
    assert tokens.tolist() == bpe.encode("one cat") + end + bpe.encode("two") + end + end + bpe.encode("three") + end
    assert tokens.dtype == np.uint16
    assert tokenize([["ab"], ["c"]], Tokenizer.chars("abc")).tolist() == [0, 1, 2]  # no end token: nothing between
    (tmp_path / "b.jsonl").write_text('{"text": 3}\n')
    with pytest.raises(UserError, match=r"b\.jsonl line 1: `text` is not a string"):
        read_tokens([tmp_path / "b.jsonl"], bpe)


@settings(deadline=None, max_examples=100)
@given(data=st.data(), kind=st.sampled_from(["bpe", "llama", "bytes", "chars", "spm"]))
def test_blocks_give_the_tokens_of_the_whole_text(tmp_path_factory, bpe, data, kind):
    tokenizer = _tokenizers(bpe)[kind]
    words = data.draw(st.lists(st.sampled_from(WORDS.split(" ")), min_size=1, max_size=60))
    whole = "".join(word + data.draw(st.sampled_from([" ", "  ", "\n", ". ", ".\n\n", "", "<|im_end|>"])) for word in words)
    whole = whole if whole.strip() else "a"
    path = tmp_path_factory.mktemp("blocks") / "a.txt"
    path.write_bytes(whole.encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "BLOCK", 23)
        patch.setattr(text, "CUT_OVER", 10)
        tokens = read_tokens([path], tokenizer)
    assert tokens.tolist() == tokenizer.encode(whole) + list(tokenizer.eos_ids[:1])


def _tokenizers(bpe: Tokenizer) -> dict[str, Tokenizer]:
    import json

    from lilliput.data.vocabulary import Parts, sentencepiece

    model = json.loads(bpe.backend.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    llama = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "llama-bpe",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.merges": [" ".join(merge) for merge in model["merges"]],
        "tokenizer.ggml.token_type": [3, 3, 3] + [1] * (len(tokens) - 3),
    }
    pieces = ["▁t", "he", "▁a", "▁The", "▁", *sorted(set(WORDS) - {" "})]
    vocab = {piece: i for i, piece in enumerate(["<unk>", *(f"<0x{b:02X}>" for b in range(256)), *pieces])}
    spm = sentencepiece(vocab, {piece: -float(i) for i, piece in enumerate(pieces)}, "<unk>", "▁", prefix=True)
    alphabet = WORDS + " \n.<|im_end|>"
    return {"bpe": bpe, "llama": Tokenizer.from_gguf(llama), "bytes": Tokenizer.bytes_(), "chars": Tokenizer.chars(alphabet), "spm": Tokenizer(Parts(spm))}


def test_a_block_is_cut_at_a_word(bpe):
    assert cut("the cat sat", bpe) == ("the cat", " sat")
    assert cut("wordwithoutend", bpe) is None
    spm = _tokenizers(bpe)["spm"]
    assert cut("the cat sat", spm) == ("the cat", "sat")


@pytest.mark.shared
def test_real_text_in_blocks(shared_data, bpe, monkeypatch):
    monkeypatch.setattr(sources, "BLOCK", 1 << 12)
    monkeypatch.setattr(text, "CUT_OVER", 1 << 11)
    gpt2 = Tokenizer.from_folder(shared_data / "gpt2-tokenizer")
    for name, tokenizer in (("tinyshakespeare/input.txt", bpe), ("wikitext-2/valid.txt", gpt2), ("stories", None)):
        tokenizer = tokenizer or Tokenizer.from_llama2c(shared_data / "stories260K" / "tok512.bin")
        path = shared_data / ("cs336-fixtures/tinystories_sample.txt" if name == "stories" else name)
        whole = path.read_text()
        assert read_tokens([path], tokenizer).tolist() == tokenizer.encode(whole) + list(tokenizer.eos_ids[:1])


def test_ignore_is_torchs_default():
    assert torch.nn.CrossEntropyLoss().ignore_index == IGNORE
