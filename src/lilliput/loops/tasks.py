"""Multiple-choice tasks and LAMBADA, scored by log-likelihood, from files the user has.

    task         prompt, then the continuations that are compared                        figures
    arc_easy     "Question: {q}\\nAnswer:"          " {option}"                            acc, acc_norm
    piqa         "Question: {q}\\nAnswer:"          " {option}"                            acc, acc_norm
    openbookqa   "{q}"                             " {option}"                            acc, acc_norm
    boolq        "Question: {q}?\\nAnswer:"         " no", " yes"                          acc
    winogrande   the sentence up to _, an option   " " and the rest of the sentence       acc
    lambada      the text but its last word        " " and that word                      acc (greedy), perplexity

acc: the right continuation has the highest log-probability; acc_norm: per character of the option. Prompts and figures
are those of lm-evaluation-harness (Gao et al. 2021), but for boolq: these files hold no passage, so its figure is not
the published one. Files: the LLM-Adapters layout (Hu et al. 2023, arXiv 2304.01933), JSON lists or lines of
{"instruction", "answer"} with the options inside the instruction; LAMBADA as lines of {"text"}.
"""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lilliput.base.errors import UserError, did_you_mean
from lilliput.data.sources import Reader
from lilliput.loops.likelihood import Pair, Score, encode_pair, score

if TYPE_CHECKING:
    from lilliput.base.show import Show
    from lilliput.data.tokenizer import Tokenizer
    from lilliput.models.decoder import Decoder
    from lilliput.models.native import NativeDecoder

ENDINGS = (".json", ".jsonl")


@dataclass(frozen=True)
class Question:
    """(context, continuation) of each choice, which one is right, and how many characters each option has (0: not normalised)."""

    choices: tuple[tuple[str, str], ...]
    answer: int
    characters: tuple[int, ...] = ()


@dataclass(frozen=True)
class TaskResult:
    """Figures of one task: name -> (value, standard error)."""

    task: str
    file: str
    questions: int
    metrics: Mapping[str, tuple[float, float]]


@dataclass(frozen=True)
class Task:
    """How a record becomes a question; `words` are looked for in the names of a folder's files."""

    words: tuple[str, ...]
    keys: tuple[str, ...]
    parse: Callable[[dict[str, Any]], Question | None]  # None: not of this shape
    shape: str  # an example of a record, for messages


def _split(text: str, label: str) -> tuple[str, list[str]] | None:
    """("the question", ["first option", ...]) of an LLM-Adapters instruction; None when the options are not 1, 2, 3, ..."""
    head, found, _ = text.rpartition("Answer format:")
    parts = re.split(rf"(?:(?<=\s)|^){label}(\d+):", head)
    numbers, options = parts[1::2], [part.strip() for part in parts[2::2]]
    if not found or len(options) < 2 or numbers != [str(i) for i in range(1, len(options) + 1)] or not all(options):
        return None
    opening = re.match(r"Please choose the correct [^:]*:\s*", parts[0])
    return (parts[0][opening.end() :].strip(), options) if opening else None


def _choose(prompt: str, label: str) -> Callable[[dict[str, Any]], Question | None]:
    """Questions whose options are written after a prompt."""

    def parse(record: dict[str, Any]) -> Question | None:
        split = _split(record["instruction"], label)
        right = re.fullmatch(rf"{label.lower()}(\d+)", record["answer"])
        if split is None or right is None or not 1 <= int(right[1]) <= len(split[1]):
            return None
        question, options = split
        return Question(tuple((prompt.format(question), f" {option}") for option in options), int(right[1]) - 1, tuple(map(len, options)))

    return parse


def _boolq(record: dict[str, Any]) -> Question | None:
    found = re.match(r".*?\bquestion:\s*(.*?)\s*\?*\s*Answer format:", record["instruction"], re.S)
    if found is None or record["answer"] not in ("true", "false"):
        return None
    prompt = f"Question: {found[1]}?\nAnswer:"
    return Question(((prompt, " no"), (prompt, " yes")), int(record["answer"] == "true"))


def _winogrande(record: dict[str, Any]) -> Question | None:
    split = _split(record["instruction"], "Option")
    if split is None or record["answer"] not in ("option1", "option2") or len(split[1]) != 2 or "_" not in split[0]:
        return None
    before, _, after = split[0].partition("_")
    return Question(tuple((before + option, f" {after.strip()}") for option in split[1]), int(record["answer"][-1]) - 1)


def _lambada(record: dict[str, Any]) -> Question | None:
    before, _, word = record["text"].rpartition(" ")
    return Question(((before, f" {word}"),), 0) if before.strip() and word else None


def _options(label: str) -> str:
    low = label.lower()
    return f'{{"instruction": "Please choose the correct ...: ... {label}1: ... {label}2: ... Answer format: {low}1/{low}2", "answer": "{low}1"}}'


_KEYS = ("instruction", "answer")
_BOOLQ = '{"instruction": "... question: ...? Answer format: true/false", "answer": "true"}'
TASKS: dict[str, Task] = {
    "arc_easy": Task(("arceasy",), _KEYS, _choose("Question: {}\nAnswer:", "Answer"), _options("Answer")),
    "piqa": Task(("piqa",), _KEYS, _choose("Question: {}\nAnswer:", "Solution"), _options("Solution")),
    "boolq": Task(("boolq",), _KEYS, _boolq, _BOOLQ),
    "winogrande": Task(("winogrande",), _KEYS, _winogrande, _options("Option")),
    "openbookqa": Task(("openbookqa", "obqa"), _KEYS, _choose("{}", "Answer"), _options("Answer")),
    "lambada": Task(("lambada",), ("text",), _lambada, '{"text": "... the last word"}'),
}


def find_file(task: str, path: str | Path) -> Path:
    """The file of a task: the path itself, or the one file in the folder whose name (or folder) says the task, `test` before others.

    UserError for an unknown task, a missing path, and a folder where none or several would do.
    """
    if task not in TASKS:
        raise UserError(f"unknown task `{task}`", fix=did_you_mean(task, [*TASKS, "perplexity"]))
    path = Path(path)
    if path.is_file():
        return path
    if not path.is_dir():
        raise UserError(f"there is no file or folder {path}", f"task {task} reads its questions from it", "eval.path=FILE or the folder that holds it")
    files = sorted(file for file in path.rglob("*") if file.suffix in ENDINGS and file.is_file())
    plain = {file: re.sub(r"[^a-z0-9]", "", str(file.relative_to(path)).lower()) for file in files}
    named = [file for file, name in plain.items() if any(word in name for word in TASKS[task].words)]
    found = [file for file in named if "test" in plain[file]] or [file for file in named if "train" not in plain[file]]
    if len(found) != 1:
        which = ", ".join(str(file.relative_to(path)) for file in found) if found else f"none of {len(files)} {'/'.join(ENDINGS)} files is named after it"
        raise UserError(f"{path} has {len(found)} files for task {task}", which, f"eval.path={found[0] if found else path / (task + '.test.json')}")
    return found[0]


def read_questions(task: str, path: str | Path, limit: int = 0) -> list[Question]:
    """The first `limit` questions (0: all) of a task's file. UserError that names the record and its keys when one has another shape."""
    kind, questions = TASKS[task], []
    file = find_file(task, path)
    for where, record in Reader([file]).records(file):
        texts = all(isinstance(record.get(key), str) for key in kind.keys)
        question = kind.parse(record) if texts else None
        if question is None:
            missing = [key for key in kind.keys if not isinstance(record.get(key), str)]
            reason = f"no text under {', '.join(missing)}" if missing else f"its {kind.keys[0]} is {record[kind.keys[0]][:80]!r}..."
            came = ", ".join(sorted(map(str, record))[:12]) or "none"
            raise UserError(f"{where}: not a question of {task}", f"{reason}; keys that came: {came}", f"one record is {kind.shape}")
        questions.append(question)
        if len(questions) == limit:
            break
    return questions


def run_task(model: Decoder, tokenizer: Tokenizer, task: str, path: str | Path, *, limit: int = 0, batch: int = 4, show: Show | None = None) -> TaskResult:
    """Read a task's file, score it, and give its figures. `batch`: questions in one forward."""
    questions = read_questions(task, path, limit)
    return judge(task, str(find_file(task, path)), questions, answer(model, tokenizer, questions, batch=batch, show=show, label=task))


def answer(
    model: Decoder | NativeDecoder, tokenizer: Tokenizer, questions: Sequence[Question], *, batch: int = 4, show: Show | None = None,
    label: str = "questions",
) -> list[list[Score]]:  # fmt: skip
    """The score of every choice of every question."""
    groups: list[list[Pair]] = [[encode_pair(tokenizer, *choice) for choice in question.choices] for question in questions]
    if show is None:
        return score(model, groups, batch)
    with show.bar(len(groups), label) as bar:
        return score(model, groups, batch, bar.advance)


def judge(task: str, file: str, questions: Sequence[Question], scores: Sequence[Sequence[Score]]) -> TaskResult:
    """The figures of a task from its scores; ties go to the first choice."""
    if len(questions[0].choices) == 1:
        logprobs = [choice.logprob for (choice,) in scores]
        each, spread = math.exp(-statistics.fmean(logprobs)), _error(logprobs)
        metrics = {"acc": _share([choice.greedy for (choice,) in scores]), "perplexity": (each, each * spread)}
    else:
        best = lambda values: max(range(len(values)), key=lambda i: values[i])
        metrics = {"acc": _share([best([s.logprob for s in four]) == q.answer for q, four in zip(questions, scores)])}
        if questions[0].characters:
            metrics["acc_norm"] = _share([best([s.logprob / n for s, n in zip(four, q.characters)]) == q.answer for q, four in zip(questions, scores)])
    return TaskResult(task, file, len(questions), metrics)


def _share(hits: Sequence[bool]) -> tuple[float, float]:
    return statistics.fmean(hits), _error([float(hit) for hit in hits])


def _error(values: Sequence[float]) -> float:
    """Standard error of the mean; infinite for a single value."""
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.inf
