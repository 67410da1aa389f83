"""What structured output costs: tokens a second of a batch whose answers follow a grammar, beside the same batch without; a mask; a new schema.

    make bench X=structured_cost                             interleaved rounds at 1, 4 and 16 answers at once
    make bench X=structured_cost ARGS="--schemas 4000"       so many random schemas through HTTP instead: valid, refused, cut (any invalid answer fails)

Both sides are greedy and run in turns on one engine. Answers cannot end while they are timed: the text of one schema is long, the list of the other.
"mask" is the parser's part before a token, "accept" that after it; the rest of the difference is that rows with a mask are drawn apart.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import lilliput
from lilliput.base.hardware import cpus
from lilliput.base.show import Show
from lilliput.loops.bench import machine
from lilliput.ops import native
from lilliput.serve import tools
from lilliput.serve.request import Guide, Sampling
from lilliput.serve.structured import Grammars

TESTS = Path(__file__).parent.parent / "tests"
PERSON = {"type": "object", "properties": {"name": {"type": "string", "maxLength": 24}, "age": {"type": "integer", "minimum": 0, "maximum": 150},
          "job": {"enum": ["cook", "pilot", "nurse"]}, "born": {"type": "string", "format": "date"}},
          "required": ["name", "age", "job", "born"], "additionalProperties": False}  # fmt: skip
STORY = {"type": "object", "properties": {"story": {"type": "string", "minLength": 5000}}, "required": ["story"], "additionalProperties": False}
LIST = {"type": "array", "items": PERSON, "minItems": 400}


class Timed:
    """A guide that notes what its calls take."""

    def __init__(self, guide: Guide, seconds: dict[str, list[float]]) -> None:
        """`seconds`: "mask" and "accept", to be added to."""
        self._guide, self._seconds = guide, seconds

    def mask(self) -> torch.Tensor:
        """The guide's own."""
        start = time.perf_counter()
        found = self._guide.mask()
        self._seconds["mask"].append(time.perf_counter() - start)
        return found

    def accept(self, token: int) -> None:
        """The guide's own."""
        start = time.perf_counter()
        self._guide.accept(token)
        self._seconds["accept"].append(time.perf_counter() - start)

    @property
    def finished(self) -> bool:
        """The guide's own."""
        return self._guide.finished


def rate(engine: Any, batch: int, steps: int, guide: Callable[[], Guide] | None) -> float:
    """Tokens a second of `batch` answers over `steps` steps, after their prompts."""
    ids = engine.tokenizer.encode("People of the village, as a list in JSON with name, age, job and date of birth, and the story of the village:")
    requests = [engine.add([1000 + b, *ids], Sampling(steps + 8, ignore_eos=True, guide=guide)) for b in range(batch)]
    while any(not answer.tokens for answer in engine._answers.values()):
        engine.step()
    start = time.perf_counter()
    for _ in range(steps):
        engine.step()
    found = steps * batch / (time.perf_counter() - start)
    assert len(engine._answers) == batch, "an answer ended while it was timed"
    for id in requests:
        engine.cancel(id)
    engine.step()
    return found


def costs(args: argparse.Namespace, show: Show) -> list[dict[str, Any]]:
    """Shares of the free rate, and microseconds of the parser."""
    model = lilliput.load(args.model, runner="native", weights=args.weights, sharing=False)
    engine = model.engine
    grammars = Grammars(model.tokenizer, engine.door.vocab, sorted(engine._eos))
    call = {"name": "hire", "parameters": PERSON}
    pattern = grammars.regex(r"([a-z ]{1,30}[.,] ?)+")
    makers = {"a long text": grammars.json_schema(STORY), "a list of records": grammars.json_schema(LIST), "a pattern": pattern,
              "tools that may be called": grammars.grammar(tools.rule([call], required=False, many=True, bare=False))}  # fmt: skip
    rows = []
    for batch in args.batches:
        taken: dict[str, list[float]] = {kind: [] for kind in ("free", *makers)}
        spent: dict[str, dict[str, list[float]]] = {kind: {"mask": [], "accept": []} for kind in makers}
        for number in range(args.rounds + 1):
            for kind in taken:
                maker, into = makers.get(kind), spent.get(kind, {})
                found = rate(engine, batch, args.steps, None if maker is None else (lambda maker=maker, into=into: Timed(maker(), into)))
                if number:
                    taken[kind].append(found)
        for kind, rates in taken.items():
            row = {"answers": batch, "kind": kind, "tokens/s": round(statistics.median(rates), 1)}
            row["of free"] = round(statistics.median(a / b for a, b in zip(rates, taken["free"])), 3)
            for part, seconds in spent.get(kind, {}).items():
                order = sorted(1e6 * one for one in seconds)
                row[f"{part}, us: mean / p50 / p99"] = f"{statistics.fmean(order):.0f} / {order[len(order) // 2]:.0f} / {order[int(0.99 * len(order))]:.0f}"
            rows.append(row)
            show.line(", ".join(f"{key} {value}" for key, value in row.items()))
    new = []
    for number in range(50):
        start = time.perf_counter()
        grammars.json_schema(PERSON | {"properties": PERSON["properties"] | {f"x{number}": {"type": "integer"}}})().mask()  # type: ignore[operator]
        new.append(1e3 * (time.perf_counter() - start))
    show.line(f"a schema that is new, with its first mask: {statistics.median(new):.1f} ms, the slowest of 50 {max(new):.1f}")
    return rows


def schemas(args: argparse.Namespace, show: Show) -> list[dict[str, Any]]:
    """The tests' random schemas, more of them."""
    sys.path[:0] = [str(TESTS), str(TESTS / "serve")]
    import test_http_hard
    from http_server import running

    with tempfile.TemporaryDirectory() as folder, running(Path(folder)) as server:
        return [{"schemas": args.schemas, **test_http_hard.try_schemas(server, args.schemas)}]


def main() -> int:
    """Measure and print a table."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--model", default="smollm2-135m")
    options.add_argument("--weights", default="file")
    options.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16])
    options.add_argument("--steps", type=int, default=48)
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--schemas", type=int, default=0)
    options.add_argument("--json", action="store_true")
    args = options.parse_args()
    show = Show(json=args.json)
    torch.set_num_threads(cpus())
    native.threads(cpus())
    rows = (schemas if args.schemas else costs)(args, show)
    show.data({"arguments": vars(args), "machine": machine(), "rows": rows})
    show.table(rows, tuple({key: 0 for row in rows for key in row}), f"{args.model}; {', '.join(f'{key} {value}' for key, value in machine().items())}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
