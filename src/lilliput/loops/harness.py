"""lm-evaluation-harness on our models: its tasks ask for log-likelihoods and generations, this answers them.

    from lilliput.loops.harness import run_harness
    run_harness(model, tokenizer, ["arc_easy"])["results"]

Log-likelihoods go through likelihood.score (the choices of one question share a row), generations through the serving
engine. The harness fetches its tasks' data itself; `include_path` adds a folder of task files of one's own.
Extra: pip install 'lilliput[harness]'.   Gao et al. 2021, github.com/EleutherAI/lm-evaluation-harness
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lilliput.base.errors import UserError
from lilliput.loops.likelihood import Pair, beginning, encode_pair, score
from lilliput.serve.request import Sampling

if TYPE_CHECKING:
    from lilliput.base.show import Show
    from lilliput.data.tokenizer import Tokenizer
    from lilliput.models.decoder import Decoder

KNOWN = ("until", "max_gen_toks", "do_sample", "temperature", "top_p", "top_k")  # generation keywords of the harness


def run_harness(
    model: Decoder, tokenizer: Tokenizer, tasks: Sequence[str], *, limit: int = 0, batch: int = 4, include_path: str | Path = "", show: Show | None = None
) -> dict[str, Any]:
    """The harness's own results dictionary ({"results": {task: {"acc,none": ...}}, "samples": ...}) of its tasks on a model.

    limit: questions a task (0 = all). UserError when the package is absent or a task is unknown to it.
    """
    lm_eval = _package()
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(include_path) or None)
    unknown = [task for task in tasks if not manager.match_tasks([task])]
    if unknown:
        raise UserError(
            f"the harness has no task `{unknown[0]}`", f"it knows {len(manager.all_tasks)} tasks", "lm-eval ls tasks, or include_path=FOLDER with its yaml"
        )
    return lm_eval.simple_evaluate(harness_model(model, tokenizer, batch=batch, show=show), tasks=list(tasks), limit=limit or None, task_manager=manager)


def harness_model(model: Decoder, tokenizer: Tokenizer, *, batch: int = 4, show: Show | None = None) -> Any:
    """An lm_eval.api.model.LM around a model in eval mode. `batch`: questions in one forward. UserError without the package."""
    _package()
    from lm_eval.api.model import LM

    class Lilliput(LM):
        """Answers the harness's three kinds of requests."""

        def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
            """(log-probability, greedy) of each (context, continuation)."""
            same = lambda request: (getattr(request, "task_name", None), getattr(request, "doc_id", None))
            questions = [list(group) for _, group in itertools.groupby(requests, key=same)]
            groups = [[encode_pair(tokenizer, *request.args) for request in question] for question in questions]
            answers = [tuple(one) for scores in _score(model, groups, batch, show) for one in scores]
            return self._kept("loglikelihood", requests, answers)

        def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
            """Log-probability of each whole text, in windows of the model's context, each token scored once."""
            groups = [_rolling(tokenizer, request.args[0], model.facts.context) for request in requests]
            flat = iter(_score(model, [[pair] for pairs in groups for pair in pairs], batch, show))
            return self._kept("loglikelihood_rolling", requests, [sum(next(flat)[0].logprob for _ in pairs) for pairs in groups])

        def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
            """The text each context goes on with, up to a stop string, from the serving engine."""
            return self._kept("generate_until", requests, _generate(model, tokenizer, [request.args for request in requests]))

        def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
            """Messages as the model's prompt."""
            return tokenizer.apply_chat(chat_history, add_generation_prompt=add_generation_prompt)

        def chat_template(self, chat_template: bool | str = False) -> str | None:
            """The model's template, which names its requests in the harness's cache."""
            return tokenizer.chat_template if chat_template else None

        @property
        def tokenizer_name(self) -> str:
            """What tells this tokenizer from others."""
            return tokenizer.digest()

        def _kept(self, kind: str, requests: list[Any], answers: list[Any]) -> list[Any]:
            for request, one in zip(requests, answers):
                self.cache_hook.add_partial(kind, request.args, one)
            return answers

    return Lilliput()


def _package() -> Any:
    try:
        import lm_eval
    except ModuleNotFoundError as fault:
        raise UserError("the public harness is not installed", f"no module named {fault.name}", "pip install 'lilliput[harness]'") from None
    return lm_eval


def _score(model: Decoder, groups: list[list[Pair]], batch: int, show: Show | None) -> list[Any]:
    if show is None:
        return score(model, groups, batch)
    with show.bar(len(groups), "harness") as bar:
        return score(model, groups, batch, bar.advance)


def _rolling(tokenizer: Tokenizer, text: str, context: int) -> list[Pair]:
    """The pairs whose continuations are all tokens of the text, cut by the harness's own rule."""
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    start = beginning(tokenizer) or tokenizer.eos_ids
    if not start:
        raise UserError("nothing stands before the text to score", "the tokenizer has no BOS and no end token", "choose another model")
    windows = get_rolling_token_windows(tokenizer.encode(text), start[0], context, 1)
    return [Pair(tuple(before), tuple(after)) for before, after in map(make_disjoint_window, windows)]


def _generate(model: Decoder, tokenizer: Tokenizer, asked: Sequence[tuple[str, dict[str, Any]]]) -> list[str]:
    """Texts in order; requests of equal keywords run in one batch. Prompts too long for the model lose their oldest tokens."""
    from lilliput.serve.engine import Engine

    engine, texts = Engine(model, tokenizer), [""] * len(asked)
    order = sorted(range(len(asked)), key=lambda i: repr(sorted(asked[i][1].items())))
    for _, group in itertools.groupby(order, key=lambda i: repr(sorted(asked[i][1].items()))):
        indices = list(group)
        how = _sampling(asked[indices[0]][1])
        room = model.facts.context - min(how.max_tokens, model.facts.context - 1)
        prompts = [tokenizer.encode(asked[i][0], special=True)[-room:] for i in indices]
        for i, done in zip(indices, engine.generate(prompts, how)):
            texts[i] = done.text
    return texts


def _sampling(keywords: dict[str, Any]) -> Sampling:
    unknown = [key for key in keywords if key not in KNOWN]
    if unknown:
        raise UserError(f"generation keyword `{unknown[0]}` is not supported", f"known: {', '.join(KNOWN)}", "take it out of the task's generation_kwargs")
    until = keywords.get("until") or []
    stop = (until,) if isinstance(until, str) else tuple(text for text in until if text)
    drawn = keywords.get("do_sample", keywords.get("temperature", 0.0) > 0)
    return Sampling(
        max_tokens=keywords.get("max_gen_toks", 256), stop=stop, temperature=keywords.get("temperature", 1.0) if drawn else 0.0,
        top_p=keywords.get("top_p", 1.0) if drawn else 1.0, top_k=keywords.get("top_k", 0) if drawn else 0, seed=0,
    )  # fmt: skip
