"""Tokens/s of greedy answers: Lilliput's engine against transformers' generate, same weights, same threads, interleaved.

    make bench X=decode_vs_transformers            (ARGS="--model smollm2-135m --batch 1 4 16 --rounds 5" by default)

Each round times both sides once for every batch size: prompts of 32 random tokens, 48 new ones each, the prompt's
forward included. Figures are medians; the ratio is the median of the rounds' ratios, for other processes hit both sides
of a round alike. A preset name measures random weights of that shape: the speed is the same.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import time
from collections.abc import Callable

import torch
import transformers
from twins import greedy, transformers_twin

from lilliput.base import hardware
from lilliput.base.show import Show
from lilliput.data.tokenizer import Tokenizer
from lilliput.models.load import load_model
from lilliput.serve.engine import Engine
from lilliput.serve.request import Sampling


def seconds(run: Callable[[], object]) -> float:
    """Wall time of one call."""
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def rounds(engine: Engine, twin: transformers.PreTrainedModel, prompts: list[list[int]], new: int, count: int) -> list[tuple[float, float]]:
    """(our seconds, their seconds) of each round."""
    how = Sampling(new, ignore_eos=True)
    return [(seconds(lambda: engine.generate(prompts, how)), seconds(lambda: greedy(twin, prompts, new))) for _ in range(count)]


def main() -> None:
    """Measure and print the table."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--model", default="smollm2-135m")
    options.add_argument("--batch", type=int, nargs="+", default=[1, 4, 16])
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--prompt", type=int, default=32)
    options.add_argument("--new", type=int, default=48)
    options.add_argument("--threads", type=int, default=hardware.cpus())
    options.add_argument("--json", action="store_true")
    args = options.parse_args()
    show = Show(json=args.json)
    torch.set_num_threads(args.threads)
    model, _, _ = load_model(args.model)
    twin = transformers_twin(model)
    draw, how, rows = random.Random(0), Sampling(args.new, ignore_eos=True), []
    for batch in args.batch:
        prompts = [[draw.randrange(3, model.spec.vocab) for _ in range(args.prompt)] for _ in range(batch)]
        engine = Engine(model, Tokenizer.bytes_(), kv_tokens=batch * (args.prompt + args.new + 16))
        same = [list(done.tokens) for done in engine.generate(prompts, how)] == greedy(twin, prompts, args.new)  # also the warm-up
        pairs = rounds(engine, twin, prompts, args.new, args.rounds)
        ours, theirs = (batch * args.new / statistics.median(side) for side in zip(*pairs))
        ratio = statistics.median(theirs / ours for ours, theirs in pairs)
        rows.append({"batch": batch, "lilliput tok/s": ours, "transformers tok/s": theirs, "ratio": ratio, "same tokens": same, "load": os.getloadavg()[0]})
    show.data({"model": args.model, "threads": args.threads, "torch": torch.__version__, "rows": rows})
    show.table(rows, tuple(rows[0]), f"{args.model}, {args.threads} threads, prompt {args.prompt} + {args.new} new tokens, median of {args.rounds} rounds")


if __name__ == "__main__":
    main()
