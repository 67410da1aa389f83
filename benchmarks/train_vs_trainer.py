"""Training tokens/s: Lilliput's loop against transformers' Trainer, same Llama, same batch, same optimizer, interleaved.

    make bench X=train_vs_trainer            (ARGS="--rounds 5 --steps 12" by default)

Each round trains both from scratch for a few steps; a side's figure is the median step time of its round, first two
steps left out. Both sides: fp32, fused AdamW, gradient clipping 1.0, the same number of threads, Trainer with logging,
saving and evaluation off. Prints the share of the measured fp32 matrix-product peak, the ratio, and the load average.
"""

from __future__ import annotations

import argparse
import io
import json
import logging
import os
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import transformers

from lilliput.base.job import Job
from lilliput.base.show import Show
from lilliput.loops.train import train
from lilliput.models import families, sizes
from lilliput.models.facts import facts

SEQUENCE, SEQUENCES, MICRO = 256, 16, 16


def text_file(folder: Path) -> Path:
    """A megabyte of random letters: what is measured is speed."""
    generator = np.random.default_rng(0)
    path = folder / "letters.txt"
    path.write_text("".join(generator.choice(list("abcdefghijklmnopqrstuvwxyz \n"), 1_000_000)))
    return path


def ours(data: Path, folder: Path, steps: int, preset: str) -> float:
    """Median seconds of a step."""
    job = Job.load(
        model=preset,
        data={"path": str(data), "tokenizer": "chars", "sequence": SEQUENCE},
        train={"init": "scratch", "steps": steps, "tokens_per_step": SEQUENCE * SEQUENCES, "micro_batch": MICRO, "eval_tokens": SEQUENCE, "save_every": 0},
    )
    train(job, folder, Show(json=True, err=io.StringIO()))
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return statistics.median([r["seconds"] for r in rows if "seconds" in r][2:])


class Letters(torch.utils.data.Dataset):
    """The same kind of data for the Trainer."""

    def __init__(self, vocab: int) -> None:
        self.tokens = torch.randint(0, vocab, (4096, SEQUENCE), generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.tokens[index], "labels": self.tokens[index]}


class Clock(transformers.TrainerCallback):
    """Time between the ends of steps."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, *arguments: object, **keywords: object) -> None:
        """Called after each optimizer step."""
        self.ends.append(time.perf_counter())


def theirs(vocab: int, folder: Path, steps: int, preset: str) -> float:
    """Median seconds of a step of the Trainer."""
    from dataclasses import replace

    config = transformers.LlamaConfig(**families.hf_from_spec(replace(sizes.PRESETS[preset], vocab=vocab)))
    model = transformers.LlamaForCausalLM(config)
    arguments = transformers.TrainingArguments(
        str(folder), max_steps=steps, per_device_train_batch_size=SEQUENCES, optim="adamw_torch_fused", max_grad_norm=1.0, report_to=[],
        save_strategy="no", logging_strategy="no", disable_tqdm=True, use_cpu=True, dataloader_pin_memory=False, learning_rate=3e-4,
    )  # fmt: skip
    clock = Clock()
    transformers.Trainer(model, arguments, train_dataset=Letters(vocab), callbacks=[clock]).train()
    return statistics.median(b - a for a, b in zip(clock.ends[1:], clock.ends[2:]))


def peak() -> float:
    """Flop/s of one fp32 matrix product, best of a few."""
    a, b = torch.randn(1024, 1024), torch.randn(1024, 1024)
    best = float("inf")
    for _ in range(10):
        begin = time.perf_counter()
        a @ b
        best = min(best, time.perf_counter() - begin)
    return 2 * 1024**3 / best


def main() -> None:
    """Interleave the rounds and print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--preset", default="llama-3m")
    arguments = parser.parse_args()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    threads = len(os.sched_getaffinity(0))
    torch.set_num_threads(threads)
    pairs, vocab = [], 28
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = text_file(folder)
        for round_number in range(arguments.rounds):
            first = ours(data, folder / f"ours-{round_number}", arguments.steps, arguments.preset)
            pairs.append((first, theirs(vocab, folder / "theirs", arguments.steps, arguments.preset)))
    tokens = SEQUENCE * SEQUENCES
    a, b = (statistics.median(p[i] for p in pairs) for i in (0, 1))
    flops = 3 * facts(sizes.PRESETS[arguments.preset]).flops(tokens, SEQUENCE)
    top = peak()
    show = Show()
    rows = [
        {"side": "Lilliput", "tokens/s": f"{tokens / a:,.0f}", "share of the fp32 peak": f"{flops / a / top:.0%}"},
        {"side": f"transformers {transformers.__version__} Trainer", "tokens/s": f"{tokens / b:,.0f}", "share of the fp32 peak": f"{flops / b / top:.0%}"},
    ]
    show.table(rows, ("side", "tokens/s", "share of the fp32 peak"), f"{arguments.preset}: {SEQUENCES} x {SEQUENCE} tokens a step, {threads} threads")
    ratio = statistics.median(t / o for o, t in pairs)
    each = ", ".join(f"{t / o:.2f}" for o, t in pairs)
    show.line(f"ratio {ratio:.2f} (median of {len(pairs)} pairs: {each}); peak {top / 1e9:.0f} GFLOP/s; load {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
