"""Records become questions, scores become figures; files of another shape are named."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from lilliput.base.errors import UserError
from lilliput.loops.likelihood import Score
from lilliput.loops.tasks import TASKS, Question, find_file, judge, read_questions, run_task
from lilliput.models.load import load_model

ARC = {
    "instruction": "Please choose the correct answer to the question: What do plants need: light or Answer1?\n\n"
    "Answer1: Light. Answer2: a stone Answer3: Sand, wet \n\nAnswer format: answer1/answer2/answer3",
    "input": "", "output": "the correct answer is answer2", "answer": "answer2",
}  # fmt: skip
PIQA = {
    "instruction": "Please choose the correct solution to the question: dresser\n\n"
    "Solution1: replace drawer \n\nSolution2: finish, woodgrain\n\nAnswer format: solution1/solution2",
    "answer": "solution1",
}
BOOLQ = {
    "instruction": "Please answer the following question with true or false, question: is a question: hard?\n\nAnswer format: true/false",
    "answer": "true",
}
WINO = {
    "instruction": "Please choose the correct answer to fill in the blank to complete the given sentence: Ann met Bo, so _ said hi.\n\n"
    "Option1: Ann Option2: Bo Answer format: option1/option2",
    "answer": "option2",
}
LAMBADA = {"text": 'He said:\n\n"I like the Signs'}


def write(path: Path, records: list[dict], lines: bool = False) -> Path:
    path.write_text("\n".join(map(json.dumps, records)) if lines else json.dumps(records))
    return path


@pytest.mark.parametrize(
    ("task", "record", "question"),
    [
        (
            "arc_easy",
            ARC,
            Question(tuple(("Question: What do plants need: light or Answer1?\nAnswer:", f" {o}") for o in ("Light.", "a stone", "Sand, wet")), 1, (6, 7, 9)),
        ),
        ("openbookqa", ARC, Question(tuple(("What do plants need: light or Answer1?", f" {o}") for o in ("Light.", "a stone", "Sand, wet")), 1, (6, 7, 9))),
        ("piqa", PIQA, Question(tuple(("Question: dresser\nAnswer:", f" {o}") for o in ("replace drawer", "finish, woodgrain")), 0, (14, 17))),
        ("boolq", BOOLQ, Question(tuple(("Question: is a question: hard?\nAnswer:", o) for o in (" no", " yes")), 1)),
        ("winogrande", WINO, Question((("Ann met Bo, so Ann", " said hi."), ("Ann met Bo, so Bo", " said hi.")), 1)),
        ("lambada", LAMBADA, Question((('He said:\n\n"I like the', " Signs"),), 0)),
    ],
)
def test_prompts(tmp_path: Path, task: str, record: dict, question: Question) -> None:
    assert read_questions(task, write(tmp_path / "x.json", [record])) == [question]
    assert read_questions(task, write(tmp_path / "x.jsonl", [record] * 3, lines=True), limit=2) == [question] * 2


@pytest.mark.parametrize(
    ("task", "record", "words"),
    [
        (
            "arc_easy",
            {"question": "why?", "choices": ["a", "b"], "answerKey": "A"},
            "no text under instruction, answer; keys that came: answerKey, choices, question",
        ),
        ("arc_easy", {**ARC, "answer": "answer4"}, "keys that came: answer, input, instruction, output"),
        ("arc_easy", {**ARC, "instruction": ARC["instruction"].replace("Answer2:", "Answer7:")}, "Please choose the correct answer"),
        ("arc_easy", {**ARC, "answer": 2}, "no text under answer"),
        ("piqa", ARC, "Please choose the correct answer"),
        ("boolq", {**BOOLQ, "answer": "maybe"}, "true or false"),
        ("winogrande", {**WINO, "instruction": WINO["instruction"].replace("_", "she")}, "fill in the blank"),
        ("lambada", {"text": "word"}, "its text is 'word'"),
        ("lambada", {"sentence": "a b"}, "keys that came: sentence"),
    ],
)
def test_another_shape_names_the_record_and_its_keys(tmp_path: Path, task: str, record: dict, words: str) -> None:
    good = {"arc_easy": ARC, "piqa": PIQA, "boolq": BOOLQ, "winogrande": WINO, "lambada": LAMBADA}[task]
    file = write(tmp_path / "x.jsonl", [good, good, record], lines=True)
    with pytest.raises(UserError) as fault:
        read_questions(task, file)
    assert fault.value.what == f"{file} line 3: not a question of {task}"
    assert words in fault.value.why
    shown = json.loads(fault.value.fix.removeprefix("one record is "))
    assert all(key in shown for key in TASKS[task].keys)


def test_a_folder_is_searched_by_the_tasks_name(tmp_path: Path) -> None:
    for name in ("ARC-Easy.test.json", "ARC-Easy.train.json", "piqa.test.json", "boolq/test.json", "boolq/train.json", "notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write(tmp_path / name, [ARC])
    assert find_file("arc_easy", tmp_path) == tmp_path / "ARC-Easy.test.json"
    assert find_file("boolq", tmp_path) == tmp_path / "boolq" / "test.json"
    assert find_file("winogrande", tmp_path / "piqa.test.json") == tmp_path / "piqa.test.json", "a file is taken as it is"
    with pytest.raises(UserError, match="0 files for task winogrande"):
        find_file("winogrande", tmp_path)
    write(tmp_path / "piqa2.test.json", [PIQA])
    with pytest.raises(UserError, match="2 files for task piqa") as fault:
        find_file("piqa", tmp_path)
    assert "piqa.test.json, piqa2.test.json" in fault.value.why
    with pytest.raises(UserError, match="no file or folder"):
        find_file("piqa", tmp_path / "nowhere")
    with pytest.raises(UserError) as fault:
        find_file("arc_esay", tmp_path)
    assert "arc_easy" in fault.value.fix


def test_figures_by_hand() -> None:
    three = Question((("q", " a"), ("q", " bbbb"), ("q", " c")), 1, (1, 4, 1))
    scores = [[Score(-2.0, False), Score(-4.0, False), Score(-3.0, False)], [Score(-9.0, False), Score(-4.0, False), Score(-5.0, False)]]
    result = judge("arc_easy", "f", [three, three], scores)
    assert result.metrics["acc"] == (0.5, pytest.approx(math.sqrt(0.25 * 2 / 1 / 2))) and result.metrics["acc_norm"][0] == 1.0
    assert judge("boolq", "f", [Question((("q", " no"), ("q", " yes")), 0)], [[Score(-1.0, False), Score(-1.0, False)]]).metrics == {"acc": (1.0, math.inf)}


def test_last_words_by_hand() -> None:
    words = [[Score(-1.0, True)], [Score(-3.0, False)], [Score(-2.0, True)]]
    result = judge("lambada", "f", [Question((("q", " w"),), 0)] * 3, words)
    assert result.questions == 3 and set(result.metrics) == {"acc", "perplexity"}
    assert result.metrics["acc"][0] == pytest.approx(2 / 3)
    assert result.metrics["perplexity"] == (pytest.approx(math.e**2), pytest.approx(math.e**2 * 1.0 / math.sqrt(3)))


def test_a_task_from_file_to_figures(tmp_path: Path) -> None:
    model, tokenizer, _ = load_model("lilliput-tiny", "cpu")
    file = write(tmp_path / "wino.json", [WINO, {**WINO, "answer": "option1"}])
    one, two = (run_task(model, tokenizer, "winogrande", file, batch=n) for n in (1, 2))
    assert one == two and one.questions == 2
    assert one.metrics["acc"][0] == 0.5, "the same question with both answers"


@pytest.mark.shared
@pytest.mark.parametrize(
    ("task", "count", "right"), [("arc_easy", 2376, 596), ("piqa", 1838, 910), ("boolq", 3270, 1237), ("winogrande", 1267, 628), ("openbookqa", 500, 138)]
)
def test_real_files_are_read_whole(shared_data: Path, task: str, count: int, right: int) -> None:
    questions = read_questions(task, shared_data / "llm-adapters-mc")
    assert len(questions) == count and sum(q.answer == 0 for q in questions) == right
    assert not any("format:" in prompt + option for q in questions for prompt, option in q.choices)


@pytest.mark.shared
def test_real_lambada(shared_data: Path) -> None:
    questions = read_questions("lambada", shared_data)
    assert len(questions) == 5153 and questions[0].choices[0][1] == " signs"
