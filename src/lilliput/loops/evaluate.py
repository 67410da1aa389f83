"""Evaluation of a model: perplexity on a text, and the tasks of tasks.py, from the files the user names.

Perplexity = exp(mean negative log-likelihood of the scored tokens). The text is cut into windows; in each, every token
but the first is predicted from those before it in the window (no BOS is added).

    stride == window   windows do not overlap; a rest shorter than a window is left out (GPTQ's recipe). Fast, pessimistic.
    stride <  window   windows move by `stride`; of later ones only the last `stride` tokens are scored, each with at least
                       window - stride tokens before it; the last window ends with the text. Slower, fairer.

Only figures of the same text, window, stride and tokenizer may be compared. A `.raw` file is read as WikiText's rows,
as the dataset hub gives them and papers join them: each line keeps its line end, a blank one is empty, rows are joined
by "\\n\\n" (WikiText-2 test: 287,644 GPT-2 tokens). Any other text is read as it is; texts of records are joined by "\\n\\n".
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lilliput.base.errors import UserError, did_you_mean
from lilliput.base.job import Eval
from lilliput.data.sources import expand
from lilliput.data.text import documents
from lilliput.loops import tasks
from lilliput.loops.likelihood import token_logprobs

if TYPE_CHECKING:
    from lilliput.base.show import Show
    from lilliput.data.tokenizer import Tokenizer
    from lilliput.models.decoder import Decoder
    from lilliput.models.native import NativeDecoder

Window = tuple[int, int, int]  # first token, first scored token, end


@dataclass(frozen=True)
class Perplexity:
    """A perplexity and what it was measured on."""

    nll: float  # nats a scored token
    perplexity: float
    scored: int  # tokens
    tokens: int  # of the whole text
    windows: int
    window: int
    stride: int


def read_text(path: str | Path | Sequence[str | Path]) -> str:
    """The text of files, globs or folders (see the module for how). UserError for an unreadable or empty one."""
    files = expand(path)
    if all(file.suffix == ".raw" for file in files):
        lines = [line + "\n" for document in documents(files) for line in "".join(document).removesuffix("\n").split("\n")]
        return "\n\n".join(line if line.strip() else "" for line in lines)
    return "\n\n".join("".join(document) for document in documents(files))


def spans(tokens: int, window: int, stride: int) -> Iterator[Window]:
    """(first token, first scored token, end) of each window over a text of `tokens` tokens; see the module."""
    if tokens <= window:
        yield 0, 1, tokens
        return
    done = 0
    for begin in range(0, tokens, stride):
        end = min(begin + window, tokens)
        if stride == window and end - begin < window:
            return
        if end > done:
            yield begin, max(begin + 1, done), end
        done = end


def perplexity(
    model: Decoder | NativeDecoder, tokens: Sequence[int], *, window: int = 1024, stride: int | None = None, batch: int = 4, limit: int = 0,
    show: Show | None = None,
) -> Perplexity:  # fmt: skip
    """Perplexity of token ids. stride None = window. limit: windows at most (0 = all). batch: windows in one forward.

    UserError when the window is longer than the model's context or the stride than the window, and for a text of less than two tokens.
    """
    import torch

    stride = stride or window
    if window > model.facts.context:
        raise UserError(f"a window of {window} tokens is too long", f"the model knows {model.facts.context} positions", f"eval.window={model.facts.context}")
    if stride > window:
        raise UserError(f"a stride of {stride} skips tokens", f"the window has {window}", f"eval.stride={window}")
    if len(tokens) < 2:
        raise UserError("the text is too short to score", f"{len(tokens)} tokens; the first has nothing before it", "eval.path=FILE with more text")
    chosen = list(spans(len(tokens), window, stride))
    chosen = chosen[:limit] if limit else chosen
    device = model.device
    total, scored = 0.0, 0
    with torch.inference_mode(), show.bar(len(chosen), "perplexity") if show else nullcontext() as bar:
        for group in _batches(chosen, batch):
            tokens_BT = torch.tensor([tokens[begin:end] for begin, _, end in group], device=device)
            h_BTC = model.hidden(tokens_BT)
            for row, (begin, first, end) in enumerate(group):
                logprob_N, _ = token_logprobs(model, h_BTC[row, first - begin - 1 : end - begin - 1], tokens_BT[row, first - begin :])
                total, scored = total - float(logprob_N.double().sum()), scored + end - first
            if bar is not None:
                bar.advance(len(group), f"perplexity {_exp(total / scored):.3f}")
    return Perplexity(total / scored, _exp(total / scored), scored, len(tokens), len(chosen), window, stride)


def _batches(windows: Sequence[Window], batch: int) -> Iterator[list[Window]]:
    """`batch` windows of equal length at a time; only the last can be shorter."""
    group: list[Window] = []
    for span in windows:
        if group and (len(group) == batch or span[2] - span[0] != group[0][2] - group[0][0]):
            yield group
            group = []
        group.append(span)
    yield group


def _exp(nll: float) -> float:
    return math.exp(nll) if nll < 700 else math.inf


@dataclass(frozen=True)
class Opened:
    """What is to be measured, its files read and checked: made before any weight is loaded."""

    text: str | None
    questions: dict[str, tuple[str, list[tasks.Question]]]  # task -> (file, questions), in the order asked for


def open_tasks(settings: Eval) -> Opened:
    """Read and check the files of every task of `settings`. UserError for an unknown task, a missing path, a record of another shape."""
    names = [settings.tasks] if isinstance(settings.tasks, str) else list(settings.tasks)
    names = [name.strip() for listed in names for name in listed.split(",") if name.strip()]
    known = ["perplexity", *tasks.TASKS]
    for name in names:
        if name not in known:
            raise UserError(f"unknown task `{name}`", fix=did_you_mean(name, known))
    if not names:
        raise UserError("no task was named", fix=f"eval.tasks={known[0]}")
    if not settings.path:
        raise UserError(
            f"nothing to measure {names[0]} on",
            "eval.path is empty",
            "eval.path=FILE (a text for perplexity, questions for tasks), or the folder that holds them",
        )
    text = read_text(settings.path) if "perplexity" in names else None
    files = {name: tasks.find_file(name, settings.path) for name in names if name != "perplexity"}
    return Opened(text, {name: (str(file), tasks.read_questions(name, file, settings.limit)) for name, file in files.items()})


def evaluate(
    model: Decoder | NativeDecoder, tokenizer: Tokenizer, opened: Opened, settings: Eval, show: Show | None = None
) -> list[Perplexity | tasks.TaskResult]:
    """Measure what was opened, perplexity first, then the tasks in their order."""
    results: list[Perplexity | tasks.TaskResult] = []
    if opened.text is not None:
        stride = None if settings.stride == "auto" else settings.stride
        ids = tokenizer.encode(opened.text)
        results.append(perplexity(model, ids, window=settings.window, stride=stride, batch=settings.batch, limit=settings.limit, show=show))
    for name, (file, questions) in opened.questions.items():
        results.append(tasks.judge(name, file, questions, tasks.answer(model, tokenizer, questions, batch=settings.batch, show=show, label=name)))
        if show:  # tasks take minutes: what is known is said before the next one begins
            show.line("; ".join(f"{row['task']} {row['figure']} {row['value']:.4f}" for row in rows(results[-1:])))
    return results


def rows(results: Sequence[Perplexity | tasks.TaskResult]) -> list[dict[str, Any]]:
    """Results as table rows: task, figure, value, error (standard; empty for perplexity on a text), n, on."""
    found: list[dict[str, Any]] = []
    for result in results:
        if isinstance(result, Perplexity):
            windows = f"{result.windows} windows of {result.window}, stride {result.stride}, of {result.tokens:,} tokens"
            found.append(
                {"task": "perplexity", "figure": "perplexity", "value": result.perplexity, "error": "", "n": f"{result.scored:,} tokens", "on": windows}
            )
        else:
            for figure, (value, error) in result.metrics.items():
                found.append({"task": result.task, "figure": figure, "value": value, "error": error, "n": f"{result.questions:,} questions", "on": result.file})
    return found


def to_dict(results: Sequence[Perplexity | tasks.TaskResult]) -> list[dict[str, Any]]:
    """Results as plain values for --json and lilliput.json."""
    return [{"task": "perplexity"} | asdict(r) if isinstance(r, Perplexity) else asdict(r) for r in results]
