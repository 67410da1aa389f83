"""The public harness on our models. Its package is an extra: without it these tests are skipped, but for the refusal."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lilliput.base.errors import UserError
from lilliput.loops.harness import harness_model, run_harness
from lilliput.loops.tasks import answer, judge, read_questions
from lilliput.models.load import load_model


@pytest.fixture(scope="module")
def tiny() -> tuple:
    model, tokenizer, _ = load_model("lilliput-tiny", "cpu")
    return model, tokenizer


@pytest.fixture(scope="module")
def harness():  # type: ignore[no-untyped-def]
    return pytest.importorskip("lm_eval", reason="needs the extra `harness`: pip install 'lilliput[harness]'")


def request(*arguments: object) -> SimpleNamespace:
    return SimpleNamespace(args=arguments)


def test_without_the_package_says_what_to_install(tiny, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    for call in (lambda: harness_model(*tiny), lambda: run_harness(*tiny, ["arc_easy"])):
        with pytest.raises(UserError) as fault:
            call()
        assert "pip install 'lilliput[harness]'" in fault.value.fix


@torch.inference_mode()
def test_rolling_scores_every_token_once(tiny, harness) -> None:  # type: ignore[no-untyped-def]
    model, tokenizer = tiny
    text = "ROMEO. But soft, what light through yonder window breaks? " * 30
    ids = [tokenizer.eos_ids[0] if tokenizer.bos_id is None else tokenizer.bos_id, *tokenizer.encode(text)]
    context = model.facts.context
    assert len(ids) > 2 * context
    total, done = 0.0, 1
    while done < len(ids):
        end = min(done + context, len(ids))
        begin = max(0, end - 1 - context)
        logprobs = model(torch.tensor([ids[begin : end - 1]]))[0].double().log_softmax(-1)
        total += sum(float(logprobs[at - begin - 1, ids[at]]) for at in range(done, end))
        done = end
    (found,) = harness_model(model, tokenizer).loglikelihood_rolling([request(text)])
    assert found == pytest.approx(total, rel=1e-5)


def test_generations_stop_and_keep_their_order(tiny, harness) -> None:  # type: ignore[no-untyped-def]
    from lilliput.serve.engine import Engine
    from lilliput.serve.request import Sampling

    model, tokenizer = tiny
    lm, long = harness_model(model, tokenizer), "KING. " * 400
    asked = [
        ("ROMEO.", {"until": ["\n"], "max_gen_toks": 12}),
        ("JULIET.", {"until": [], "max_gen_toks": 5}),
        ("HAMLET.", {"until": ["\n"], "max_gen_toks": 12}),
        (long, {"max_gen_toks": 3}),
    ]
    found = lm.generate_until([request(*one) for one in asked])
    engine = Engine(model, tokenizer)
    for (prompt, how), text in zip(asked[:3], found):
        sampling = Sampling(max_tokens=how["max_gen_toks"], stop=tuple(how["until"]))
        assert text == engine.generate([tokenizer.encode(prompt, special=True)], sampling)[0].text
    assert len(found[3]) > 0
    with pytest.raises(UserError, match="num_beams"):
        lm.generate_until([request("a", {"num_beams": 4})])


def test_the_harness_gives_our_figures(tiny, harness, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    pytest.importorskip("datasets", reason="the harness reads task files through `datasets`")
    speeches = ["KING.", "QUEEN.", "What is", "Come, my lord,", "Good night", "To be", "Fear not", "Go hence", "He is", "Now is"]
    records = [
        {
            "instruction": f"Please choose the correct answer to the question: {s}\n\n"
            "Answer1: love Answer2: the king of England Answer3: a sword\n\nAnswer format: answer1/answer2/answer3",
            "answer": f"answer{i % 3 + 1}",
        }
        for i, s in enumerate(speeches)
    ]
    (tmp_path / "arc_easy.json").write_text(json.dumps(records))
    questions = read_questions("arc_easy", tmp_path)
    ours = judge("arc_easy", "", questions, answer(*tiny, questions)).metrics
    rows = [{"text": q.choices[0][0], "options": [option[1:] for _, option in q.choices], "label": q.answer} for q in questions]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "task.yaml").write_text(
        "task: here\ndataset_path: json\ntest_split: test\noutput_type: multiple_choice\n"
        f"dataset_kwargs:\n  data_files:\n    test: {tmp_path / 'rows.jsonl'}\n  cache_dir: {tmp_path / 'cache'}\n"
        'doc_to_text: "{{text}}"\ndoc_to_target: label\ndoc_to_choice: "{{options}}"\nmetric_list:\n  - metric: acc\n  - metric: acc_norm\n'
    )
    theirs = run_harness(*tiny, ["here"], include_path=tmp_path)["results"]["here"]
    for figure, (value, error) in ours.items():
        assert theirs[f"{figure},none"] == pytest.approx(value)
        assert math.isclose(theirs[f"{figure}_stderr,none"], error, rel_tol=1e-9)
    with pytest.raises(UserError, match="no task `nowhere`"):
        run_harness(*tiny, ["nowhere"], include_path=tmp_path)
