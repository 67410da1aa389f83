"""`lilliput chat`: one question, a pipe, a conversation in a real terminal (pty), Ctrl-C."""

from __future__ import annotations

import fcntl
import io
import json
import os
import pty
import select
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import typer

from lilliput.base.errors import INTERRUPTED, OK, UserError
from lilliput.base.job import Job
from lilliput.base.show import Show
from lilliput.cli import chat as verb
from lilliput.data.tokenizer import Tokenizer
from lilliput.models.checkpoints import save_model
from lilliput.models.decoder import Decoder
from lilliput.models.spec import DecoderSpec
from lilliput.serve.engine import Engine
from lilliput.serve.request import Sampling

CONTEXT = 30_000  # an answer of that length takes this tiny model half a minute: time to press Ctrl-C


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved random model that never says an end token, with a byte tokenizer and a chat template."""
    tokenizer = Tokenizer.bytes_()
    model = Decoder(DecoderSpec("llama", tokenizer.vocab_size, 32, 2, 2, 1, 16, 64, CONTEXT, tied=True, bos_id=None, eos_ids=tokenizer.eos_ids))
    model.init_weights(0)
    with torch.no_grad():
        model.embed.weight[list(tokenizer.eos_ids)] = 0.0
        model.embed.weight[128:256] = 0.0  # ASCII answers
    path = tmp_path_factory.mktemp("chat") / "model"
    save_model(path, model.get_parameter, model.spec, tokenizer)
    return path


def job(folder: Path, *words: str) -> Job:
    return Job.load(None, [f"model={folder}", "generate.max_tokens=8", "threads=1", *words])


def shows(as_json: bool = False) -> tuple[Show, io.StringIO, io.StringIO]:
    out, err = io.StringIO(), io.StringIO()
    return Show(as_json, out, err), out, err


def test_one_question_streams_its_answer_to_stdout(folder: Path) -> None:
    show, out, err = shows()
    assert verb.answer(job(folder), "hello", show) == OK
    again, out2, _ = shows()
    assert verb.answer(job(folder), "hello", again) == OK
    assert out.getvalue() == out2.getvalue() and len(out.getvalue()) == 9 and out.getvalue().endswith("\n")
    assert err.getvalue() == "[cut after 8 tokens: generate.max_tokens=16 allows more]\n"


def test_json_is_one_document(folder: Path) -> None:
    show, out, _ = shows(as_json=True)
    assert verb.answer(job(folder), "hello", show) == OK
    document = json.loads(out.getvalue())
    assert list(document) == ["prompt", "answer", "tokens", "tokens_per_second", "finish_reason"]
    assert (document["prompt"], document["tokens"], document["finish_reason"]) == ("hello", 8, "length")
    assert document["tokens_per_second"] > 0 and len(document["answer"]) == 8


def test_sampling_settings_reach_the_engine(folder: Path) -> None:
    words = ["generate.temperature=0.7", "generate.top_k=5", "generate.top_p=0.9", "generate.min_p=0.1", "generate.repetition_penalty=1.2", "seed=3"]
    talk = verb.start(job(folder, *words), shows()[0], raw=False)
    assert talk.sampling == Sampling(8, 0.7, 5, 0.9, 0.1, 1.2, seed=3)


def test_the_template_is_used_and_raw_leaves_it_out(folder: Path) -> None:
    show, _, err = shows()
    talk = verb.start(job(folder, "generate.system=Be brief."), show, raw=False)
    tokenizer = talk.engine.tokenizer
    wanted = tokenizer.apply_chat([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}])
    assert talk.prompt("hi") == tokenizer.encode(wanted)
    assert verb.start(job(folder), show, raw=True).prompt("hi") == tokenizer.encode("hi", special=True)
    assert err.getvalue() == ""


def test_a_model_without_template_completes_and_says_so(folder: Path, tmp_path: Path) -> None:
    import shutil

    plain = tmp_path / "plain"
    shutil.copytree(folder, plain)
    path = plain / "tokenizer_config.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "chat_template"}))
    (plain / "checksums.json").unlink(missing_ok=True)
    show, _, err = shows()
    talk = verb.start(job(plain), show, raw=False)
    assert talk.raw and talk.prompt("hi") == [104, 105]
    assert "has no chat template: each text is completed on its own" in err.getvalue()


def test_a_conversation_remembers_and_a_full_context_is_a_clear_error(folder: Path) -> None:
    talk = verb.start(job(folder), shows()[0], raw=False)
    talk.ask("first", lambda text: None)
    assert [m["role"] for m in talk.messages] == ["user", "assistant"] and len(talk.prompt("x")) > len("first") + 8
    before = list(talk.messages)
    with pytest.raises(UserError, match="longer than the context"):
        talk.ask("x" * CONTEXT, lambda text: None)
    assert talk.messages == before and not talk.engine.busy
    show, out, err = shows()
    verb._turn(talk, "x" * CONTEXT, show)
    assert "/reset forgets the conversation" in err.getvalue() and out.getvalue() == ""


def test_the_end_of_the_context_is_named(folder: Path) -> None:
    model, tokenizer = Decoder(DecoderSpec("llama", 259, 16, 1, 2, 1, 8, 32, 32)), Tokenizer.bytes_()
    model.init_weights(1)
    reply = verb.Talk(Engine(model, tokenizer), Sampling(100, ignore_eos=True), raw=True).ask("0123456789", lambda text: None)
    assert reply.tokens == 22 and reply.remark == "[cut after 22 tokens: the context of 32 is full]"


def test_dry_run_plans_one_conversation(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(typer.Exit) as leave:
        verb.chat(words=["threads=1"], model=str(folder), raw=False, json=True, dry_run=True, show_config=False)
    assert leave.value.exit_code == OK
    kv = json.loads(capsys.readouterr().out)["terms"]["kv"]
    assert kv["bytes"] == 2 * 2 * 1 * 16 * 4 * CONTEXT


def test_ctrl_c_is_noted_and_the_second_one_interrupts() -> None:
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), verb.interruptions() as seen:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)
        assert seen == [signal.SIGINT]
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)
    assert signal.getsignal(signal.SIGINT) == before


def test_ctrl_c_beside_the_prompt_does_not_end_the_conversation(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """One at the prompt, and a second while the hint is shown: under load both come at once."""
    monkeypatch.setenv("LILLIPUT_CACHE", str(tmp_path))
    lines, told = iter([True, False]), list[str]()

    def ask(prompt: str) -> str:
        if next(lines):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
            raise AssertionError("Ctrl-C at the prompt was not heard")
        return "/exit"

    def line(text: str) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)
        told.append(text)

    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr("builtins.input", ask)
    show = SimpleNamespace(line=lambda text: told.append(text) if not told else line(text))
    assert verb.converse(SimpleNamespace(messages=[]), show) == OK  # type: ignore[arg-type]
    assert told == [verb.HELP, "\n" + verb.HELP] and signal.getsignal(signal.SIGINT) == before


class Terminal:
    """A child with a terminal of its own; `\\x03` written to it is Ctrl-C."""

    def __init__(self, *arguments: str, home: Path) -> None:
        self.master, child = pty.openpty()
        environment = os.environ | {"TERM": "dumb", "LILLIPUT_CACHE": str(home), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-c", "from lilliput.cli.main import run; run()", *arguments]
        self.process = subprocess.Popen(
            command, stdin=child, stdout=child, stderr=child, start_new_session=True, env=environment,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )  # fmt: skip
        os.close(child)
        self.seen = ""

    def wait_for(self, text: str, seconds: float = 120) -> str:
        """Read until the text comes; what was read up to it."""
        end = time.monotonic() + seconds
        while text not in self.seen:
            if time.monotonic() > end:
                raise AssertionError(f"no {text!r} within {seconds} s in {self.seen!r}")
            if select.select([self.master], [], [], 0.1)[0]:
                self.seen += os.read(self.master, 4096).decode(errors="replace")
        before, _, self.seen = self.seen.partition(text)
        return before

    def write(self, text: str) -> None:
        """Keys."""
        os.write(self.master, text.encode())

    def press_until(self, key: str, text: str) -> None:
        """A key, again after 2 s: between showing its prompt and waiting for keys, readline loses a signal."""
        for _ in range(10):
            self.write(key)
            try:
                self.wait_for(text, 2)
                return
            except AssertionError:
                continue
        raise AssertionError(f"no {text!r} after ten times {key!r}")


@pytest.fixture
def terminal(folder: Path, tmp_path: Path) -> Iterator[Terminal]:
    term = Terminal("chat", "-m", str(folder), "generate.max_tokens=29000", "threads=1", home=tmp_path)
    yield term
    term.process.kill()
    term.process.wait()
    os.close(term.master)


def test_ctrl_c_stops_the_answer_and_not_the_program(terminal: Terminal, tmp_path: Path) -> None:
    terminal.wait_for("Ctrl-C stops an answer (twice: leaves), /help")
    terminal.wait_for("> ")
    terminal.write("tell me a long story\n")
    terminal.wait_for("story\r\n")
    while len(terminal.seen) < 20:  # the answer runs
        terminal.seen += os.read(terminal.master, 4096).decode(errors="replace")
    terminal.write("\x03")
    terminal.wait_for("[stopped]", 10)
    terminal.wait_for("> ")
    terminal.press_until("\x03", "/exit or Ctrl-D leaves")  # at the prompt: a hint, not the end
    terminal.wait_for("> ")
    terminal.write("/reset\n")
    terminal.wait_for("forgotten")
    terminal.wait_for("> ")
    terminal.write("/exit\n")
    assert terminal.process.wait(20) == OK
    assert "tell me a long story" in (tmp_path / "chat_history").read_text()


def test_ctrl_c_at_one_question_ends_with_130(folder: Path, tmp_path: Path) -> None:
    term = Terminal("chat", "-m", str(folder), "a question", "generate.max_tokens=29000", "threads=1", home=tmp_path)
    try:
        while len(term.seen) < 20:
            term.seen += os.read(term.master, 4096).decode(errors="replace")
        term.write("\x03")
        term.wait_for("[stopped]", 10)
        assert term.process.wait(20) == INTERRUPTED
    finally:
        term.process.kill()
        os.close(term.master)


def test_a_pipe_is_the_question(folder: Path) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", "from lilliput.cli.main import run; run()", "chat", "-m", str(folder), "--json", "generate.max_tokens=4"]
    done = subprocess.run(command, input="from a pipe\n", capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == OK, done.stderr
    assert json.loads(done.stdout)["prompt"] == "from a pipe"
    assert done.stderr.splitlines() == ["[cut after 4 tokens: generate.max_tokens=8 allows more]"]
    empty = subprocess.run(command, input=" \n", capture_output=True, text=True, env=environment, timeout=120)
    assert empty.returncode == 2 and json.loads(empty.stdout)["error"]["what"] == "the question is empty"
