"""The main job, end to end on a real model: plan, chat, serve, evaluate, fine-tune, evaluate, chat again from the saved folder.

Each stage is one function that takes and extends the same `Demo`; a new stage is one function and one name in STAGES.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import lilliput
from lilliput.base.show import Show

QUESTION = "Why is the sky blue?"
PROMPT = "ROMEO:\nBut, soft! what light through yonder"


@dataclass
class Demo:
    """What the stages share."""

    model: str
    out: Path
    short: bool
    show: Show
    rows: list[dict[str, str]] = field(default_factory=list)

    def job(self) -> lilliput.Job:
        """Fine-tune on plays, with low-rank updates."""
        steps = 6 if self.short else 30
        return lilliput.Job.load(
            model=self.model,
            data={"path": "data:shakespeare", "sequence": 128, "holdout": 0.02},
            train={"steps": steps, "tokens_per_step": 512, "lr": 2e-3, "warmup": 3, "eval_tokens": 1024 if self.short else 4096, "save_every": 0},
            lora={"rank": 8, "alpha": 16},
        )


def pull(demo: Demo) -> str:
    """Fetch the model and the text (the only stage that may use the network)."""
    path = lilliput.pull(demo.model)
    lilliput.pull("data:shakespeare")
    return f"{path.name}"


def plan(demo: Demo) -> str:
    """Predict the memory of the fine-tuning job before anything is loaded."""
    estimate = lilliput.plan(demo.job())
    return f"{estimate.peak / 2**20:,.0f} MiB predicted, {'fits' if estimate.fits else 'does not fit'}"


def chat(demo: Demo) -> str:
    """Ask the model as it comes."""
    return lilliput.load(demo.model).chat(QUESTION, max_tokens=32).strip()


def serve(demo: Demo) -> str:
    """Serve it, ask by OpenAI's client, then 16 requests at once."""
    import json
    import signal
    import subprocess
    from concurrent.futures import ThreadPoolExecutor

    import openai

    command = [sys.executable, "-m", "lilliput", "serve", demo.model, "--json", "http.port=0"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert server.stdout is not None, "its stdout was asked for"
    try:
        told = ""
        while not told.endswith("\n}\n"):
            line = server.stdout.readline()
            if not line:
                raise SystemExit(f"the server did not start: {told}")
            told += line
        client = openai.OpenAI(base_url=json.loads(told)["url"] + "/v1", api_key="none")
        question = [{"role": "user", "content": QUESTION}]
        answer = client.chat.completions.create(model=demo.model, messages=question, temperature=0, max_tokens=32)  # type: ignore[arg-type]
        tokens = 32 if demo.short else 64

        def complete(number: int) -> int:
            done = client.completions.create(model=demo.model, prompt=f"{number} {PROMPT}", max_tokens=tokens, temperature=0, extra_body={"ignore_eos": True})
            return done.usage.completion_tokens if done.usage else 0

        started = time.monotonic()
        with ThreadPoolExecutor(16) as pool:
            count = sum(pool.map(complete, range(16)))
        speed = count / (time.monotonic() - started)
    finally:
        server.send_signal(signal.SIGTERM)
        code = server.wait(60)
    if code:
        raise SystemExit(f"the server ended with {code}")
    return f"{(answer.choices[0].message.content or '').strip()}  |  16 at once: {speed:,.0f} tok/s"


def fine_tune(demo: Demo) -> str:
    """Train on the plays; held-out perplexity before and after."""
    import math

    result = lilliput.train(demo.job(), out=demo.out)
    before, after = math.exp(result.eval_before), math.exp(result.eval_after)
    if not after < before:
        raise SystemExit(f"the fine-tuned model is no better: held-out perplexity {before:.2f} -> {after:.2f}")
    speed = f"{result.tokens_per_second:,.0f} tok/s"
    return f"loss {result.loss_first:.3f} -> {result.loss_last:.3f}, held-out perplexity {before:.2f} -> {after:.2f}, {speed}"


def chat_again(demo: Demo) -> str:
    """Load the folder that training wrote, and let it go on with a play and answer the question again."""
    tuned = lilliput.load(str(demo.out / "model"))
    verse = tuned.generate(PROMPT, max_tokens=24)
    answer = tuned.chat(QUESTION, max_tokens=32).strip()
    return f"{PROMPT.splitlines()[-1]}{verse}".replace("\n", " / ") + f"  |  {answer}"


STAGES = (pull, plan, chat, serve, fine_tune, chat_again)


def main() -> int:
    """Run the stages in order and print the final table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--short", action="store_true", help="fewer steps (continuous integration)")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--out", type=Path, default=Path("runs/demo"))
    arguments = parser.parse_args()
    shutil.rmtree(arguments.out, ignore_errors=True)
    demo = Demo(arguments.model, arguments.out, arguments.short, Show())
    for number, stage in enumerate(STAGES, 1):
        name = stage.__name__.replace("_", " ")
        demo.show.line(f"[{number}/{len(STAGES)}] {name}: {(stage.__doc__ or '').strip()}")
        started = time.monotonic()
        result = stage(demo)
        demo.rows.append({"stage": name, "result": result, "seconds": f"{time.monotonic() - started:.1f}"})
    demo.show.table(demo.rows, ("stage", "result", "seconds"), "Lilliput demo")
    return 0


if __name__ == "__main__":
    sys.exit(main())
