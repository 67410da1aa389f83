"""Adapters over HTTP: loaded, listed, asked for and unloaded while others are answered; nothing outside their folder."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from http_server import KEY, Running, longer, running

from lilliput.models.adapters import write_adapter
from lilliput.models.load import load_model

pytest.importorskip("fastapi", reason="needs the extra `serve`")
openai = pytest.importorskip("openai", reason="needs OpenAI's client")

PROMPT = "Once upon a time"


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two adapters of the tiny model, and a third outside."""
    root = tmp_path_factory.mktemp("adapters")
    model, _, _ = load_model(longer(root / "base"))
    for seed, place in enumerate(("library/french", "library/more/german", "outside")):
        generator = torch.Generator().manual_seed(seed)
        pairs = {}
        for name, shape in model.spec.shapes().items():
            if name.endswith("_proj.weight"):
                a, b = torch.randn(4, shape[1], generator=generator) / shape[1] ** 0.5, torch.randn(shape[0], 4, generator=generator)
                pairs[name.removesuffix(".weight")] = (a, b)
        (root / place).mkdir(parents=True)
        write_adapter(root / place, model.spec, pairs, rank=4, alpha=4.0, dropout=0.0)
    return root / "library"


@pytest.fixture(scope="module")
def server(library: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with running(tmp_path_factory.mktemp("http"), f"serve.adapters={library}", "serve.max_adapters=2") as server:
        yield server


def post(server: Running, path: str, body: object) -> tuple[int, str]:
    request = urllib.request.Request(server.url + path, json.dumps(body).encode(), {"Content-Type": "application/json", "Authorization": f"Bearer {KEY}"})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def load(server: Running, name: str, path: str, **more: object) -> tuple[int, str]:
    return post(server, "/v1/load_lora_adapter", {"lora_name": name, "lora_path": path, **more})


def said(server: Running, model: str) -> str:
    answer = server.client().completions.create(model=model, prompt=PROMPT, max_tokens=16, temperature=0)
    assert answer.model == model
    return answer.choices[0].text


def test_loaded_listed_asked_for_and_unloaded(server: Running) -> None:
    client = server.client()
    listed = lambda: {model.id: model.model_dump().get("parent") for model in client.models.list()}
    assert listed() == {"tiny": None, "french": "tiny"}, "what lies in the folder is loaded at the start"
    assert load(server, "german", "more/german") == (200, "Success: LoRA adapter 'german' added successfully.")
    assert listed() == {"tiny": None, "french": "tiny", "german": "tiny"} and client.models.retrieve("german").id == "german"
    names = ("tiny", "french", "german")
    alone = {name: said(server, name) for name in names}
    assert len(set(alone.values())) == 3, "adapters must change something"
    with ThreadPoolExecutor(9) as pool:
        assert list(pool.map(lambda name: said(server, name), names * 3)) == [alone[name] for name in names * 3]
    chat = client.chat.completions.create(model="french", messages=[{"role": "user", "content": "Hi"}], max_tokens=4, stream=True)
    assert {chunk.model for chunk in chat} == {"french"}
    assert post(server, "/v1/unload_lora_adapter", {"lora_name": "german"})[0] == 200
    assert listed() == {"tiny": None, "french": "tiny"}
    with pytest.raises(openai.NotFoundError, match="`tiny`, `french`"):
        said(server, "german")
    assert post(server, "/v1/unload_lora_adapter", {"lora_name": "german"})[0] == 404
    assert said(server, "tiny") == alone["tiny"]


def test_an_adapter_is_replaced_in_place(server: Running) -> None:
    before = said(server, "french")
    status, text = load(server, "french", "more/german")
    assert status == 400 and "load_inplace" in text
    assert load(server, "french", "more/german", load_inplace=True)[0] == 200
    assert said(server, "french") != before
    assert load(server, "french", "french", load_inplace=True)[0] == 200 and said(server, "french") == before


@pytest.mark.parametrize("path", ["../outside", "{root}/outside", "more/../../outside", "/etc", "nothing", "more"])
def test_what_lies_elsewhere_or_is_none_is_refused(server: Running, library: Path, path: str) -> None:
    status, text = load(server, "x", path.replace("{root}", str(library.parent)))
    assert status == 400 and json.loads(text)["error"]["param"] == "lora_path"
    assert ("not in the folder" in text) == (path not in ("nothing", "more")), text
    assert "x" not in server.served.adapters


def test_limits_and_names(server: Running) -> None:
    assert load(server, "german", "more/german")[0] == 200
    status, text = load(server, "third", "more/german")
    assert status == 400 and "at most 2" in text
    assert load(server, "tiny", "more/german")[0] == 400, "the model's own name"
    status, text = post(server, "/v1/load_lora_adapter", {"lora_name": "y", "path": "french"})
    assert status == 400 and "lora_path" in text
    assert post(server, "/v1/unload_lora_adapter", {"lora_name": "german"})[0] == 200


def test_off_unless_a_folder_is_named(tmp_path: Path) -> None:
    with running(tmp_path) as server:
        for path, body in (("load", {"lora_name": "x", "lora_path": "french"}), ("unload", {"lora_name": "x"})):
            status, text = post(server, f"/v1/{path}_lora_adapter", body)
            assert status == 403 and "serve.adapters=FOLDER" in text


def test_a_folder_that_is_none_is_refused_before_the_server_listens(tmp_path: Path) -> None:
    from lilliput.base.errors import UserError

    with pytest.raises(UserError, match="is no folder"), running(tmp_path, f"serve.adapters={tmp_path / 'none'}"):
        pass
