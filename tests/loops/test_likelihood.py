"""Scores of packed rows equal scores of separate rows, for every kind of decoder."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lilliput.base.errors import UserError
from lilliput.data.tokenizer import Tokenizer
from lilliput.loops.likelihood import HEAD_ROWS, Pair, Score, beginning, encode_pair, score, token_logprobs
from lilliput.models.decoder import Decoder
from lilliput.models.sizes import PRESETS

SPECS = {
    "llama": PRESETS["tiny"],
    "window": replace(PRESETS["tiny"], family="mistral", window=5),
    "some windows": replace(PRESETS["tiny"], family="qwen2", window=4, window_layers=(True, False, True, False)),
    "gpt2": replace(PRESETS["gpt-nano"], vocab=1024, context=64),
}


@cache
def model(kind: str) -> Decoder:
    made = Decoder(SPECS[kind])
    made.init_weights(0)
    with torch.no_grad():
        for weight in made.parameters():
            weight.mul_(4 if weight.dim() > 1 else 1)  # sharper than a fresh model, so that mistakes show
    return made.eval()


@torch.inference_mode()
def plainly(decoder: Decoder, pair: Pair) -> Score:
    """One row, whole logits, log-softmax."""
    tokens = [*pair.context, *pair.continuation]
    logprobs = decoder(torch.tensor([tokens[:-1]]))[0].double().log_softmax(-1)[-len(pair.continuation) :]
    targets = torch.tensor(pair.continuation)
    return Score(float(logprobs.gather(1, targets[:, None]).sum()), bool((logprobs.argmax(-1) == targets).all()))


token = st.integers(0, 1023)


@st.composite
def questions(draw: st.DrawFn) -> list[Pair]:
    """Choices that share a context, or a part of one, or nothing."""
    shared = draw(st.lists(token, min_size=1, max_size=12))
    pairs = []
    for _ in range(draw(st.integers(1, 4))):
        own = draw(st.lists(token, max_size=3))
        pairs.append(Pair(tuple(shared[: draw(st.integers(1, len(shared)))] + own), tuple(draw(st.lists(token, min_size=1, max_size=6)))))
    return pairs


@settings(deadline=None, max_examples=25)
@pytest.mark.parametrize("kind", SPECS)
@given(groups=st.lists(questions(), min_size=1, max_size=5), batch=st.integers(1, 4))
def test_packed_rows_score_as_separate_ones(kind: str, groups: list[list[Pair]], batch: int) -> None:
    done: list[int] = []
    found = score(model(kind), groups, batch, done.append)
    assert sum(done) == len(groups)
    for pairs, scores in zip(groups, found):
        for pair, one in zip(pairs, scores):
            expected = plainly(model(kind), pair)
            assert one.logprob == pytest.approx(expected.logprob, abs=2e-4)
            assert one.greedy == expected.greedy


def test_greedy_is_what_greedy_decoding_writes() -> None:
    context = [1, 2, 3]
    for _ in range(3):
        context.append(int(model("llama")(torch.tensor([context]))[0, -1].argmax()))
    right, late = Pair((1, 2, 3), tuple(context[3:])), Pair((1, 2, 3), (*context[3:5], (context[5] + 1) % 1024))
    early = Pair((1, 2, 3), ((context[3] + 1) % 1024, *context[4:]))
    assert [one.greedy for one in score(model("llama"), [[early, late, right]], 1)[0]] == [False, False, True]


def test_long_contexts_lose_their_oldest_tokens() -> None:
    long = Pair(tuple(range(100)), (7, 8, 9))
    cut = Pair(tuple(range(100))[-62:], (7, 8, 9))  # 62 + 3 - 1 = 64 positions are read
    assert score(model("gpt2"), [[long]], 1)[0][0].logprob == pytest.approx(plainly(model("gpt2"), cut).logprob, abs=1e-4)
    with pytest.raises(UserError, match="longer than the model"):
        score(model("gpt2"), [[Pair((1,), tuple(range(65)))]], 1)


def test_heads_in_pieces() -> None:
    h_NC, targets_N = torch.randn(HEAD_ROWS + 3, SPECS["llama"].dim), torch.randint(0, 1024, (HEAD_ROWS + 3,))
    with torch.inference_mode():
        logprob_N, greedy_N = token_logprobs(model("llama"), h_NC, targets_N)
        logits_NV = model("llama").head(h_NC)
    torch.testing.assert_close(logprob_N, logits_NV.log_softmax(-1).gather(1, targets_N[:, None])[:, 0])
    assert torch.equal(greedy_N, logits_NV.argmax(-1) == targets_N)


def test_pairs_are_cut_where_the_context_ends() -> None:
    tokenizer = Tokenizer.train_bpe(["the cat sat on the mat. the cat ate. " * 50], 270)
    pair = encode_pair(tokenizer, "the cat  ", "sat")
    assert tokenizer.decode(pair.context) == "the cat" and tokenizer.decode(pair.continuation) == "  sat"
    assert (*pair.context, *pair.continuation) == tuple(tokenizer.encode("the cat  sat"))
    with pytest.raises(UserError, match="adds no token"):
        encode_pair(tokenizer, "the cat", "")


def test_texts_begin_as_the_model_was_trained() -> None:
    plain = Tokenizer.bytes_()
    assert beginning(plain) == ()
    assert encode_pair(plain, "", "ab").context == (plain.bos_id if plain.bos_id is not None else plain.eos_ids[0],)
    with pytest.raises(UserError, match="nothing stands before"):
        encode_pair(Tokenizer.chars("abc"), "", "ab")


@pytest.mark.shared
def test_bos_stands_before_contexts_where_the_tokenizer_puts_it(shared_data) -> None:  # type: ignore[no-untyped-def]
    llama = Tokenizer.from_llama2c(shared_data / "stories260K" / "tok512.bin")
    assert beginning(llama) == (llama.bos_id,)
    pair = encode_pair(llama, "Once upon", " a time")
    assert pair.context[0] == llama.bos_id and llama.bos_id not in pair.context[1:] + pair.continuation
    assert encode_pair(llama, "", "Once").context == (llama.bos_id,)
