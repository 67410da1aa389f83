"""The loop: it learns, it resumes bitwise after Ctrl-C and kill -9, it refuses what it cannot do, it leaves a folder that others load."""

from __future__ import annotations

import json
import os
import random
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lilliput.base.errors import DoesNotFit, UserError
from lilliput.base.job import Job
from lilliput.base.show import Show
from lilliput.loops.train import train

WORDS = ["the", "lilliput", "rope", "holds", "a", "giant", "down", "on", "small", "sand", "and", "it", "sleeps"]
BASE = {"model": "tiny", "seed": 3, "threads": 1}
STEPS = 12


@pytest.fixture
def text(tmp_path: Path) -> Path:
    chooser = random.Random(0)
    path = tmp_path / "text.txt"
    path.write_text("\n".join(" ".join(chooser.choices(WORDS, k=9)) for _ in range(300)))
    return path


def words(text: Path, **more: str) -> list[str]:
    fixed = {
        "model": "tiny", "seed": "3", "threads": "1", "data.path": str(text), "data.tokenizer": "bytes", "data.sequence": "32", "train.init": "scratch",
        "train.steps": str(STEPS), "train.tokens_per_step": "128", "train.micro_batch": "2", "train.warmup": "2", "train.lr": "3e-3", "train.save_every": "3",
        "train.eval_tokens": "256", "train.dropout": "0.1",
    }  # fmt: skip
    return [f"{k}={v}" for k, v in (fixed | more).items()]


def run(text: Path, out: Path, **more: str):
    return train(Job.load(overrides=words(text, **more)), out, Show(json=True))


def curve(out: Path) -> list[tuple]:
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [(r["step"], r.get("loss"), r.get("grad_norm"), r.get("lr"), r.get("eval_loss")) for r in rows]


def assert_same_run(first: Path, second: Path) -> None:
    assert curve(first) == curve(second)
    a, b = load_file(first / "model" / "model.safetensors"), load_file(second / "model" / "model.safetensors")
    assert a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def spawn(text: Path, out: Path, *more: str) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "lilliput", "train", *words(text), *more, "--out", str(out)]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)


def wait_for_step(out: Path, step: int, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 600
    while time.monotonic() < deadline and process.poll() is None:
        if (out / "metrics.jsonl").is_file() and f'"step": {step}, "loss"' in (out / "metrics.jsonl").read_text():
            return
        time.sleep(0.005)
    raise AssertionError(f"step {step} was not reached: {process.stderr.read() if process.poll() is not None else 'timeout'}")


def kill_and_resume(text: Path, folder: Path, whole: Path, trials: int, seed: int, *more: str) -> None:
    chooser = random.Random(seed)
    for trial in range(trials):
        out = folder / f"killed-{trial}"
        process = spawn(text, out, *more)
        wait_for_step(out, chooser.randint(1, STEPS - 1), process)
        time.sleep(chooser.random() * 0.05)  # anywhere in a step, a save or an evaluation
        process.send_signal(signal.SIGKILL)
        process.communicate()
        run(text, out, **dict(word.split("=") for word in more))
        assert_same_run(whole, out)


def test_it_learns_and_leaves_a_folder_that_transformers_loads(text: Path, tmp_path: Path) -> None:
    result = run(text, tmp_path / "run", **{"train.steps": "60", "train.dropout": "0", "train.lr": "1e-2"})
    assert result.loss_first == pytest.approx(torch.log(torch.tensor(256.0)).item(), abs=0.4), "random weights know nothing: ln(vocabulary)"
    assert result.eval_after < 2.6 < result.eval_before
    out = tmp_path / "run"
    assert {p.name for p in out.iterdir()} >= {"job.toml", "metrics.jsonl", "loss.png", "loss.svg", "model", "checkpoints", "result.json", "environment.json"}
    assert len(list((out / "checkpoints").iterdir())) == 2
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert all({"loss", "tokens_per_second", "mfu", "eta_seconds", "peak_bytes"} <= r.keys() for r in rows if "eval_loss" not in r)

    import transformers

    from lilliput.models.load import load_model

    ours, tokenizer, checkpoint = load_model(out / "model")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out / "model", dtype=torch.float32)
    tokens = torch.tensor([tokenizer.encode("the rope holds a giant")])
    torch.testing.assert_close(ours(tokens), theirs(tokens).logits, atol=1e-4, rtol=1e-4)
    assert checkpoint.lineage["evaluation"]["60"] == pytest.approx(result.eval_after)


def test_a_finished_run_is_not_run_again_and_more_steps_extend_it(text: Path, tmp_path: Path) -> None:
    first = run(text, tmp_path / "run", **{"train.schedule": "constant"})
    assert run(text, tmp_path / "run", **{"train.schedule": "constant"}) == first
    longer = {"train.schedule": "constant", "train.steps": "15"}
    assert run(text, tmp_path / "run", **longer).resumed_from == STEPS
    run(text, tmp_path / "whole", **longer)
    kept = [r for r in curve(tmp_path / "run") if r[1] is not None]
    assert kept == [r for r in curve(tmp_path / "whole") if r[1] is not None]


@pytest.mark.parametrize("room", ["offload.tile=8192", "offload.delay=3"])
def test_the_last_held_out_loss_is_that_of_the_model_that_is_written(room: str, text: Path, tmp_path: Path) -> None:
    """A delayed update is still on its way after the last step, and predicted weights are ahead of it."""
    more = dict([room.split("=")])
    first = run(text, tmp_path / "run", **more)
    again = {**more, "model": str(tmp_path / "run" / "model"), "train.init": "weights", "train.steps": "1"}
    assert run(text, tmp_path / "again", **again).eval_before == first.eval_after != first.eval_before


def test_micro_batches_do_not_change_the_step(text: Path, tmp_path: Path) -> None:
    plain = {"train.dropout": "0", "train.steps": "4"}
    run(text, tmp_path / "two", **plain, **{"train.micro_batch": "2"})
    run(text, tmp_path / "four", **plain, **{"train.micro_batch": "4"})
    two, four = ([r[1] for r in curve(tmp_path / name) if r[1] is not None] for name in ("two", "four"))
    assert len(two) == 4 and two == pytest.approx(four, rel=1e-5)


@pytest.mark.parametrize("room", ["lora.rank=4", "offload.tile=8192", "offload.delay=3", "qlora.rank=4", "remat.every=2", "remat.budget=40MB", "dtype=bf16",
                                  "fp8.scaling=amax", "paged.budget=5MB", "lora.rank=4 infinity.parameters=disk"])  # fmt: skip
def test_interrupted_runs_continue_bitwise(room: str, text: Path, tmp_path: Path) -> None:
    steps = {"train.steps": "8", "train.save_every": "0"} | dict(word.split("=") for word in room.split())
    if "disk" in room:
        steps["infinity.folder"] = str(tmp_path / "scratch")
    run(text, tmp_path / "whole", **steps)
    from lilliput.loops import train as module

    class Interrupted(module.Stop):
        asked = 0

        @property
        def requested(self) -> bool:
            Interrupted.asked += 1
            return Interrupted.asked == 5

        @requested.setter
        def requested(self, value: bool) -> None: ...

    from contextlib import contextmanager

    @contextmanager
    def after_five():
        yield Interrupted()

    original, module.stoppable = module.stoppable, after_five
    try:
        first = run(text, tmp_path / "parts", **steps)
    finally:
        module.stoppable = original
    assert first.interrupted and first.steps == 5 and not (tmp_path / "parts" / "model").exists()
    assert run(text, tmp_path / "parts", **steps).resumed_from == 5
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_sigint_saves_and_exits_with_130(text: Path, tmp_path: Path) -> None:
    process = spawn(text, tmp_path / "parts")
    wait_for_step(tmp_path / "parts", 4, process)
    process.send_signal(signal.SIGINT)
    _, talk = process.communicate(timeout=60)
    if process.returncode == 0:
        pytest.skip("the run ended before the signal arrived")
    assert process.returncode == 130 and "saved after step" in talk and "Traceback" not in talk
    run(text, tmp_path / "parts")
    run(text, tmp_path / "whole")
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_kill_minus_nine(text: Path, tmp_path: Path) -> None:
    run(text, tmp_path / "whole")
    kill_and_resume(text, tmp_path, tmp_path / "whole", trials=2, seed=1)


def test_kill_minus_nine_while_an_update_waits(text: Path, tmp_path: Path) -> None:
    run(text, tmp_path / "whole", **{"offload.delay": "3"})
    kill_and_resume(text, tmp_path, tmp_path / "whole", 1, 3, "offload.delay=3")


@pytest.mark.parametrize("tier", ["host", "disk"])
def test_sections_that_make_it_fit_are_chosen_once_and_pinned(tier: str, text: Path, tmp_path: Path) -> None:
    plain = run(text, tmp_path / "plain", **{"train.steps": "2"})
    assert plain.steps == 2
    more = {"memory.host": "100MB"} if tier == "host" else {"memory.host": "4MB", "memory.disk": str(tmp_path / "scratch")}
    limits = {"memory.device": "2.5MB", "train.steps": "6", "train.save_every": "3", **more}
    first = run(text, tmp_path / "run", **{**limits, "train.steps": "3", "train.schedule": "constant"})
    pinned = json.loads((tmp_path / "run" / "rooms.json").read_text())
    assert ("offload" in pinned or "infinity" in pinned) and first.steps == 3
    assert tier == "host" or any(file.suffix == ".bin" for file in (tmp_path / "scratch").iterdir())
    assert run(text, tmp_path / "run", **limits, **{"train.schedule": "constant"}).resumed_from == 3
    run(text, tmp_path / "whole", **limits, **{"train.schedule": "constant"})
    rows = [[r for r in curve(tmp_path / name) if r[1] is not None] for name in ("run", "whole")]
    assert rows[0] == rows[1] and len(rows[0]) == 6
    assert json.loads((tmp_path / "run" / "model" / "lilliput.json").read_text())["sections"].keys() == pinned.keys()
    with pytest.raises(DoesNotFit):
        run(text, tmp_path / "small", **{"memory.device": "10KB"})


def test_kill_minus_nine_with_everything_on_disk(text: Path, tmp_path: Path) -> None:
    run(text, tmp_path / "whole")
    disk = ("infinity.parameters=disk", "infinity.optimizer=disk", f"infinity.folder={tmp_path / 'scratch'}")
    kill_and_resume(text, tmp_path, tmp_path / "whole", 1, 5, *disk)
    run(text, tmp_path / "again", **dict(word.split("=") for word in disk))  # the run before has let go of its files
    assert_same_run(tmp_path / "whole", tmp_path / "again")


def test_kill_minus_nine_with_a_frozen_base_on_disk(text: Path, tmp_path: Path) -> None:
    run(text, tmp_path / "whole", **{"qlora.rank": "4"})
    kill_and_resume(text, tmp_path, tmp_path / "whole", 1, 7, "qlora.rank=4", "infinity.parameters=disk", f"infinity.folder={tmp_path / 'scratch'}")


@pytest.mark.slow
def test_kill_minus_nine_twenty_times(text: Path, tmp_path: Path) -> None:
    run(text, tmp_path / "whole")
    kill_and_resume(text, tmp_path, tmp_path / "whole", trials=20, seed=2)


LONG = {"data.sequence": "128", "train.micro_batch": "4", "train.tokens_per_step": "1024"}  # most bytes are activations, so that plans differ


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("more", ["remat", "poet poet.stages=4", "remat infinity.parameters=disk infinity.optimizer=disk", "remat offload.delay=3",
                                  "remat qlora.rank=4 paged.budget=64MB fp8.scaling=amax"])  # fmt: skip
def test_kill_minus_nine_of_planned_runs_ten_times(more: str, text: Path, tmp_path: Path) -> None:
    """A twentieth above the smallest budget that can be met, so that tensors are run again or paged, beside other sections."""
    room, *others = more.split()
    words = LONG | dict(word.split("=") for word in others)
    if "infinity" in more:
        words["infinity.folder"] = str(tmp_path / "scratch")
    with pytest.raises(DoesNotFit) as least:
        run(text, tmp_path / "least", **words, **{f"{room}.budget": "1B"})
    words[f"{room}.budget"] = f"{least.value.needs * 21 // 20}B"
    run(text, tmp_path / "whole", **words)
    assert json.loads((tmp_path / "whole" / "memory.json").read_text())["planner"] != "keep everything"
    kill_and_resume(text, tmp_path, tmp_path / "whole", 10, 3, *(f"{key}={value}" for key, value in words.items()))


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("more", ["fp8.scaling=amax", "paged.budget=5MB paged.scratch=FOLDER", "lora.rank=4 infinity.parameters=disk infinity.folder=FOLDER",
                                  "qlora.rank=4 paged.budget=64MB fp8.scaling=amax infinity.parameters=disk infinity.folder=FOLDER"])  # fmt: skip
def test_kill_minus_nine_of_other_sections_ten_times(more: str, text: Path, tmp_path: Path) -> None:
    words = more.replace("FOLDER", str(tmp_path / "scratch")).split()
    run(text, tmp_path / "whole", **dict(word.split("=") for word in words))
    if "5MB" in more:
        rows = (tmp_path / "whole" / "metrics.jsonl").read_text()
        assert all(json.loads(row)["evicted_bytes"] > 0 for row in rows.splitlines() if "evicted_bytes" in row), "pages leave in every step"
    kill_and_resume(text, tmp_path, tmp_path / "whole", 10, 11, *words)


def test_another_job_in_the_same_folder_is_refused_and_nothing_is_lost(text: Path, tmp_path: Path) -> None:
    run(text, tmp_path / "run")
    before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    with pytest.raises(UserError, match="holds another run"):  # a finished one as well
        run(text, tmp_path / "run", **{"train.lr": "1e-4"})
    (tmp_path / "run" / "result.json").unlink()
    with pytest.raises(UserError, match="holds another run") as caught:
        run(text, tmp_path / "run", **{"train.lr": "1e-4"})
    assert "train.lr: 0.003 -> 0.0001" in caught.value.why
    with pytest.raises(UserError, match="holds another run"):
        run(text, tmp_path / "run", model="gpt-nano")
    assert all(p.read_bytes() == data for p, data in before.items() if p.is_file() and p.name not in (".lock",))


def test_a_damaged_checkpoint_is_named(text: Path, tmp_path: Path) -> None:
    run(text, tmp_path / "run")
    (tmp_path / "run" / "result.json").unlink()
    victim = sorted((tmp_path / "run" / "checkpoints").iterdir())[-1] / "weights.safetensors"
    data = bytearray(victim.read_bytes())
    data[-5] ^= 1
    victim.write_bytes(data)
    with pytest.raises(UserError, match=r"weights\.safetensors is damaged"):
        run(text, tmp_path / "run")


@pytest.mark.parametrize(
    ("more", "what"),
    [
        ({"train.tokens_per_step": "100"}, "no multiple"),
        ({"data.sequence": "512"}, "longer than the model|too long"),
        ({"data.path": "nowhere/*.txt"}, "nowhere"),
        ({"data.path": ""}, "nothing to train on"),
        ({"train.init": "weights"}, "without weights"),
        ({"lora.targets": '["z_proj"]'}, "lora"),
        ({"remat.every": "9"}, "remat"),
        ({"model": "no-such-model"}, "no-such-model"),
    ],
    ids=lambda v: str(v) if isinstance(v, str) else next(iter(v)),
)
def test_bad_input(more: dict[str, str], what: str, text: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=what) as caught:
        run(text, tmp_path / "run", **more)
    assert caught.value.fix or caught.value.why


def test_conversations_score_the_answers_alone(tmp_path: Path) -> None:
    talk = [{"messages": [{"role": "user", "content": f"Who are you, {i}?"}, {"role": "assistant", "content": "A rope of Lilliput."}]} for i in range(40)]
    path = tmp_path / "talk.jsonl"
    path.write_text("\n".join(json.dumps(t) for t in talk))
    shipped = {"model": "lilliput-tiny", "data.tokenizer": "auto", "train.init": "weights"}
    result = run(path, tmp_path / "run", **shipped, **{"data.sequence": "64", "train.steps": "20"})
    assert result.eval_after < 0.5 * result.eval_before
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(0 < r["targets"] < 64 for r in rows if "targets" in r), "two conversations a step, only their answers are scored"


@pytest.mark.parametrize(
    ("content", "what"),
    [(b"", "empty"), (b"caf\xe9 \xff" * 9, "UTF-8"), (b'{"text": "a"}\n{"text": \n', "2"), (b'{"words": 1}\n', "words")],
    ids=["empty", "not utf-8", "broken line", "unknown shape"],
)
def test_bad_data_is_said_before_torch_is_loaded(content: bytes, what: str, tmp_path: Path) -> None:
    path = tmp_path / ("data.txt" if b"{" not in content else "data.jsonl")
    path.write_bytes(content)
    code = (
        "import sys\nfrom pathlib import Path\nfrom lilliput.base.errors import UserError\nfrom lilliput.base.job import Job\n"
        "from lilliput.base.show import Show\nfrom lilliput.loops.train import train\n"
        "try: train(Job.load(overrides=sys.argv[2:]), Path(sys.argv[1]), Show())\n"
        "except UserError as error: print(error); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "run"), *words(path)], capture_output=True, text=True, timeout=60)
    said, _, loaded = done.stdout.strip().rpartition("\n")
    assert what in said and loaded == "False", done.stdout + done.stderr


def test_a_full_disk_is_said_and_nothing_is_half_written(text: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    command = [sys.executable, "-m", "lilliput", "train", *words(text), "--out", str(out)]
    limited = f"ulimit -f 800; exec {shlex.join(command)}"  # no file over 800 KiB: the weights have 1.1 MB
    done = subprocess.run(["bash", "-c", limited], capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=120)
    assert done.returncode == 2 and "disk full while writing" in done.stderr and "Traceback" not in done.stderr
    assert not (out / "latest").exists() and not (out / "model").exists()
    assert list((out / "checkpoints").iterdir()) == []
    assert run(text, out).steps == STEPS, "with room on the disk the same command runs"


def test_what_does_not_fit_is_refused_before_it_starts(text: Path, tmp_path: Path) -> None:
    with pytest.raises(DoesNotFit) as caught:
        run(text, tmp_path / "run", model="llama-70b")
    assert caught.value.exit_code == 3 and "GiB" in caught.value.why
    assert not (tmp_path / "run" / "model").exists()


@pytest.mark.parametrize("room", ["remat.budget", "poet.budget"])
def test_a_run_keeps_the_plan_that_it_began_with(room: str, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans depend on measured speeds; a run that goes on reads its own. Two of them: a second micro-batch finds gradients there."""
    from lilliput.memory.planned import Planned

    with pytest.raises(DoesNotFit) as least:
        run(text, tmp_path / "none", **{room: "1KB"})
    budget = {room: f"{least.value.needs * 21 // 20}B", "train.save_every": "3"}  # the least that POET finds moves by 1 % with measured speeds
    run(text, tmp_path / "run", **budget, **{"train.steps": "6", "train.schedule": "constant"})
    plans = lambda: {file.name: {**json.loads(file.read_text()), "measured": None} for file in (tmp_path / "run").glob("memory*.json")}
    kept = plans()
    assert set(kept) == {"memory.json", "memory-2.json"}
    assert any(row.get("place") in ("recompute", "page") for plan in kept.values() for row in plan["rows"].values())
    made = Planned.__init__

    def never(self, objective, choose, *more) -> None:
        made(self, objective, lambda trace: pytest.fail("it was planned anew"), *more)

    monkeypatch.setattr(Planned, "__init__", never)
    run(text, tmp_path / "run", **budget, **{"train.steps": "9", "train.schedule": "constant"})
    assert plans() == kept
