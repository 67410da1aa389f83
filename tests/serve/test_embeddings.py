"""Embeddings: the vectors of transformers' hidden states, pooled by hand, for a decoder and a BERT-class encoder; and an encoder behind the API."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import torch

from lilliput.base.errors import UserError
from lilliput.models import hub
from lilliput.models.load import load_model, resolve_spec
from lilliput.serve import embeddings
from lilliput.serve.embeddings import Pooling

TEXTS = ["to be or not to be", "a", "the question is whether it is nobler", "to be or not to be"]


def bert(folder: Path) -> torch.nn.Module:
    from transformers import BertConfig, BertModel, BertTokenizerFast

    words = sorted({letter for text in TEXTS for word in text.split() for letter in (word[0], *("##" + one for one in word[1:]))})
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]))
    tokenizer = BertTokenizerFast(vocab_file=str(folder / "vocab.txt"), vocab=str(folder / "vocab.txt"))
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    shape = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 100, "max_position_embeddings": 60}
    model = BertModel(BertConfig(vocab_size=len(tokenizer), **shape)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    return model


def by_hand(hidden_SC: torch.Tensor, pooling: Pooling) -> torch.Tensor:
    vector = hidden_SC.mean(0) if pooling == "mean" else hidden_SC[-1]
    return vector / vector.norm()


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_a_decoders_vectors_are_transformers(pooling: Pooling) -> None:
    from transformers import AutoModel

    folder = hub.SHIPPED / "lilliput-tiny"
    theirs = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    _, tokenizer, _ = load_model("lilliput-tiny")
    ids = tokenizer.encode_batch(TEXTS, special=True)
    ours = embeddings.of_decoder("lilliput-tiny", "cpu", "fp32", resolve_spec("lilliput-tiny")[0], pooling)
    vectors = ours.embed(ids)
    with torch.inference_mode():
        want = [by_hand(theirs(torch.tensor([one])).last_hidden_state[0], pooling) for one in ids]
    torch.testing.assert_close(torch.tensor(vectors), torch.stack(want), rtol=1e-4, atol=1e-5)
    assert ours.dim == len(vectors[0])
    with pytest.raises(UserError, match="text 1 has 0 tokens"):
        ours.embed([[1], []])
    with pytest.raises(UserError, match="text 0 has 300 tokens"):
        ours.embed([[1] * 300])
    for stranger in (-1, 1024):
        with pytest.raises(UserError, match=f"token id {stranger} is not"):
            ours.embed([[1, stranger]])


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_an_encoders_vectors_are_transformers(pooling: Pooling, tmp_path: Path) -> None:
    theirs = bert(tmp_path)
    ours, tokenizer = embeddings.of_encoder(tmp_path, pooling)
    ids = tokenizer.encode_batch(TEXTS, special=True)
    assert ids[0][0] == 2 and ids[0][-1] == 3, "[CLS] ... [SEP]"
    with torch.inference_mode():
        want = [by_hand(theirs(torch.tensor([one])).last_hidden_state[0], pooling) for one in ids]
    torch.testing.assert_close(torch.tensor(ours.embed(ids)), torch.stack(want), rtol=1e-3, atol=1e-4)


def test_texts_of_many_lengths_are_cut_into_batches_and_come_back_in_order() -> None:
    seen = []

    def hidden(tokens_BS: torch.Tensor, mask_BS: torch.Tensor) -> torch.Tensor:
        seen.append(tuple(tokens_BS.shape))
        return torch.stack([tokens_BS.float(), mask_BS.float()], -1)

    ours = embeddings.Embedder(lambda: hidden, 2, 5000, 10, "last")
    texts = [[number] * length for number, length in enumerate([4000, 3, 2000, 2000, 1, 90], 1)]
    vectors = ours.embed(texts)
    assert [round(one[0] / one[1]) for one in vectors] == [1, 2, 3, 4, 5, 6]
    assert all(rows * longest <= max(embeddings.BATCH_TOKENS, longest) for rows, longest in seen) and len(seen) == 3


def test_an_encoder_behind_the_api(tmp_path: Path) -> None:
    pytest.importorskip("fastapi", reason="needs the extra `serve`")
    from http_server import KEY, Running

    bert(tmp_path)
    server = Running([f"model={tmp_path}"])
    head = {"Content-Type": "application/json", "Authorization": f"Bearer {KEY}"}

    def call(path: str, body: object = None) -> tuple[int, dict]:
        data = None if body is None else json.dumps(body).encode()
        try:
            with urllib.request.urlopen(urllib.request.Request(server.url + path, data, head), timeout=30) as answer:
                return answer.status, json.loads(answer.read())
        except urllib.error.HTTPError as error:
            return error.code, json.loads(error.read())

    try:
        status, told = call("/v1/embeddings", {"input": TEXTS})
        direct, tokenizer = embeddings.of_encoder(tmp_path, "mean")
        assert status == 200 and [item["index"] for item in told["data"]] == [0, 1, 2, 3]
        vectors = direct.embed(tokenizer.encode_batch(TEXTS, special=True))
        torch.testing.assert_close(torch.tensor([item["embedding"] for item in told["data"]]), torch.tensor(vectors))
        assert told["usage"]["prompt_tokens"] == sum(map(len, tokenizer.encode_batch(TEXTS, special=True)))
        assert call("/health")[0] == 200 and call("/v1/models")[1]["data"][0]["id"] == "tiny" and call("/stats")[0] == 200
        assert call("/tokenize", {"prompt": "to be"})[1]["max_model_len"] == 60
        chat = {"messages": [{"role": "user", "content": "x"}]}
        for path, body in (("/v1/completions", {"prompt": "x"}), ("/v1/chat/completions", chat), ("/v1/responses", {"input": "x"})):
            status, told = call(path, body)
            assert status == 400 and told["error"]["param"] in ("model", "messages"), told
        assert call("/v1/embeddings", {"input": "a " * 100})[0] == 400
        assert call("/detokenize", {"tokens": [7, 8]})[0] in (200, 400)
    finally:
        server.stop()
