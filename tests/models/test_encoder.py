"""The packed encoder against its padded form and against transformers' BertModel."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lilliput.base.errors import UserError
from lilliput.models.encoder import Encoder, EncoderSpec, load_encoder, mean_pool

SHAPE = {"vocab_size": 97, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 100, "max_position_embeddings": 40}


def bert(folder: Path, head: bool = False, pooler: bool = True, **changes: object) -> torch.nn.Module:
    from transformers import BertConfig, BertForMaskedLM, BertModel

    torch.manual_seed(0)
    config = BertConfig(**(SHAPE | changes))  # type: ignore[arg-type]
    model = (BertForMaskedLM(config) if head else BertModel(config, add_pooling_layer=pooler)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    return model


def batch(lengths: list[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    tokens = torch.randint(0, 97, (len(lengths), max(lengths)))
    mask = (torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None]).long()
    return tokens, mask, torch.randint(0, 2, tokens.shape)


@pytest.mark.parametrize("changes", [{}, {"hidden_act": "gelu_new"}, {"num_attention_heads": 1, "intermediate_size": 7}, {"layer_norm_eps": 1e-5}], ids=str)
@pytest.mark.parametrize("lengths", [[40, 3, 17], [1], [5, 5]], ids=str)
def test_equals_transformers(changes: dict[str, object], lengths: list[int], tmp_path: Path) -> None:
    theirs, (tokens, mask, kinds) = bert(tmp_path, **changes), batch(lengths)
    ours = load_encoder(tmp_path)
    with torch.inference_mode():
        want = theirs(tokens, mask, kinds)
        packed, padded = ours(tokens, mask, kinds), ours.padded(tokens, mask, kinds)
    valid = mask.bool()
    torch.testing.assert_close(packed[valid], want.last_hidden_state[valid], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(padded[valid], want.last_hidden_state[valid], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours.pooled(packed), want.pooler_output, rtol=1e-4, atol=1e-4)
    assert not packed[~valid].any(), "zeros where nothing is valid"


def test_a_text_answers_the_same_in_any_company(tmp_path: Path) -> None:
    bert(tmp_path)
    ours, (tokens, mask, kinds) = load_encoder(tmp_path), batch([40, 3, 17])
    with torch.inference_mode():
        together = ours(tokens, mask, kinds)
        alone = ours(tokens[1:2, :3], None, kinds[1:2, :3])
    assert torch.equal(together[1, :3], alone[0]) or ours.layers[0].panels == {}, "bit for bit on the compiled products"
    torch.testing.assert_close(together[1, :3], alone[0], rtol=1e-5, atol=1e-5)


def test_head_models_and_models_without_a_pooler(tmp_path: Path) -> None:
    tokens, mask, _ = batch([6, 2])
    theirs = bert(tmp_path / "head", head=True)
    with torch.inference_mode():
        want = theirs.bert(tokens, mask).last_hidden_state  # type: ignore[operator, union-attr]
        got = load_encoder(tmp_path / "head")(tokens, mask)
    torch.testing.assert_close(got[mask.bool()], want[mask.bool()], rtol=1e-4, atol=1e-4)
    bert(tmp_path / "bare", pooler=False)
    with pytest.raises(UserError, match="no pooler"):
        load_encoder(tmp_path / "bare").pooled(got)


def test_mean_pool() -> None:
    hidden = torch.arange(12.0).view(2, 3, 2)
    got = mean_pool(hidden, torch.tensor([[1, 1, 0], [0, 0, 0]]))
    assert got.tolist() == [[1.0, 2.0], [0.0, 0.0]]


def test_gradients_flow_through_the_packed_form() -> None:
    model = Encoder(EncoderSpec(vocab=11, dim=16, layers=1, heads=2, ffn=32, context=8)).init_weights()
    tokens, mask = torch.randint(0, 11, (2, 8)), torch.ones(2, 8)
    mask[1, 3:] = 0
    gradients = []
    for form in (model, model.padded):
        model.zero_grad()
        form(tokens, mask)[mask.bool()].square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    for ours, plain in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-4)


def test_faults_of_folders(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"config\.json"):
        load_encoder(tmp_path)
    bert(tmp_path)
    config = tmp_path / "config.json"
    text = config.read_text()
    faults = {"unsupported encoder": ('"bert"', '"roberta"'), "hidden_act": ('"gelu"', '"relu"'), "shape": ('_size": 100', '_size": 90')}
    for message, (old, new) in faults.items():
        config.write_text(text.replace(old, new))
        with pytest.raises(UserError, match=message):
            load_encoder(tmp_path)
    config.write_text(text)
    with pytest.raises(UserError, match="40 positions"):
        load_encoder(tmp_path)(torch.zeros(1, 41, dtype=torch.long))
