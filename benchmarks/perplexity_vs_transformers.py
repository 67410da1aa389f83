"""Perplexity: Lilliput's evaluation against transformers' own loss, same weights, same windows.

    make bench X=perplexity_vs_transformers ARGS="wiki.test.raw --windows 40"
    make bench X=perplexity_vs_transformers ARGS="notes.txt --model lilliput-tiny --window 128 --stride 32"

transformers computes by the recipe of its own perplexity guide: model(input_ids, labels=...).loss, where labels of
tokens that were scored before are -100. Exit code 1 when the perplexities differ by more than 0.1 %, or the numbers of
scored tokens at all. The speeds are those of one run each, one after the other.
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
from lilliput.loops.evaluate import perplexity, read_text
from lilliput.models.load import load_model

ALLOWED = 1e-3  # relative difference of the perplexities


@torch.inference_mode()
def theirs(twin: torch.nn.Module, ids: list[int], window: int, stride: int, windows: int, show: Show) -> tuple[float, int]:
    """(mean nats, scored tokens) by the guide's loop: windows side by side leave a rest out, sliding ones end with the text."""
    total, scored, done = 0.0, 0, 0
    starts = [b for b in range(0, len(ids), stride) if b + window <= len(ids) or (stride < window and b + window < len(ids) + stride)] or [0]
    with show.bar(len(starts[:windows]), "transformers") as bar:
        for begin in starts[:windows]:
            end = min(begin + window, len(ids))
            tokens = torch.tensor([ids[begin:end]])
            labels = tokens.clone()
            labels[:, : max(0, done - begin)] = -100
            count = int((labels[:, 1:] != -100).sum())
            total, scored, done = total + float(twin(tokens, labels=labels).loss) * count, scored + count, end
            bar.advance(1, f"perplexity {math.exp(total / scored):.3f}")
    return total / scored, scored


def main() -> int:
    """Measure, print a table, and say whether the two agree."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("text", help="a text file; .raw is read as WikiText's rows")
    options.add_argument("--model", default="smollm2-135m")
    options.add_argument("--window", type=int, default=1024)
    options.add_argument("--stride", type=int, default=0, help="0 = the window")
    options.add_argument("--windows", type=int, default=10)
    options.add_argument("--threads", type=int, default=cpus())
    options.add_argument("--json", action="store_true")
    args = options.parse_args()
    show, stride = Show(json=args.json), args.stride or args.window
    torch.set_num_threads(args.threads)
    model, tokenizer, _ = load_model(args.model, "cpu")
    twin = transformers_twin(model)
    ids = tokenizer.encode(read_text(args.text))
    begin = time.perf_counter()
    ours = perplexity(model, ids, window=args.window, stride=stride, batch=1, limit=args.windows, show=show)
    between = time.perf_counter()
    nll, scored = theirs(twin, ids, args.window, stride, args.windows, show)
    spent = {"lilliput": between - begin, "transformers": time.perf_counter() - between}
    figures = {"lilliput": (ours.nll, ours.scored), "transformers": (nll, scored)}
    rows = [{"side": n, "nll": f"{x:.5f}", "perplexity": f"{math.exp(x):.4f}", "scored": k, "tokens/s": k / spent[n]} for n, (x, k) in figures.items()]
    ratio = math.exp(ours.nll - nll)
    show.data({"model": args.model, "windows": ours.windows, "window": args.window, "stride": stride, "ratio": ratio, "rows": rows})
    show.table(rows, tuple(rows[0]), f"{args.model}, {ours.windows} windows of {args.window}, stride {stride}, of {len(ids):,} tokens")
    show.line(f"ratio of the perplexities {ratio:.6f} (allowed: 1 +- {ALLOWED}); {args.threads} threads, load {os.getloadavg()[0]:.1f}")
    return 0 if abs(ratio - 1) <= ALLOWED and ours.scored == scored else 1


if __name__ == "__main__":
    raise SystemExit(main())
