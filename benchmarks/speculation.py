"""Guesses against none: text that repeats itself, and text that does not; batches of 1 to 16. How many guesses are accepted.

    make bench X=speculation                                                                        prompt lookup
    make bench X=speculation ARGS="--draft layers:15"                                               the first layers
    make bench X=speculation ARGS="--model lilliput-tiny --draft lilliput-tiny-draft --rows 1"      a smaller model
    make bench X=speculation ARGS="--acceptance --model lilliput-tiny --draft lilliput-tiny-draft"  tokens a pass against the paper's formula

Both sides answer the same prompts, SLICE steps of one and SLICE of the other in turns, so that a busy neighbour is none's advantage, every other pair in the
other order; a ratio is the median of the pairs'. One pair before is not counted. Prompts are read before, and time is taken as long as all sequences
run: behind the first that ends, a batch is smaller than what it is called, and a server would have begun another.
Tokens are compared where they must be the same: always but for guesses that are drawn.

--acceptance fixes the number of guesses gamma. (1 - alpha^(gamma + 1)) / (1 - alpha) tokens a pass are expected with alpha = accepted of those judged in
the same passes, and with the alpha of single guesses (gamma = 1). "By place": of passes whose guesses before were right, how many had the next right;
equal numbers where guesses are independent, as the formula supposes.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from typing import Any

import torch

import lilliput
from lilliput.base.hardware import cpus
from lilliput.base.show import Show
from lilliput.loops.bench import machine
from lilliput.ops import native
from lilliput.serve.request import Sampling
from lilliput.serve.speculative import expected_tokens

SLICE = 8
LIST = [f'{{"id": {i}, "name": "item {i}", "price": {i * 3 % 17}.50, "in_stock": true, "tags": ["a", "b"]}},\n' for i in range(8)]
PROSE = ["The harbour was quiet that morning, and", "In the year the river froze, my grandfather", "Nobody in the office had ever asked why",
         "A good loaf of bread begins"]  # fmt: skip


def pair(sides: dict[str, Any], texts: list[str], how: Sampling) -> tuple[dict[str, float], list[Any]]:
    """Seconds a token of each side from its prompts' end to the end of the first answer, and the answers of both."""
    took, tokens, done, asked = dict.fromkeys(sides, 0.0), dict.fromkeys(sides, 0), {name: list[Any]() for name in sides}, {}
    for name, engine in sides.items():
        asked[name] = [engine.add(engine.tokenizer.encode(text, special=True), how) for text in texts]
        while not all(answer.tokens for answer in engine._answers.values()):
            done[name] += engine.step()
    while any(engine.busy for engine in sides.values()):
        for name, engine in sides.items():
            for _ in range(SLICE):
                whole, start = engine.busy and len(engine._answers) == len(texts), time.perf_counter()
                said = engine.step() if engine.busy else []
                if whole:
                    took[name] += time.perf_counter() - start
                    tokens[name] += sum(delta.token is not None for delta in said)
                done[name] += said
    answers = [[[delta.token for delta in done[name] if delta.id == id] for id in asked[name]] for name in sides]
    return {name: took[name] / tokens[name] for name in sides}, answers


def timed(args: argparse.Namespace, show: Show) -> list[dict[str, Any]]:
    """Tokens a second of both sides."""
    rows = []
    load = lambda draft: lilliput.load(args.model, runner="native", kv="fp16", draft=draft, sharing=False).engine
    sides, text = {"plain": load(""), args.draft: load(args.draft)}, "".join(LIST[: args.rows])
    for kind in args.texts:
        for batch in args.batches:
            texts = [text[: -(i % 4) * 10 * args.rows // 2 or None] if kind == "repeats" else PROSE[i % 4] for i in range(batch)]
            how = Sampling(args.new, ignore_eos=True, **({} if kind == "repeats" else {"temperature": 0.8, "seed": 7}))  # type: ignore[arg-type]
            times: dict[str, list[float]] = {name: [] for name in sides}
            before = sides[args.draft].stats()
            for turn in range(args.rounds + 1):
                took, said = pair(dict(list(sides.items())[:: 1 if turn % 2 else -1]), texts, how)
                for name in sides if turn else ():
                    times[name].append(took[name])
                assert said[0] == said[1] or (kind == "prose" and args.draft != "ngram"), "guesses changed an answer"
            ratios = [plain / ours for plain, ours in zip(times["plain"], times[args.draft])]
            now = sides[args.draft].stats()
            rows.append({"text": kind, "batch": batch, "plain tok/s": round(1 / statistics.median(times["plain"])),
                         f"{args.draft} tok/s": round(1 / statistics.median(times[args.draft])), "x": f"{statistics.median(ratios):.2f}",
                         "pairs": " ".join(f"{x:.2f}" for x in sorted(ratios)),
                         "accepted": f"{now.accepted - before.accepted}/{now.drafted - before.drafted}"})  # fmt: skip
            show.line(f"{kind}, batch {batch}: {rows[-1]['x']}")
    return rows


def acceptance(args: argparse.Namespace, show: Show) -> list[dict[str, Any]]:
    """Tokens that a pass over a sequence gives, by temperature and gamma; passes whose answer ended in them, or had less room, do not count."""
    rows = []
    for temperature in args.temperatures:
        single = 0.0
        for gamma in (1, 2, 4, 8):
            engine = lilliput.load(args.model, runner="native", draft=args.draft, sharing=False).engine
            engine.guesses.control.fixed = gamma
            seen: list[int] = []  # accepted guesses of each pass with gamma of them
            engine.guesses.control.observe = lambda proposed, accepted, seen=seen, gamma=gamma: seen.append(accepted) if proposed == gamma else None
            for at in range(0, args.answers, 16):
                how = [Sampling(args.new, ignore_eos=True, temperature=temperature, seed=at + i) for i in range(16)]
                starts = [PROSE[i % 4] + (" " + PROSE[(i // 4 + at) % 4].split()[i % 3] if temperature == 0 else "") for i in range(16)]
                for start, one in zip(starts, how):
                    engine.add(engine.tokenizer.encode(start, special=True), one)
                while engine.busy:
                    engine.step()
            tokens = 1 + statistics.fmean(seen)
            single = tokens - 1 if gamma == 1 else single
            alpha = sum(seen) / sum(min(right + 1, gamma) for right in seen)
            error = statistics.stdev(seen) / len(seen) ** 0.5
            said, first = expected_tokens(alpha, gamma), expected_tokens(single, gamma)
            reached = [sum(right >= place for right in seen) for place in range(gamma + 1)]
            rows.append({"temperature": temperature, "gamma": gamma, "passes": len(seen), "alpha": round(alpha, 3),
                         "tokens a pass": f"{tokens:.3f} ± {error:.3f}", "measured / formula": round(tokens / said, 3),
                         "with the alpha of gamma 1": round(tokens / first, 3),
                         "by place": " ".join(f"{b / a:.3f}" for a, b in itertools.pairwise(reached) if a)})  # fmt: skip
            show.line(", ".join(f"{key} {value}" for key, value in rows[-1].items()))
    return rows


def main() -> int:
    """Measure and print a table."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--model", default="smollm2-135m")
    options.add_argument("--draft", default="ngram")
    options.add_argument("--acceptance", action="store_true")
    options.add_argument("--answers", type=int, default=128, help="with --acceptance: so many for each row")
    options.add_argument("--temperatures", type=float, nargs="+", default=[0.0, 0.7, 1.0], help="with --acceptance")
    options.add_argument("--texts", nargs="+", default=["repeats", "prose"])
    options.add_argument("--rows", type=int, default=8, help="of the text that repeats itself")
    options.add_argument("--batches", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    options.add_argument("--new", type=int, default=128)
    options.add_argument("--rounds", type=int, default=7)
    options.add_argument("--json", action="store_true")
    args = options.parse_args()
    show = Show(json=args.json)
    torch.set_num_threads(cpus())
    native.threads(cpus())
    rows = (acceptance if args.acceptance else timed)(args, show)
    where = ", ".join(f"{key} {value}" for key, value in machine().items())
    show.data({"arguments": vars(args), "rows": rows})
    show.table(rows, tuple(rows[0]), f"{args.model}, {args.draft}; {where}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
