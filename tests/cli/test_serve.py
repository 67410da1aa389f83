"""`lilliput serve`: the memory plan, the settings, refusals; then the whole command: ready, drained by SIGTERM, killed and begun again."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from http_server import longer
from served import held
from typer.testing import CliRunner

from lilliput.base.errors import UserError
from lilliput.base.job import Job
from lilliput.cli.main import application

pytest.importorskip("fastapi", reason="needs the extra `serve`")
RUN = CliRunner()


def invoke(*words: str) -> tuple[int, str]:
    result = RUN.invoke(application(), ["serve", *words])
    return result.exit_code, result.output


def test_the_memory_plan_is_what_the_engine_takes() -> None:
    from lilliput import api

    code, text = invoke("lilliput-tiny", "--dry-run", "--json", "serve.runner=eager")
    plan = json.loads(text[: text.rindex("}") + 1])
    model = api.load("lilliput-tiny", runner="eager")
    assert code == 0 and plan["blocks"] == model.engine.pool.total and plan["fits"] is True
    assert plan["weights"] == 4 * sum(p.numel() for p in model.module.parameters())
    assert plan["total"] == plan["weights"] + plan["kv"] + plan["swap"] + plan["step"] and plan["kv"] == plan["blocks"] * plan["block_bytes"]


def test_the_cache_is_as_the_section_says() -> None:
    from lilliput import api

    keys = dict(kv_tokens=320, max_batch_tokens=40, sharing=False, scheduling="priority", preemption="swap", swap_tokens=160)
    engine = api.load("lilliput-tiny", **keys).engine  # type: ignore[arg-type]
    assert (engine.pool.total, engine.pool.swap_total, engine.pool.sharing) == (20, 10, False)
    assert engine.scheduler.max_batch_tokens == 40 and engine.priorities and engine.costs.way == "swap"
    code, text = invoke("lilliput-tiny", "--dry-run", "--json", "serve.runner=eager", *(f"serve.{key}={value}".lower() for key, value in keys.items()))
    plan = json.loads(text[: text.rindex("}") + 1])
    assert code == 0 and plan["blocks"] == 20 and plan["swap"] == 10 * plan["block_bytes"]


@pytest.mark.parametrize(("weights", "kv"), [("fp32", "fp32"), ("fp16", "fp16"), ("w8", "int8"), ("q4", "int4"), ("nf4", "fp16"), ("fp8", "fp16")])
def test_planned_bytes_are_those_of_the_native_runner(weights: str, kv: str, smollm2: Path) -> None:
    from lilliput.models.load import load_to_serve, native_refusal, resolve
    from lilliput.ops.paged import KvStore
    from lilliput.plan.serving import memory_plan

    spec, _ = resolve("smollm2-135m", fetch=False)
    if refusal := native_refusal(spec, "cpu"):
        pytest.skip(refusal)
    job = Job.load(model="smollm2-135m", serve={"weights": weights, "kv": kv})
    plan, _, _ = memory_plan(job, 8 << 30)
    store = KvStore(layers=spec.layers, blocks=1, kv_heads=spec.kv_heads, head_dim=spec.head_dim, codec=kv, block=16)
    assert plan.block_bytes == 16 * store.bytes_per_token
    if weights == "q4":  # one storage is packed for real: the others are the same arithmetic
        model, _, _ = load_to_serve("smollm2-135m", job.serve, "cpu")
        assert plan.weights == held(model)


def test_the_plan_counts_what_is_asked_for_and_says_what_would_fit() -> None:
    from lilliput.plan.serving import MemoryPlan, memory_plan

    def planned(free: int, times: int = 1, **keys: object) -> MemoryPlan:
        return memory_plan(Job.load(model="lilliput-tiny", serve=keys), free, times=times)[0]

    plan = planned(8 << 20, kv_tokens=1000, swap_tokens=320, max_batch_tokens=64)
    assert (plan.blocks, plan.more["swap"][0] // plan.block_bytes, plan.step_tokens) == (63, 20, 64)
    assert plan.total == plan.weights + 83 * plan.block_bytes + plan.step
    narrow = planned(8 << 30, context=96)
    assert (narrow.context, narrow.blocks) == (96, 4 * 96 // 16)
    with pytest.raises(UserError, match="beyond the model"):
        planned(8 << 30, context=4096)
    for times, keys in ((1, {}), (1, {"draft": "lilliput-tiny-draft"}), (2, {})):
        large, free = {"kv_tokens": 1 << 20, **keys}, (8 << 20) * times
        assert not planned(free, times, **large).fits
        asked = {**keys, "kv_tokens": int(planned(free, times, **large).fix.partition("=")[2])}
        assert planned(free, times, **asked).fits and not planned(free, times, **asked | {"kv_tokens": asked["kv_tokens"] + 16}).fits
    assert "q4" in planned(1 << 20, kv_tokens=1 << 20).fix


def dry(*words: str) -> dict:
    code, text = invoke(*words, "--dry-run", "--json")
    assert code == 0, text
    return json.loads(text[: text.rindex("}") + 1])


def test_replicas_take_the_share_that_was_planned() -> None:
    from lilliput.cli.serve import cache_override
    from lilliput.plan.serving import memory_plan

    job = Job.load(model="lilliput-tiny", serve={"context": 64})
    assert cache_override(job, 1) == [] == cache_override(Job.load(model="lilliput-tiny", serve={"kv_tokens": 64}), 3)
    assert cache_override(job, 3) == ["serve.kv_tokens=256"]
    one, four = (memory_plan(Job.load(model="lilliput-tiny"), 1 << 22, times=times)[0].tokens for times in (1, 4))
    assert 0 < four == 16 * -(-one // 64) < one, "a quarter in whole blocks"


def test_the_plan_counts_a_drafter_an_embedder_and_replicas() -> None:
    """Against what an engine with a drafter and an embedder's model hold."""
    from lilliput import api
    from lilliput.models.load import load_model, native_refusal, resolve

    if refusal := native_refusal(resolve("lilliput-tiny")[0], "cpu"):
        pytest.skip(refusal)
    keys = {"kv_tokens": 320, "swap_tokens": 64, "draft": "lilliput-tiny-draft", "kv": "fp16", "weights": "w8"}
    plan = dry("lilliput-tiny", "http.embeddings=mean", *(f"serve.{key}={value}" for key, value in keys.items()))
    engine = api.load("lilliput-tiny", runner="native", **keys).engine  # type: ignore[arg-type]
    draft, mine = engine.guesses.drafter.runner, engine.runner  # type: ignore[union-attr]
    blocks = lambda runner: runner.store.bytes_per_token * 16
    assert plan["weights"] == held(mine.model) and plan["kv"] == 20 * blocks(mine) and plan["swap"] == 4 * blocks(mine)
    assert plan["draft"] == held(draft.model) + 20 * blocks(draft) > 20 * blocks(draft)
    assert plan["embeddings"] == sum(p.nbytes for p in load_model("lilliput-tiny", "cpu")[0].parameters())
    parts = ("weights", "kv", "swap", "draft", "embeddings", "step")
    assert plan["total"] == sum(plan[part] for part in parts) and plan["adapters"] == 0
    assert dry("lilliput-tiny", "serve.draft=layers:2")["draft"] == dry("lilliput-tiny", "serve.draft=ngram")["draft"] == 0
    one, three = dry("lilliput-tiny"), dry("lilliput-tiny", "--replicas", "3")
    assert (three["total"], three["replicas"]) == (3 * one["total"], 3) and one["replicas"] == 1
    assert dry("lilliput-tiny", "replicas.most=4")["replicas"] == 4 and dry("lilliput-tiny", "replicas.most=4", "replicas.address=auto")["replicas"] == 1


def test_an_encoder_is_planned(tmp_path: Path) -> None:
    from transformers import BertConfig, BertModel

    from lilliput.models.encoder import load_encoder

    BertModel(BertConfig(vocab_size=61, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)).save_pretrained(tmp_path / "bert")
    encoder = load_encoder(tmp_path / "bert")
    panels = sum(weight.bytes for block in encoder.layers for weight in block.panels.values())  # type: ignore[union-attr,operator]
    assert dry(str(tmp_path / "bert"))["total"] == panels + sum(p.nbytes for p in encoder.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("weights", ["file", "fp16"])
def test_resident_memory_grows_by_the_plan(weights: str, smollm2: Path) -> None:
    """The process before and after loading, as the kernel counts it."""
    code = """
import json, sys, torch
from lilliput.base.job import Job
from lilliput.models.load import load_to_serve
from lilliput.models import decoder, hub, native
from lilliput.models.checkpoints import open_checkpoint
resident = lambda: next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmRSS"))
load_to_serve("lilliput-tiny", Job.load().serve, "cpu")
tokenizer = open_checkpoint(hub.locate("smollm2-135m")).tokenizer()
before = resident()
model = load_to_serve("smollm2-135m", Job.load(serve={"weights": sys.argv[1]}).serve, "cpu")
del tokenizer
print(resident() - before)
"""
    plan = dry("smollm2-135m", f"serve.weights={weights}")
    grown = int(subprocess.run([sys.executable, "-c", code, weights], capture_output=True, text=True, check=True).stdout)
    assert grown == pytest.approx(plan["weights"], rel=0.15), f"{grown:,} bytes, planned {plan['weights']:,}"


@pytest.mark.parametrize(("runner", "weights"), [("eager", "file"), ("native", "fp32"), ("native", "w8")])
def test_the_plan_counts_adapters_as_the_runner_holds_them(runner: str, weights: str, tmp_path: Path) -> None:
    """As many as may be loaded, of the largest one's size; the server that is then started holds exactly so many bytes."""
    from adapters import written

    from lilliput import api
    from lilliput.models.load import load_model

    model, _, _ = load_model("lilliput-tiny", "cpu")
    for name, rank in (("a", 3), ("b", 8), ("c", 8)):
        written(tmp_path / name, model, 1, rank, ("q_proj", "v_proj", "down_proj"))
    keys = {"runner": runner, "weights": weights, "max_adapters": 3, "adapters": str(tmp_path)}
    shutil.rmtree(tmp_path / "a")
    shutil.copytree(tmp_path / "b", tmp_path / "a")
    code, text = invoke("lilliput-tiny", "--dry-run", "--json", *(f"serve.{key}={value}" for key, value in keys.items()))
    plan = json.loads(text[: text.rindex("}") + 1])
    assert code == 0 and plan["total"] == plan["weights"] + plan["kv"] + plan["swap"] + plan["adapters"] + plan["step"]
    loaded = api.load("lilliput-tiny", **keys).engine.adapters  # type: ignore[arg-type]
    held = [loaded.find(name).lowered for name in loaded.names]  # type: ignore[union-attr]
    assert len(held) == 3
    assert plan["adapters"] == sum(one.bytes if runner == "native" else sum(part.nbytes for pair in one.values() for part in pair) for one in held) > 0


def test_show_config_says_where_values_come_from() -> None:
    code, text = invoke("lilliput-tiny", "http.port=9999", "--show-config", "--json")
    settings = json.loads(text[text.index("{") :])
    assert code == 0 and settings["http.port"] == {"value": 9999, "source": "flag"} and settings["http.host"]["value"] == "127.0.0.1"


def test_several_models_are_planned_together() -> None:
    code, text = invoke("lilliput-tiny", "smollm2-135m", "--dry-run", "--json", "serve.kv_tokens=640")
    plan = json.loads(text[: text.rindex("}") + 1])
    assert code == 0 and [one["model"] for one in plan["models"]] == ["lilliput-tiny", "smollm2-135m"]
    assert plan["total"] == sum(one["total"] for one in plan["models"]) and all(one["kv_tokens"] == 640 for one in plan["models"])
    for words, said in (
        (("lilliput-tiny", "lilliput-tiny"), "named twice"), (("lilliput-tiny", "smollm2-135m", "http.name=x"), "http.name"),
        (("lilliput-tiny", "smollm2-135m", "--adapters", "/tmp"), "belongs to one model"),
    ):  # fmt: skip
        code, text = invoke(*words, "--dry-run")
        assert code == 2 and said in text, text


def test_refusals_come_before_the_weights() -> None:
    code, text = invoke("lilliput-tiny", "http.host=0.0.0.0")
    assert code == 2 and "no key is set" in text and "LILLIPUT_API_KEY" in text
    assert invoke("lilliput-tiny", "http.prt=1")[0] == 2
    assert invoke("one", "two")[0] == 2


# ---- the whole command


STARTED: list[subprocess.Popen[str]] = []


@pytest.fixture(autouse=True)
def none_is_left() -> Iterator[None]:
    yield
    while STARTED:
        process = STARTED.pop()
        process.kill()  # no effect on one that has ended
        process.wait(20)


class Process:
    """`lilliput serve` as a process of its own."""

    def __init__(self, folder: Path, *overrides: str, port: int = 0) -> None:
        command = [sys.executable, "-m", "lilliput", "serve", str(folder), f"http.port={port}", "threads=1", "--json", *overrides]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        STARTED.append(self.process)
        document = ""
        while not document.endswith("\n}\n"):
            line = self.process.stdout.readline()
            assert line, self.process.stderr.read()
            document += line
        self.url = json.loads(document)["url"]
        self.port = int(self.url.rpartition(":")[2])

    def complete(self, tokens: int, stream: bool = False, n: int = 1):
        body = {"prompt": "To be", "max_tokens": tokens, "stream": stream, "ignore_eos": True, "temperature": 1, "n": n}
        request = urllib.request.Request(self.url + "/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"})
        return urllib.request.urlopen(request, timeout=60)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return longer(tmp_path_factory.mktemp("serve") / "tiny")


def test_sigterm_lets_the_open_stream_end_and_exits_with_0(folder: Path) -> None:
    server = Process(folder)
    stream = server.complete(400, stream=True)
    first = stream.readline()
    server.process.send_signal(signal.SIGTERM)
    events = [line for line in (first + stream.read()).decode().splitlines() if line.startswith("data: ")]
    ended = time.monotonic()
    assert events[-1] == "data: [DONE]" and json.loads(events[-2][6:])["choices"][0]["finish_reason"] == "length"
    assert server.process.wait(20) == 0
    assert time.monotonic() - ended < 10
    assert server.process.stderr.read().count("Traceback") == 0
    with pytest.raises(urllib.error.URLError):
        server.complete(1)


def test_a_stream_that_outlives_the_drain_is_told(folder: Path) -> None:
    server = Process(folder, "http.drain=0.05")
    stream = server.complete(2000, stream=True, n=3)
    first = stream.readline()
    server.process.send_signal(signal.SIGTERM)
    text = (first + stream.read()).decode()
    assert text.rstrip().endswith("data: [DONE]") and '"message":"the server is stopping"' in text
    assert server.process.wait(20) == 0


def test_killed_and_begun_again_on_the_same_port(folder: Path) -> None:
    server = Process(folder)
    stream = server.complete(1500, stream=True)
    stream.readline()
    server.process.kill()
    assert server.process.wait(20) == -signal.SIGKILL
    again = Process(folder, port=server.port)
    assert json.loads(again.complete(4).read())["usage"]["completion_tokens"] == 4
    again.process.send_signal(signal.SIGINT)
    assert again.process.wait(20) == 0


def test_a_port_that_is_taken_is_said(folder: Path) -> None:
    server = Process(folder)
    code, text = invoke(str(folder), f"http.port={server.port}")
    assert code == 2 and "cannot listen" in text and "http.port=0" in text
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(20) == 0
