"""`lilliput chat`: one question, a pipe, or a conversation in the terminal, on the serving engine.

Ctrl-C stops the answer and not the program: a handler leaves a flag, the loop sees it after the step it is in (at most
max_batch_tokens tokens), and the request is cancelled. What was said so far stays in the conversation. A second Ctrl-C
before that ends the program.
"""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lilliput.base import env
from lilliput.base.errors import INTERRUPTED, OK, UserError
from lilliput.cli import common
from lilliput.cli import plan as planning

if TYPE_CHECKING:
    from lilliput.base.config import Settings
    from lilliput.base.job import Job
    from lilliput.base.show import Show
    from lilliput.serve.engine import Engine
    from lilliput.serve.request import Sampling

HELP = "/reset forgets the conversation, /exit or Ctrl-D leaves, Ctrl-C stops an answer (twice: leaves), /help shows this"


@common.verb
def chat(
    words: Annotated[list[str] | None, typer.Argument(metavar="QUESTION | KEY=VALUE", hidden=True)] = None,
    model: Annotated[str, typer.Option("--model", "-m", help="A name, a folder or a file; the same as model=...", show_default=False)] = "",
    raw: Annotated[bool, typer.Option("--raw", help="No chat template: go on from the text.")] = False,
    json: common.Json = False,
    dry_run: common.DryRun = False,
    show_config: common.ShowConfig = False,
) -> int:
    """Ask a model. One question as an argument or on stdin; without either, a conversation.

    Answers are greedy unless generate.temperature is set; the same seed gives the same answer. generate.* also holds
    max_tokens, top_k, top_p, min_p, repetition_penalty and system.

    \b
    Examples:
      lilliput chat "Why is the sky blue?"
      lilliput chat -m runs/job/model generate.temperature=0.7 seed=3
      cat question.txt | lilliput chat --json
    """
    from lilliput.base.job import Job
    from lilliput.base.show import Show

    show = Show(json=json)
    own, overrides = common.split(words)
    common.at_most(own, 1, 'lilliput chat "one question in quotes"')
    job = Job.load(None, [f"model={model}", *overrides] if model else overrides)
    if show_config:
        common.show_settings(show, settled(job))
        return OK
    if dry_run:
        return planning.present(planning.serving(job, 1, 0), show)
    question = own[0] if own else None
    if question is None and not sys.stdin.isatty():
        question = sys.stdin.read().removesuffix("\n")
    if question is None and json:
        raise UserError("--json needs a question", why="a conversation has no single document", fix='lilliput chat --json "Why is the sky blue?"')
    if question is not None and not raw and not question.strip():
        raise UserError("the question is empty", fix='lilliput chat "Why is the sky blue?"')
    return answer(job, question, show, raw=raw)


def settled(job: Job) -> Settings:
    """The job's settings with the runner filled in, reason included; no weight is read."""
    from lilliput.models.load import choose_runner, resolve_spec

    if job.serve.runner != "auto":
        return job.settings
    settings = planning.settled(job)
    device = str(settings.flat()["device"])
    return settings.with_auto("serve.runner", *choose_runner(resolve_spec(job.top.model, fetch=False)[0], job.serve, device))


def answer(job: Job, question: str | None, show: Show, raw: bool = False) -> int:
    """Load the job's model and answer one question, or hold a conversation where `question` is None; the exit code."""
    talk = start(job, show, raw)
    if question is None:
        return converse(talk, show)
    reply = talk.ask(question, show.stream)
    show.stream("\n")
    show.data({"prompt": question} | reply.document())
    if reply.remark:
        show.line(reply.remark)
    return INTERRUPTED if reply.finish_reason == "cancelled" else OK


def start(job: Job, show: Show, raw: bool) -> Talk:
    """A model ready to talk with the job's settings; says on stderr when it can only complete text."""
    from lilliput import api
    from lilliput.serve.request import Sampling

    top, generate = job.top, job.generate
    model = api.load_job(top, job.serve)
    template = model.tokenizer.chat_template
    if template is None and not raw:
        show.line(f"{top.model} has no chat template: each text is completed on its own, as with --raw")
    sampling = Sampling(
        max_tokens=generate.max_tokens,
        temperature=generate.temperature,
        top_k=generate.top_k,
        top_p=generate.top_p,
        min_p=generate.min_p,
        repetition_penalty=generate.repetition_penalty,
        seed=top.seed,
    )
    return Talk(model.engine, sampling, generate.system, raw or template is None)


@dataclass(frozen=True)
class Reply:
    """One answer. `seconds`: from the first token to the last; `cut`: why it was cut short, or empty."""

    text: str
    tokens: int
    seconds: float
    finish_reason: str
    remark: str

    def document(self) -> dict[str, Any]:
        """What --json prints. tokens_per_second leaves out the prompt; null for fewer than two tokens."""
        rate = round((self.tokens - 1) / self.seconds, 2) if self.tokens > 1 and self.seconds > 0 else None
        return {"answer": self.text, "tokens": self.tokens, "tokens_per_second": rate, "finish_reason": self.finish_reason}


@dataclass
class Talk:
    """A conversation with an engine. Raw: every question is completed on its own, without template and memory."""

    engine: Engine
    sampling: Sampling
    system: str = ""
    raw: bool = False
    messages: list[dict[str, str]] = field(default_factory=list)

    def prompt(self, question: str) -> list[int]:
        """The token ids that the model goes on from."""
        tokenizer = self.engine.tokenizer
        if self.raw:
            return tokenizer.encode(question, special=True)
        system = [{"role": "system", "content": self.system}] if self.system else []
        return tokenizer.encode(tokenizer.apply_chat([*system, *self.messages, {"role": "user", "content": question}]))

    def ask(self, question: str, emit: Callable[[str], None]) -> Reply:
        """Answer, giving text to `emit` as it comes. UserError when the conversation is too long; then nothing is remembered."""
        prompt = self.prompt(question)
        id = self.engine.add(prompt, self.sampling)
        parts, times, reason = [], [], None
        with interruptions() as interrupted:
            while reason is None:
                for delta in self.engine.step():
                    if delta.token is not None:
                        times.append(time.perf_counter())
                    parts.append(delta.text)
                    emit(delta.text)
                    reason = delta.finish_reason
                if interrupted and reason is None:
                    self.engine.cancel(id)
        text = "".join(parts)
        if not self.raw:
            self.messages += [{"role": "user", "content": question}, {"role": "assistant", "content": text}]
        return Reply(text, len(times), times[-1] - times[0] if times else 0.0, reason, self._remark(reason, len(prompt), len(times)))

    def _remark(self, reason: str, prompt: int, tokens: int) -> str:
        if reason == "cancelled":
            return "[stopped]"
        if reason != "length":
            return ""
        if prompt + tokens >= self.engine.context:
            return f"[cut after {tokens:,} tokens: the context of {self.engine.context:,} is full]"
        return f"[cut after {tokens:,} tokens: generate.max_tokens={2 * tokens} allows more]"


def converse(talk: Talk, show: Show) -> int:
    """Read questions from the terminal until /exit or the end of input; a fault ends the answer, not the conversation."""
    show.line(HELP)
    with line_history(env.cache_dir() / "chat_history", show), only_at_prompt() as prompt:
        while True:
            try:
                question = prompt("> ").strip()
            except EOFError:
                show.line("")
                return OK
            except KeyboardInterrupt:
                show.line("\n" + HELP)
                continue
            if question == "/exit":
                return OK
            if question == "/reset":
                talk.messages.clear()
                show.line("forgotten")
            elif question.startswith("/") and " " not in question:
                show.line(HELP)
            elif question:
                _turn(talk, question, show)


def _turn(talk: Talk, question: str, show: Show) -> None:
    try:
        reply = talk.ask(question, show.stream)
    except UserError as error:
        show.error(error)
        if talk.messages:
            show.line("/reset forgets the conversation and makes room")
        return
    show.stream("\n")
    if reply.remark:
        show.line(reply.remark)


@contextmanager
def interruptions() -> Iterator[list[int]]:
    """Within, Ctrl-C appends to the list that this gives; a second one, for a step that takes too long, raises KeyboardInterrupt."""
    seen: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        if seen:
            raise KeyboardInterrupt
        seen.append(number)

    with ctrl_c(note):
        yield seen


@contextmanager
def only_at_prompt() -> Iterator[Callable[[str], str]]:
    """`input`, and Ctrl-C raises KeyboardInterrupt within it alone: one that comes as an answer ends or a hint is shown must not end the conversation."""
    waiting = False

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal waiting
        if waiting:
            waiting = False  # a second one while the first is dealt with is nothing
            raise KeyboardInterrupt

    def prompt(text: str) -> str:
        nonlocal waiting
        waiting = True
        try:
            return input(text)
        finally:
            waiting = False

    with ctrl_c(note):
        yield prompt


@contextmanager
def ctrl_c(note: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Within, Ctrl-C calls `note`; then what it called before."""
    before = signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def line_history(path: Path, show: Show) -> Iterator[None]:
    """Line editing, and the questions of earlier sessions under the arrow keys; without either where the system lacks readline."""
    try:
        import readline
    except ImportError:
        yield
        return
    try:
        if path.exists():
            readline.read_history_file(path)
    except OSError as error:
        show.line(f"no earlier questions: {error}")
    readline.set_history_length(1000)
    try:
        yield
    finally:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            readline.write_history_file(path)
        except OSError as error:
            show.line(f"the questions are not kept: {error}")
