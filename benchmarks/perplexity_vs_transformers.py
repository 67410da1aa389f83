"""Perplexity: Lilliput's evaluation against transformers' own loss, same weights, same windows.

    make bench X=perplexity_vs_transformers ARGS="wiki.test.raw --windows 40"
    make bench X=perplexity_vs_transformers ARGS="notes.txt --model lilliput-tiny --window 128 --stride 32"

transformers computes by the recipe of its perplexity guide: model(input_ids, labels=...).loss, labels of tokens that
were scored before set to -100. Windows are interleaved, so that both sides see the same load. Exit code 1 when the two
perplexities differ by more than 0.1 %.
"""

from __future__ import annotations

import argparse
import math
import os
import time

import torch
from twins import transformers_twin

from lilliput.base.hardware import cpus
from lilliput.base.show import Show
from lilliput.loops.evaluate import perplexity, read_text, spans
from lilliput.models.load import load_model

ALLOWED = 1e-3  # relative difference of the perplexities


def main() -> int:
    """Measure, print a table, and say whether the two agree."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", help="a text file; .raw is read as WikiText's rows")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--stride", type=int, default=0, help="0 = the window")
    parser.add_argument("--windows", type=int, default=10, help="at most; 0 = all")
    parser.add_argument("--threads", type=int, default=cpus())
    asked = parser.parse_args()
    stride, show = asked.stride or asked.window, Show()
    torch.set_num_threads(asked.threads)
    model, tokenizer, _ = load_model(asked.model, "cpu")
    twin = transformers_twin(model)
    ids = tokenizer.encode(read_text(asked.text))
    windows = list(spans(len(ids), asked.window, stride))[: asked.windows or None]
    sums = {"lilliput": [0.0, 0, 0.0], "transformers": [0.0, 0, 0.0]}  # nats, tokens, seconds
    with show.bar(len(windows), "windows") as bar:
        for index, (begin, _, end) in enumerate(windows):
            done = windows[index - 1][2] if index else begin
            rounds = {"lilliput": lambda b=begin, e=end, d=done: ours(model, ids[b:e], e - max(d, b + 1)), "transformers": lambda b=begin, e=end, d=done: theirs(twin, ids[b:e], d - b)}
            for name in rounds if index % 2 else reversed(rounds):
                started = time.perf_counter()
                nats, count = rounds[name]()
                sums[name] = [a + b for a, b in zip(sums[name], (nats, count, time.perf_counter() - started))]
            bar.advance()
    rows = [{"side": n, "nll": nats / k, "perplexity": math.exp(nats / k), "scored": k, "tokens/s": k / s} for n, (nats, k, s) in sums.items()]
    show.table([row | {"nll": f"{row['nll']:.5f}", "perplexity": f"{row['perplexity']:.4f}"} for row in rows], tuple(rows[0]), f"{asked.model}, {len(windows)} windows of {asked.window}, stride {stride}")
    ratio = rows[0]["perplexity"] / rows[1]["perplexity"]
    show.line(f"ratio of perplexities {ratio:.6f} (allowed 1 +- {ALLOWED}); {asked.threads} threads, load {os.getloadavg()[0]:.1f}")
    return 0 if abs(ratio - 1) <= ALLOWED and rows[0]["scored"] == rows[1]["scored"] else 1


def ours(model: torch.nn.Module, ids: list[int], scored: int) -> tuple[float, int]:
    """(nats, tokens) of the last `scored` tokens of one window."""
    whole = perplexity(model, ids, window=len(ids))
    if scored == whole.scored:
        return whole.nll * whole.scored, whole.scored
    fewer = perplexity(model, ids, window=len(ids) - scored)
    return whole.nll * whole.scored - fewer.nll * fewer.scored, scored


@torch.inference_mode()
def theirs(twin: torch.nn.Module, ids: list[int], before: int) -> tuple[float, int]:
    """(nats, tokens) of one window whose first `before` tokens were scored earlier."""
    tokens = torch.tensor([ids])
    labels = tokens.clone()
    labels[:, :before] = -100
    count = int((labels[:, 1:] != -100).sum())
    return float(twin(tokens, labels=labels).loss) * count, count


if __name__ == "__main__":
    raise SystemExit(main())
