"""The public Python names, on a model that was trained for two steps a moment ago."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

import lilliput
from lilliput.base.errors import UserError

TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
SECTIONS = {
    "model": "tiny",
    "threads": 1,
    "data": {"tokenizer": "bytes", "sequence": 32},
    "train": {"init": "scratch", "steps": 2, "tokens_per_step": 64, "warmup": 1, "eval_tokens": 64},
}


def sections(text: Path) -> dict:
    return {**SECTIONS, "data": {**SECTIONS["data"], "path": str(text)}}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "notes.txt"
    file.write_text("A traveller came to Lilliput and was tied to the ground.\n" * 60)
    return file


@pytest.fixture(scope="module")
def run(text: Path, tmp_path_factory: pytest.TempPathFactory) -> lilliput.TrainResult:
    return lilliput.train(**sections(text), out=tmp_path_factory.mktemp("run") / "run")


@pytest.fixture
def model(run: lilliput.TrainResult) -> lilliput.LanguageModel:
    loaded = lilliput.load(Path(run.out) / "model", device="cpu", threads=1)
    loaded.tokenizer.chat_template = TEMPLATE
    return loaded


def test_import_is_light():
    code = "import sys, lilliput; lilliput.__version__; dir(lilliput); print(sorted({'torch', 'pydantic', 'numpy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_names_load_without_torch():
    code = "import sys, lilliput; [getattr(lilliput, name) for name in lilliput.__all__]; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


def test_public_names_are_few():
    assert len(lilliput.__all__) <= 20
    with pytest.raises(AttributeError, match="public names: Chat"):
        _ = lilliput.nosuchname


def test_verbs_stay_callable_beside_the_packages_of_their_name(text):
    rooms = importlib.import_module("lilliput.train.lora")
    assert lilliput.train.lora is rooms, "the package of rooms is reachable by its name"
    importlib.import_module("lilliput.plan.report")
    assert lilliput.plan(**sections(text)).fits


def test_train_gives_a_result_and_a_folder(run):
    assert run.steps == 2 and run.eval_after > 0 and not run.interrupted
    assert (Path(run.out) / "model" / "config.json").is_file()


def test_train_takes_a_job_a_file_or_keywords(text, tmp_path):
    job = lilliput.Job.load(**sections(text))
    (tmp_path / "job.toml").write_text(job.to_toml())
    results = [lilliput.train(job, out=tmp_path / "a"), lilliput.train(tmp_path / "job.toml", out=str(tmp_path / "b"))]
    assert results[0].loss_last == results[1].loss_last
    with pytest.raises(UserError, match="a Job and sections at once"):
        lilliput.train(job, train={"steps": 3}, out=tmp_path / "c")


def test_plan_sees_the_sections(text):
    plain = lilliput.plan(**sections(text))
    assert lilliput.plan(**sections(text), lora={"rank": 2}).ledger.bytes("optimizer") < plain.ledger.bytes("optimizer")
    assert plain.peak > plain.ledger.bytes("parameters") > 0


def test_generate_is_what_stream_gives(model):
    whole = model.generate("A traveller", max_tokens=8, ignore_eos=True)
    assert "".join(model.stream("A traveller", max_tokens=8, ignore_eos=True)) == whole
    assert isinstance(whole, str) and whole


def test_sampling_follows_the_seed(model):
    draw = lambda seed: model.generate("A", max_tokens=12, temperature=1.5, seed=seed, ignore_eos=True)
    assert draw(1) == draw(1) != draw(2)


def test_chat_remembers_nothing(model, monkeypatch):
    prompts, encode = [], model.tokenizer.encode
    monkeypatch.setattr(model.tokenizer, "encode", lambda text, special=False: prompts.append(text) or encode(text, special))
    first = model.chat("Who came?", max_tokens=6)
    model.chat("Something else entirely", max_tokens=6)
    assert model.chat("Who came?", max_tokens=6) == first
    assert model.chat([{"role": "user", "content": "Who came?"}], max_tokens=6) == first
    assert prompts[0] == prompts[2] == prompts[3] == "<user>Who came?\n<assistant>"


def test_chat_sends_the_system_message_first(model, monkeypatch):
    seen = []
    monkeypatch.setattr(model.tokenizer, "apply_chat", lambda messages: seen.append(messages) or "x")
    model.chat("question", system="be brief", max_tokens=1)
    assert seen == [[{"role": "system", "content": "be brief"}, {"role": "user", "content": "question"}]]


def test_a_conversation_remembers(model):
    chat = model.conversation(system="be brief", max_tokens=4)
    answer = chat.say("one")
    assert chat.messages == [{"role": "system", "content": "be brief"}, {"role": "user", "content": "one"}, {"role": "assistant", "content": answer}]
    chat.say("two")
    assert [message["content"] for message in chat.messages[3:]] == ["two", chat.messages[4]["content"]]


def test_a_failed_answer_is_not_remembered(model):
    chat = model.conversation(max_tokens=4)
    with pytest.raises(UserError):
        chat.say("word " * 400)
    assert chat.messages == []


@pytest.mark.parametrize("keywords", [{"temprature": 1}, {"temperature": -1}])
def test_bad_sampling_is_a_user_error(model, keywords):
    with pytest.raises(UserError) as fault:
        model.generate("A", **keywords)
    assert "temperature" in str(fault.value)
    with pytest.raises(UserError):
        model.conversation(**keywords)


def test_load_of_nothing_is_a_user_error(tmp_path):
    with pytest.raises(UserError):
        lilliput.load(tmp_path / "absent")


def test_evaluate_scores_text(run, text):
    result = lilliput.evaluate(Path(run.out) / "model", path=str(text), window=64, limit=2)
    assert result["perplexity"].perplexity > 1


def test_the_readme_example_uses_public_names_only():
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    example = readme.split("```python\n")[1].split("```")[0]
    used = {word.split("(")[0].split(".")[1] for word in example.replace("=", " ").split() if word.startswith("lilliput.")}
    assert used and used <= set(lilliput.__all__)
    assert len([line for line in example.splitlines() if line.strip()]) <= 6
    compile(example, "README.md", "exec")


def test_machine_readable_results(run):
    from dataclasses import asdict

    assert json.loads(json.dumps(asdict(run)))["steps"] == 2
