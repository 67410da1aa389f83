"""What an update that comes one step late costs: held-out loss against the same run without a delay, by learning rate, first delayed step and seed.

    python benchmarks/delayed.py --data FILE [--lr 3e-4 1e-3] [--delay 40 250] [--seeds 3] [--steps 1000] [--beta1 0.9] [--schedule cosine]

Each line: the relative gap of the loss at the end, mean over seeds and its standard error, once as the paper has it and once with prediction. Runs of
one seed start from the same weights and see the same batches, so gaps are taken seed by seed. tiny is a Llama of 4 layers of 96; both sides are
ZeRO-Offload (bf16 weights, fp32 masters).
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import lilliput
from lilliput.base.show import Show


def loss(given: argparse.Namespace, lr: float, delay: int | str, predict: bool, seed: int) -> float:
    """Held-out loss after a run."""
    train = {"init": "scratch", "steps": given.steps, "tokens_per_step": 512, "micro_batch": 8, "warmup": 50, "lr": lr, "beta1": given.beta1,
             "schedule": given.schedule, "eval_tokens": 65536, "save_every": 0}  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        result = lilliput.train(model=given.model, data={"path": given.data, "tokenizer": "bytes", "sequence": 64}, train=train,
                                offload={"delay": delay, "predict": predict}, seed=seed, threads=1, out=Path(folder) / "run")  # fmt: skip
    return result.eval_after


def main() -> None:
    """Print a line for each rate and delay."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--lr", type=float, nargs="*", default=[3e-4, 1e-3])
    parser.add_argument("--delay", type=int, nargs="*", default=[40, 250])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--beta1", type=float, default=0.9)
    parser.add_argument("--schedule", default="cosine")
    given, show = parser.parse_args(), Show()
    for lr in given.lr:
        plain = [loss(given, lr, "off", False, seed) for seed in range(given.seeds)]
        show.line(f"lr {lr:g}, beta1 {given.beta1:g}, {given.schedule}, {given.steps} steps: off {statistics.mean(plain):.4f}")
        for delay in given.delay:
            for predict in (False, True):
                begin = time.perf_counter()
                late = [loss(given, lr, delay, predict, seed) for seed in range(given.seeds)]
                gaps = [b / a - 1 for a, b in zip(plain, late, strict=True)]
                error = statistics.stdev(gaps) / len(gaps) ** 0.5 if len(gaps) > 1 else 0.0
                how = f"from step {delay}{', predicted' if predict else ''}"
                show.line(f"  {how}: {statistics.mean(late):.4f}, {statistics.mean(gaps):+.2%} +- {error:.2%} ({time.perf_counter() - begin:.0f} s)")


if __name__ == "__main__":
    main()
