"""The public Python names: the same words as the command line, typed.

    import lilliput
    model = lilliput.load("smollm2-135m")
    model.chat("Why is the sky blue?")

Nothing here prints or keeps hidden state: a chat remembers only inside a `Chat`. torch loads when a model does.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lilliput.base import registry
from lilliput.base.errors import DoesNotFit, UserError, did_you_mean
from lilliput.base.job import Job, Serve, Top
from lilliput.loops.train import TrainResult
from lilliput.serve.request import Sampling

if TYPE_CHECKING:
    from lilliput.base.facts import Facts
    from lilliput.base.hardware import Hardware
    from lilliput.base.show import Show
    from lilliput.data.tokenizer import Tokenizer
    from lilliput.loops.evaluate import Perplexity
    from lilliput.loops.tasks import TaskResult
    from lilliput.models.decoder import Decoder
    from lilliput.models.native import NativeDecoder
    from lilliput.models.spec import DecoderSpec
    from lilliput.plan.estimate import Estimate
    from lilliput.serve.engine import Engine

__all__ = ["Chat", "DoesNotFit", "Job", "LanguageModel", "Sampling", "TrainResult", "UserError", "evaluate", "load", "plan", "pull", "train"]

Message = Mapping[str, Any]  # {"role": "user" | "assistant" | "system", "content": text}


@dataclass
class LanguageModel:
    """A model with its tokenizer, ready to answer. `module` is the torch module, in evaluation mode.

    Sampling keywords are the fields of `Sampling`: max_tokens, temperature (0 = greedy), top_k, top_p, min_p, seed, stop,
    the penalties, logit_bias and more. An unknown one is a UserError.
    """

    module: Decoder | NativeDecoder
    tokenizer: Tokenizer
    backend: str = "eager"  # what runs it, and why
    serve: Serve = field(default_factory=lambda: Job.load().serve)

    @property
    def spec(self) -> DecoderSpec:
        """The shape of the model."""
        return self.module.spec

    @cached_property
    def engine(self) -> Engine:
        """The serving engine, made at the first question (this allocates the cache)."""
        from lilliput.serve.adapters import Library
        from lilliput.serve.engine import Engine

        serve = self.serve
        engine = Engine(self.module, self.tokenizer, context=serve.context, kv=serve.kv, kv_tokens=serve.kv_tokens or None,
                        max_batch_tokens=serve.max_batch_tokens, sharing=serve.sharing, scheduling=serve.scheduling, preemption=serve.preemption,
                        swap_tokens=serve.swap_tokens, swap_file_tokens=serve.swap_file_tokens, swap_folder=serve.swap_folder,
                        policy=serve.policy, draft=_drafter(serve), guesses=serve.guesses, max_adapters=serve.max_adapters,
                        step_ms=serve.step_ms)  # fmt: skip
        if serve.adapters:
            for name, folder in Library(serve.adapters).found().items():
                engine.load(engine.adapters.read(name, folder))
        return engine

    def generate(self, prompt: str, **sampling: Any) -> str:
        """The text that follows the prompt, without a chat template."""
        return "".join(self.stream(prompt, **sampling))

    def stream(self, prompt: str | Sequence[Message], **sampling: Any) -> Iterator[str]:
        """Pieces of text as they come. A prompt string is gone on from; a list of messages goes through the chat template."""
        special = isinstance(prompt, str)
        text = prompt if isinstance(prompt, str) else self.tokenizer.apply_chat(prompt)
        for delta in self.engine.stream(self.tokenizer.encode(text, special=special), _sampling(sampling)):
            yield delta.text

    def chat(self, question: str | Sequence[Message], *, system: str = "", **sampling: Any) -> str:
        """The answer to one question, or to a list of messages. Nothing is remembered; `conversation` remembers."""
        messages = [{"role": "user", "content": question}] if isinstance(question, str) else list(question)
        return "".join(self.stream([*_system(system), *messages], **sampling))

    def conversation(self, system: str = "", **sampling: Any) -> Chat:
        """A conversation that remembers what was said, with these sampling keywords for every answer."""
        _sampling(sampling)
        return Chat(self, sampling, _system(system))


def _drafter(serve: Serve) -> Any:
    """A drafter's name as it is; any other word is a model, which is loaded as the first one was."""
    if not serve.draft or serve.draft.partition(":")[0] in registry.names("drafter"):
        return serve.draft
    from lilliput.models.load import load_to_serve

    return load_to_serve(serve.draft, serve)[0]


@dataclass
class Chat:
    """A conversation: `say` asks, `messages` is all that was said so far and may be edited."""

    model: LanguageModel
    sampling: Mapping[str, Any]
    messages: list[dict[str, str]] = field(default_factory=list)

    def say(self, text: str) -> str:
        """The answer; question and answer join `messages` once the answer is complete."""
        question = {"role": "user", "content": text}
        answer = self.model.chat([*self.messages, question], **self.sampling)
        self.messages += [question, {"role": "assistant", "content": answer}]
        return answer


def load(
    name: str | Path, *, device: str = "auto", dtype: Literal["fp32", "bf16"] = "fp32", threads: int | Literal["auto"] = "auto", **serve: Any
) -> LanguageModel:
    """A model by name (pulled when it is not in the cache), folder or file. UserError when there is none or it is damaged.

    `threads`: compute threads in this process from now on; auto = what the cgroup allows. `serve`: the keys of the section
    `serve` (runner, weights, kv). The default runner here is eager, whose `module` is a torch module that can be trained and
    taken apart; runner="auto" takes the compiled kernels where they can run it.
    """
    job = Job.load(model=str(name), device=device, dtype=dtype, threads=threads, serve={"runner": "eager", **serve})
    return load_job(job.top, job.serve)


def load_job(top: Top, serve: Serve) -> LanguageModel:
    """The model of a job's top section, run as `serve` says, with the job's threads."""
    from lilliput.base import hardware
    from lilliput.models.load import load_to_serve
    from lilliput.ops import native

    module, tokenizer, backend = load_to_serve(top.model, serve, top.device, top.dtype)
    import torch

    count = hardware.cpus() if top.threads == "auto" else top.threads
    torch.set_num_threads(count)
    native.threads(count)
    return LanguageModel(module, tokenizer, backend, serve)


def pull(name: str) -> Path:
    """Fetch a model or `data:NAME` into the cache, unless it is there, and return where it lies."""
    from lilliput.base.show import Show
    from lilliput.models import hub

    return hub.pull(name, Show())


def train(job: Job | str | Path | None = None, *, out: str | Path, **sections: Any) -> TrainResult:
    """Run a job (a Job, a TOML file, or sections as keywords) in the folder `out`, or go on with it.

    Example: train(model="smollm2-135m", data={"path": "notes.txt"}, train={"steps": 50}, lora={"rank": 8}, out="runs/notes")
    """
    from lilliput.base.show import Show
    from lilliput.loops.train import train as run

    return run(_job(job, sections), Path(out), Show())


def evaluate(model: LanguageModel | str | Path, *, path: str | Path, **settings: Any) -> dict[str, Perplexity | TaskResult]:
    """Task name -> its figures. `settings`: the keys of the section `eval` (tasks, window, stride, limit, batch).

    Example: evaluate("smollm2-135m", path="wiki.test.raw", window=1024, limit=40)["perplexity"].perplexity
    """
    from lilliput.base.show import Show

    section = {"path": str(path), **settings}
    if isinstance(model, LanguageModel):
        results = measure(Job.load(eval=section), Show(), model)
    else:
        results = measure(Job.load(model=str(model), eval=section), Show())
    return {getattr(result, "task", "perplexity"): result for result in results}


def measure(job: Job, show: Show, model: LanguageModel | None = None) -> list[Perplexity | TaskResult]:
    """What the section `eval` of a job asks for, of the job's model or of one that is loaded; files are checked before weights are read."""
    from lilliput.loops import evaluate as loop

    opened = loop.open_tasks(job.eval)
    if model is None:  # as it is served where the job says so, else the plain model
        model = load_job(job.top, job.serve if job.settings.given("serve") else Job.load(serve={"runner": "eager"}).serve)
    return loop.evaluate(model.module, model.tokenizer, opened, job.eval, show)


def plan(job: Job | str | Path | None = None, **sections: Any) -> Estimate:
    """What the job will cost, before it runs and without torch: bytes by term, what fits, the nearest fixes."""
    from lilliput.plan.estimate import estimate_training

    job = _job(job, sections)
    return estimate_training(job, *model_and_machine(job))


def model_and_machine(job: Job) -> tuple[Facts, Hardware]:
    """The facts of the job's model and the machine it is planned for; nothing is fetched, and torch is not loaded."""
    from lilliput.base import hardware
    from lilliput.models.facts import facts
    from lilliput.models.load import resolve_spec

    spec, _ = resolve_spec(job.top.model, fetch=False)
    return facts(spec), hardware.find(job.top.hardware)


def _job(job: Job | str | Path | None, sections: Mapping[str, Any]) -> Job:
    if isinstance(job, Job):
        if sections:
            raise UserError("a Job and sections at once", f"got sections {', '.join(sections)}", "give them to Job.load instead")
        return job
    return Job.load(job, **sections)


def _system(text: str) -> list[dict[str, str]]:
    return [{"role": "system", "content": text}] if text else []


def _sampling(keywords: Mapping[str, Any]) -> Sampling:
    known = [f.name for f in fields(Sampling)]
    unknown = [name for name in keywords if name not in known]
    if unknown:
        raise UserError(f"unknown sampling keyword `{unknown[0]}`", fix=did_you_mean(unknown[0], known))
    made = Sampling(**keywords)
    if made.width > 1:
        raise UserError(f"{made.width} answers at once", "a text is one answer", "model.engine.generate([prompt], Sampling(n=...))")
    return made
