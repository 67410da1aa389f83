"""Cache policies on a real model: what evicting costs in perplexity, whether a stream stays flat, what a token costs at long contexts.

    make bench X=cache_policies ARGS="quality wikitext-2/test.txt"        full, heavy hitters, sinks, windows at one budget
    make bench X=cache_policies ARGS="stream novel.txt --tokens 100000"   sinks and a plain window against recomputing the window
    make bench X=cache_policies ARGS="speed"                              tokens a second at 512 to 8,000 tokens of context
    make bench X=cache_policies ARGS="anew"                               a token through sinks against the window computed anew for it
    make bench X=cache_policies ARGS="choices FOLDER --budget 96"         multiple choice behind solved examples that do not fit the budget

Everything runs through the engine, as in serving: prompts are scored while tokens leave. Perplexities are deterministic up to rounding.
"""

from __future__ import annotations

import argparse
import gzip
import math
import statistics
import time
from pathlib import Path
from typing import Any

import torch

import lilliput
from lilliput.base.hardware import cpus
from lilliput.base.show import Show
from lilliput.loops.evaluate import read_text
from lilliput.loops.likelihood import Score, encode_pair
from lilliput.loops.tasks import judge, read_questions
from lilliput.ops import native
from lilliput.serve.request import Sampling

SCORE = Sampling(1, prompt_logprobs=0, ignore_eos=True)


def logprobs(engine: Any, *texts: list[int]) -> list[list[float]]:
    """Of tokens 1 ... of each text; they run in one batch."""
    return [[scored.logprob for scored in done.prompt_logprobs[1:]] for done in engine.generate(list(texts), SCORE)]


def engine(args: argparse.Namespace, policy: str, tokens: int) -> Any:
    return lilliput.load(args.model, runner="native", weights=args.weights, policy=policy, kv=args.kv, kv_tokens=tokens).engine


def quality(args: argparse.Namespace, show: Show) -> list[dict[str, Any]]:
    """Perplexity over segments of the text, each from an empty cache."""
    rows, size = [], args.budget
    policies = ["full", f"heavy_hitter:{size // 2}+{size - size // 2}", f"sinks:4+{size - 4}", f"sinks:0+{size}", f"sliding:{size}"]
    ids = lilliput.load(args.model).tokenizer.encode(read_text(args.text))
    for policy in policies:
        one = engine(args, policy, args.segment + 64)
        found = [logprobs(one, ids[i * args.segment : (i + 1) * args.segment])[0] for i in range(args.segments)]
        nll = [-x for part in found for x in part]
        tail = [-x for part in found for x in part[args.segment // 2 :]]
        most = size if policy != "full" else args.segment
        rows.append({"policy": policy, "perplexity": round(math.exp(statistics.fmean(nll)), 2), "second half": round(math.exp(statistics.fmean(tail)), 2),
                     "cache bytes": most * one.runner.store.bytes_per_token})  # fmt: skip
        show.line(f"{policy}: {rows[-1]['perplexity']}")
    return rows


def stream(args: argparse.Namespace, show: Show) -> list[dict[str, Any]]:
    """Perplexity of each stretch of 4,096 tokens; beside it, at sampled places, that of the window computed anew."""
    size, stretch = args.budget, 4096
    data = Path(args.text).read_bytes()
    raw = (gzip.decompress(data) if args.text.endswith(".gz") else data).decode()
    model = lilliput.load(args.model, weights=args.weights)
    ids = model.tokenizer.encode(raw)[: args.tokens]
    sides = {}
    for policy in (f"sinks:4+{size - 4}", f"sinks:0+{size}"):
        start = time.perf_counter()
        (sides[policy],) = logprobs(engine(args, policy, size), ids)
        show.line(f"{policy}: {len(ids) / (time.perf_counter() - start):,.0f} tokens/s")
    again, rows = lilliput.load(args.model, runner="native", weights=args.weights, kv=args.kv), []
    for first in range(0, len(ids) - stretch + 1, stretch):
        places = [max(size, first) + i * (stretch - max(0, size - first)) // args.samples for i in range(args.samples)]
        windows = torch.tensor([ids[at - size + 8 : at] for at in places])  # 248 tokens: what the cache holds on average
        with torch.inference_mode():
            logits = again.module.head(again.module.hidden(windows)[:, -1])
        anew = logits.log_softmax(-1)[torch.arange(len(places)), torch.tensor([ids[at] for at in places])]
        row: dict[str, Any] = {"tokens": f"{first:,}-{first + stretch:,}"}
        for policy, found in sides.items():
            row[policy] = round(math.exp(-statistics.fmean(found[first : first + stretch])), 2)
        for policy, found in sides.items():
            row[f"{policy} / anew"] = round(math.exp(float(anew.mean()) - statistics.fmean(found[at - 1] for at in places)), 3)
        rows.append(row)
        show.line(", ".join(f"{key} {value}" for key, value in row.items()))
    return rows


def speed(args: argparse.Namespace, show: Show) -> list[dict[str, Any]]:
    """Decoding, one sequence and eight, in turns; medians."""
    rows, size = [], args.budget
    policies = ["full", f"heavy_hitter:{size // 2}+{size // 2}", f"sinks:4+{size - 4}"]
    engines = {policy: engine(args, policy, 8 * 8192) for policy in policies}
    for batch in (1, 8):
        for context in (512, 2048, 8000):
            row: dict[str, Any] = {"sequences": batch, "context": context}
            rates: dict[str, list[float]] = {policy: [] for policy in policies}
            for one in engines.values():
                for b in range(batch):
                    one.add([1000 + (i * 7 + b) % 5000 for i in range(context)], Sampling(args.rounds * 8 + 40, ignore_eos=True))
                while any(not answer.tokens for answer in one._answers.values()):
                    one.step()
            for _ in range(args.rounds):
                for policy, one in engines.items():
                    start = time.perf_counter()
                    for _ in range(8):
                        one.step()
                    rates[policy].append(8 * batch / (time.perf_counter() - start))
            for policy, one in engines.items():
                row[policy] = round(statistics.median(rates[policy]), 1)
                for id in list(one._requests):
                    one.cancel(id)
                one.step()
            rows.append(row)
            show.line(", ".join(f"{key} {value}" for key, value in row.items()))
    return rows


def anew(args: argparse.Namespace, show: Show) -> list[dict[str, Any]]:
    """Milliseconds of a token in a full rolling cache, and of computing as long a window from scratch, in turns; medians."""
    rows, again = [], lilliput.load(args.model, runner="native", weights=args.weights, kv=args.kv)
    for size in (256, 512, 1024):
        one, times = engine(args, f"sinks:4+{size - 4}", size + 64), []
        one.add([1000 + i * 7 % 5000 for i in range(size + 64)], Sampling(args.rounds * 8 + 40, ignore_eos=True))
        while any(not answer.tokens for answer in one._answers.values()):
            one.step()
        window = torch.tensor([[1000 + i * 7 % 5000 for i in range(size)]])
        for _ in range(args.rounds):
            start = time.perf_counter()
            for _ in range(8):
                one.step()
            middle = time.perf_counter()
            with torch.inference_mode():
                again.module.head(again.module.hidden(window)[:, -1])
            times.append(((middle - start) / 8 * 1e3, (time.perf_counter() - middle) * 1e3))
        rows.append({"cache": size, "sinks, ms": round(statistics.median(a for a, _ in times), 2), "anew, ms": round(statistics.median(b for _, b in times), 1),
                     "ratio": round(statistics.median(b / a for a, b in times), 1)})  # fmt: skip
        show.line(", ".join(f"{key} {value}" for key, value in rows[-1].items()))
    return rows


def choices(args: argparse.Namespace, show: Show) -> list[dict[str, Any]]:
    """Accuracy and its standard error on questions of several tasks, each behind the same solved examples; what the budget cannot hold leaves while they
    are read. The last columns: how much more often heavy hitters are right than the window, on the same questions."""
    rows, size = [], args.budget
    tokenizer = lilliput.load(args.model).tokenizer
    hitters, window = f"heavy_hitter:{size // 2}+{size // 2}", f"sliding:{size}"
    for task in args.tasks:
        read = read_questions(task, args.text, args.shots + args.questions)
        solved, asked = read[: args.shots], read[args.shots :]
        before = "".join(f"{context}{continuation}\n\n" for context, continuation in (one.choices[one.answer] for one in solved))
        pairs = [[encode_pair(tokenizer, before + context, continuation) for context, continuation in one.choices] for one in asked]
        read_each = round(statistics.fmean(len(p.context) + len(p.continuation) for four in pairs for p in four))
        row: dict[str, Any] = {"task": task, "questions": len(asked), "tokens": read_each}
        hits: dict[str, list[list[float]]] = {}
        for policy in (*(() if args.two else ("full", f"sinks:4+{size - 4}")), hitters, window):
            one, start = engine(args, policy, 32 * size if policy != "full" else 16 * 512), time.perf_counter()
            scores = []
            for at in range(0, len(pairs), args.at_once):
                some = [p for four in pairs[at : at + args.at_once] for p in four]
                sums = iter(sum(all_[-len(p.continuation) :]) for p, all_ in zip(some, logprobs(one, *([*p.context, *p.continuation] for p in some))))
                scores += [[Score(next(sums), False) for _ in four] for four in pairs[at : at + args.at_once]]
            row[policy] = " / ".join(f"{value:.3f} ± {error:.3f}" for value, error in judge(task, args.text, asked, scores).metrics.values())
            each = [judge(task, args.text, [question], [score]).metrics.values() for question, score in zip(asked, scores)]
            hits[policy] = [[value for value, _ in metrics] for metrics in each]
            show.line(f"{task}, {policy}: {row[policy]}; {read_each * sum(map(len, pairs)) / (time.perf_counter() - start):,.0f} tokens/s")
        more = [[a - b for a, b in zip(*both)] for both in zip(hits[hitters], hits[window])]
        spread = lambda values: statistics.stdev(values) / len(values) ** 0.5
        row["hitters - window"] = " / ".join(f"{statistics.fmean(column):+.3f} ± {spread(column):.3f}" for column in zip(*more))
        rows.append(row)
    return rows


def main() -> int:
    """Measure and print a table."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("what", choices=("quality", "stream", "speed", "anew", "choices"))
    options.add_argument("text", nargs="?", default="")
    options.add_argument("--model", default="smollm2-135m")
    options.add_argument("--weights", default="file")
    options.add_argument("--kv", default="fp32")
    options.add_argument("--budget", type=int, default=256)
    options.add_argument("--segment", type=int, default=1024)
    options.add_argument("--segments", type=int, default=4)
    options.add_argument("--tokens", type=int, default=100_000)
    options.add_argument("--samples", type=int, default=64)
    options.add_argument("--rounds", type=int, default=7)
    options.add_argument("--shots", type=int, default=8, help="solved examples before each question")
    options.add_argument("--tasks", nargs="+", default=["arc_easy", "piqa", "openbookqa"])
    options.add_argument("--questions", type=int, default=100, help="of each task; more than there are: all")
    options.add_argument("--two", action="store_true", help="of choices: only heavy hitters and the window")
    options.add_argument("--at-once", type=int, default=6, help="questions in a batch")
    options.add_argument("--json", action="store_true")
    args = options.parse_args()
    show = Show(json=args.json)
    torch.set_num_threads(cpus())
    native.threads(cpus())
    rows = {"quality": quality, "stream": stream, "speed": speed, "anew": anew, "choices": choices}[args.what](args, show)
    show.data({"arguments": vars(args), "rows": rows})
    show.table(rows, tuple(rows[0]), f"{args.model}, {args.what}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
