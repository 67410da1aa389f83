"""The command line as a user meets it: help, words, exit codes, what goes to stdout and what to stderr."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import typer
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from lilliput.base.errors import UserError
from lilliput.cli import common, main
from lilliput.papers import checkpointing
from lilliput.papers.paper import Finding

TEXT = "The people of Lilliput measure six inches, and their trees seven feet.\n" * 80
TINY = [
    "model=tiny",
    "train.init=scratch",
    "data.tokenizer=bytes",
    "data.sequence=16",
    "train.tokens_per_step=32",
    "train.warmup=1",
    "train.eval_tokens=64",
    "threads=1",
]


def call(*words: str, **environment: str):
    """Run the command line in this process; result.exit_code, .stdout, .stderr."""
    return CliRunner().invoke(main.application(), list(words), prog_name="lilliput", env={"NO_COLOR": "1", "COLUMNS": "100", **environment})


def shell(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run it in a process of its own."""
    code = "from lilliput.cli.main import run; run()"
    return subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, env={**os.environ, **environment}, timeout=120)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "notes.txt"
    file.write_text(TEXT)
    return file


# ---- help


@pytest.mark.parametrize("words", [["-h"], ["--help"], *([verb, "-h"] for verb in main.VERBS)], ids=" ".join)
def test_help_fits_a_screen(words):
    result = call(*words)
    assert result.exit_code == 0, result.output
    assert len(result.stdout.splitlines()) <= 45
    assert all(len(line) <= 100 for line in result.stdout.splitlines())


@pytest.mark.parametrize("verb", main.VERBS)
def test_every_verb_has_the_three_flags_and_few_more(verb):
    flags = [line.split()[0] for line in call(verb, "--help").stdout.splitlines() if line.strip().startswith("-")]
    shared = {"--json", "--dry-run", "--show-config", "-h,"}
    assert shared <= set(flags)
    assert len(set(flags) - shared) <= 6


def test_help_is_quick_and_light():
    code = (
        "import sys, time; begin = time.process_time()\n"
        "from lilliput.cli.main import run; sys.argv = ['lilliput', '--help']\n"
        "try: run()\n"
        "except SystemExit: pass\n"
        'sys.stderr.write(f\'{time.process_time() - begin} {sorted({"torch", "pydantic", "numpy", "rich"} & set(sys.modules))}\')'
    )
    answers = [subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stderr for _ in range(3)]
    assert all(answer.endswith(" []") for answer in answers), answers
    assert min(float(answer.split()[0]) for answer in answers) < 0.3


def test_version():
    assert call("--version").stdout.strip() == main.__version__


def test_completion_knows_the_verbs():
    done = shell(_LILLIPUT_COMPLETE="complete_bash", COMP_WORDS="lilliput tr", COMP_CWORD="1")
    assert done.stdout.split() == ["train"], done.stderr


def test_unknown_verb_is_the_users_fault():
    result = call("trian")
    assert result.exit_code == 2 and "train" in result.stderr


# ---- words


@given(
    st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=12)), st.lists(st.from_regex(r"[a-z_]{1,6}(\.[a-z_]{1,6})?=[^\n]{0,8}", fullmatch=True))
)
@settings(deadline=None)
def test_split_keeps_order_and_loses_nothing(free, given_overrides):
    words = [*free, *given_overrides]
    own, overrides = common.split(words)
    assert sorted(own + overrides) == sorted(words)
    assert overrides[len(overrides) - len(given_overrides) :] == given_overrides
    assert [word for word in free if word in own] == [word for word in own if word in free]


@pytest.mark.parametrize("question", ["is 1+1 = 2?", "a = b", "=x", "", "2=2", "why?x=1"])
def test_prose_with_an_equals_sign_is_no_setting(question):
    assert common.split([question]) == ([question], [])


# ---- faults


def faulty(fault: BaseException):
    def act(json: bool = False) -> int:
        raise fault

    return common.verb(act)


def code_of(fault: BaseException, **keywords) -> int:
    with pytest.raises(typer.Exit) as stop:
        faulty(fault)(**{"json": False, **keywords})
    return stop.value.exit_code


def test_a_user_error_shows_what_why_and_fix(capsys):
    assert code_of(UserError("it is too big", "9 of 4", "take 3")) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err == "error: it is too big\n  why: 9 of 4\n  fix: take 3\n"


def test_our_own_fault_is_short_and_has_code_1(capsys, monkeypatch):
    monkeypatch.delenv("LILLIPUT_DEBUG", raising=False)
    assert code_of(ZeroDivisionError("first\nsecond")) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: ZeroDivisionError: first\n") and "Lilliput's fault" in said and "report" in said
    assert "Traceback" not in said and "second" not in said


def test_our_own_fault_under_json_is_a_document(capsys, monkeypatch):
    monkeypatch.delenv("LILLIPUT_DEBUG", raising=False)
    assert code_of(KeyError("k"), json=True) == 1
    assert json.loads(capsys.readouterr().out)["error"]["exit_code"] == 1


def test_debug_shows_the_traceback(monkeypatch):
    monkeypatch.setenv("LILLIPUT_DEBUG", "1")
    with pytest.raises(ZeroDivisionError):
        faulty(ZeroDivisionError("x"))(json=False)


def test_a_bad_debug_switch_is_named(capsys, monkeypatch):
    monkeypatch.setenv("LILLIPUT_DEBUG", "maybe")
    assert code_of(ZeroDivisionError("x")) == 2
    assert "LILLIPUT_DEBUG" in capsys.readouterr().err


def test_ctrl_c_has_code_130():
    assert code_of(KeyboardInterrupt()) == 130


@pytest.mark.parametrize("words", [["papers"], ["papers", "--json"], ["pull", "--names"]], ids=" ".join)
def test_a_reader_that_leaves_hears_no_complaint(words):
    code = "from lilliput.cli.main import run; run()"
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    with subprocess.Popen([sys.executable, "-c", code, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=buffered) as process:
        process.stdout.close()
        assert process.wait(timeout=60) == 0
        assert process.stderr.read() == b""


@pytest.mark.parametrize(
    ("words", "what", "fix"),
    [
        (["train", "train.stepz=3"], "unknown key `train.stepz`", "train.steps"),
        (["train", "lr=3"], "unknown key `lr`", "train.lr"),
        (["plan", "train.steps=many"], "`train.steps` cannot be", "train.steps="),
        (["train", "nofile.toml"], "nofile.toml", "TOML"),
        (["train", "job.yaml"], "`job.yaml` is no job file", "model=job.yaml"),
        (["plan", "a.toml", "b.toml"], "unexpected argument `b.toml`", "lilliput plan"),
        (["plan", "model=llama7b"], "llama7b", "lama"),
        (["plan", "--context", "9"], "is no plan", "--serve 1"),
        (["pull", "smolm2-135m"], "unknown model `smolm2-135m`", "smollm2-135m"),
        (["pull", "x=1"], "pull takes no settings", "lilliput pull NAME"),
        (["papers", "gptx"], "unknown paper `gptx`", "gptq"),
        (["papers", "run"], "papers run needs a name", "lilliput papers run"),
        (["papers", "run", "gptq"], "not built here yet", "lilliput papers run checkpointing"),
        (["eval"], "nothing to measure perplexity on", "eval.path=FILE"),
        (["eval", "tiny", "-t", "piqq", "eval.path=x"], "unknown task `piqq`", "piqa"),
        (["eval", "a", "b"], "unexpected argument `b`", "lilliput eval MODEL"),
        (["chat", "one", "two"], "unexpected argument `two`", "lilliput chat"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_words_say_what_to_do(words, what, fix):
    result = call(*words)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert what in result.stderr and fix in result.stderr


def test_json_errors_are_documents():
    result = call("plan", "train.stepz=3", "--json")
    assert result.exit_code == 2
    assert json.loads(result.stdout)["error"]["what"] == "unknown key `train.stepz`"


# ---- verbs


def test_plan_answers_without_torch():
    code = (
        "import sys\nfrom lilliput.cli.main import run\nsys.argv = ['lilliput', 'plan', 'model=llama-7b', 'hardware=a100-dgx', 'lora=on', '--json']\n"
        "try: run()\nexcept SystemExit as stop: sys.stderr.write(f'{stop.code} {\"torch\" in sys.modules}')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.endswith("0 False"), done.stderr
    document = json.loads(done.stdout)
    assert document["fits"] is True and document["peak_bytes"] > 6.7e9 * 4


def test_plan_that_does_not_fit_has_code_3_and_a_fix():
    result = call("plan", "model=llama-70b", "hardware=laptop")
    assert result.exit_code == 3, result.output
    assert "fit" in result.output


def test_plan_draws_a_picture(tmp_path):
    words = ["model=tiny", "data.sequence=64", "train.micro_batch=1", "train.tokens_per_step=64", "remat.every=1"]
    result = call("plan", *words, "--picture", str(tmp_path / "memory.svg"))
    assert result.exit_code == 0, result.output
    assert "</svg>" in (tmp_path / "memory.svg").read_text()
    assert call("plan", *words, "--picture", str(tmp_path / "memory.gif")).exit_code == 2
    assert call("plan", "--serve", "1", "--picture", "x.svg").exit_code == 2


def test_show_config_names_each_source(tmp_path):
    file = tmp_path / "job.toml"
    file.write_text('model = "tiny"\n[train]\nsteps = 7\n')
    result = call("train", str(file), "train.lr=0.5", "--show-config", "--json")
    assert result.exit_code == 0, result.output
    values = json.loads(result.stdout)
    assert values["train.steps"] == {"value": 7, "source": "file job.toml:3"}
    assert values["train.lr"] == {"value": 0.5, "source": "flag"}
    assert values["train.beta1"]["source"] == "default"
    assert values["train.micro_batch"]["source"].startswith("auto: ") and isinstance(values["train.micro_batch"]["value"], int)
    assert values["device"]["value"] in ("cpu", "cuda") and values["threads"]["value"] >= 1
    assert all(values[key]["source"].startswith("auto: ") for key in ("device", "threads"))
    table = call("train", str(file), "--show-config").stdout
    assert "file job.toml:3" in table and "auto: " in table


def test_train_dry_run_writes_nothing(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = call("train", *TINY, f"data.path={text}", "train.steps=2", "--dry-run", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["out"] == "runs/tiny"
    assert [file.name for file in tmp_path.iterdir()] == ["notes.txt"]


def test_train_runs_and_the_same_command_is_done(text, tmp_path):
    words = ["train", *TINY, f"data.path={text}", "train.steps=3", "remat.every=2", "--out", str(tmp_path / "run"), "--json"]
    first = call(*words)
    assert first.exit_code == 0, first.output
    result = json.loads(first.stdout)
    assert result["steps"] == 3 and result["eval_after"] > 0 and not result["interrupted"]
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()
    again = call(*words)
    assert again.exit_code == 0 and "finished" in again.stderr
    assert json.loads(again.stdout)["loss_last"] == result["loss_last"]


def test_eval_measures_a_trained_model(text, tmp_path):
    call("train", *TINY, f"data.path={text}", "train.steps=1", "--out", str(tmp_path / "run"))
    words = ["eval", str(tmp_path / "run" / "model"), f"eval.path={text}", "eval.window=32", "eval.limit=3", "threads=1"]
    planned = json.loads(call(*words, "--dry-run", "--json").stdout)
    assert planned["would_measure"] == [{"task": "perplexity", "n": f"{len(TEXT):,} characters", "on": "text"}]
    result = json.loads(call(*words, "--json").stdout)["results"][0]
    assert result["task"] == "perplexity" and result["windows"] == 3 and result["perplexity"] > 1
    table = call(*words)
    assert table.exit_code == 0 and "3 windows of 32" in table.stdout


def test_train_shows_a_table_on_stdout_and_talk_on_stderr(text, tmp_path):
    result = call("train", *TINY, f"data.path={text}", "train.steps=2", "--out", str(tmp_path / "run"))
    assert result.exit_code == 0, result.output
    assert "loss last" in result.stdout and "wrote" not in result.stdout
    assert "held-out loss" in result.stderr


def test_papers_lists_27_systems():
    document = json.loads(call("papers", "--json").stdout)
    assert len(document["systems"]) == 27
    assert document["works"] == sum(row["status"] == "works" for row in document["systems"])
    table = call("papers").stdout
    assert all(row["name"] in table for row in document["systems"])


def test_papers_shows_one():
    assert "2210.17323" in call("papers", "gptq").stdout


def test_papers_dry_run_measures_nothing(monkeypatch):
    monkeypatch.setattr(checkpointing, "_measure", lambda *_: pytest.fail("a dry run measured"))
    result = call("papers", "run", "checkpointing", "--dry-run")
    assert result.exit_code == 0 and "would measure" in result.stderr


@pytest.mark.parametrize("holds", [True, False])
def test_papers_run_shows_both_numbers(monkeypatch, holds):
    finding = Finding("half of it here", ({"n": 1, "bytes": 2}, {"n": 4, "bytes": 4}), holds)
    monkeypatch.setattr(checkpointing, "PAPER", replace(checkpointing.PAPER, run=lambda: finding))
    result = call("papers", "run", "checkpointing")
    assert result.exit_code == (0 if holds else 1)
    assert checkpointing.PAPER.claim in result.stderr and "half of it here" in result.stderr
    document = json.loads(call("papers", "run", "checkpointing", "--json").stdout)
    assert document["holds"] is holds and document["measured here"] == "half of it here" and document["rows"] == [dict(row) for row in finding.rows]


def test_pull_says_what_is_here(tmp_path):
    result = call("pull", "--names", "--json", LILLIPUT_CACHE=str(tmp_path))
    assert result.exit_code == 0, result.output
    assert {"smollm2-135m", "data:shakespeare"} <= set(json.loads(result.stdout))
    assert json.loads(call("pull", "--dry-run", "--json", LILLIPUT_CACHE=str(tmp_path)).stdout).keys() == {"smollm2-135m"}


def test_pull_of_a_path_is_that_path(tmp_path):
    (tmp_path / "model").mkdir()
    result = call("pull", str(tmp_path / "model"), "--json")
    assert json.loads(result.stdout) == {str(tmp_path / "model"): str(tmp_path / "model")}


def test_pull_shows_where_the_cache_is(tmp_path):
    assert json.loads(call("pull", "--show-config", "--json", LILLIPUT_CACHE=str(tmp_path)).stdout)["cache"]["value"] == str(tmp_path)
