"""Sampling: from a row of logits to one token. Order as in transformers: penalties, bias and mask, temperature, top-k, top-p, min-p.

The random number of a token is a hash of (request seed, position), not the next draw of a generator: the same seed
gives the same tokens whatever else is in the batch, however prompts are chunked, and after a restart.

`choose_rows` serves a batch: compiled (csrc/sampler.h: threshold selection, no full sort) where it can, else `choose` row by row,
which is its reference. Candidates come out sorted by probability, equals by id, so a draw is one binary search. Probabilities
are float64: the sum over a large vocabulary must not decide which token is drawn.

Holtzman et al. 2020, arXiv 1904.09751 (top-p); Keskar et al. 2019, arXiv 1909.05858 (repetition penalty);
Nguyen et al. 2024, arXiv 2407.01082 (min-p).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lilliput.base import seeds
from lilliput.ops import native


@dataclass(frozen=True)
class Draw:
    """How one row is sampled. `u`: the row's random number; `seen`: ids of prompt and answer, each with how often it came in the answer
    (0: in the prompt alone); `mask_W`: int32 words, bit i = token i may come."""

    u: float = 0.0
    temperature: float = 0.0  # 0 = the largest logit
    top_k: int = 0  # 0 = off
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0  # of all that was seen
    presence_penalty: float = 0.0  # subtracted from the logit of each token that came in the answer
    frequency_penalty: float = 0.0  # ... times how often it did
    seen: Mapping[int, int] = field(default_factory=dict)
    bias: Mapping[int, float] = field(default_factory=dict)  # added to logits; -inf: never
    mask_W: Tensor | None = None

    @property
    def penalised(self) -> bool:
        """Whether what occurred before matters."""
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0


GREEDY = Draw()


class Choice(NamedTuple):
    """A sampled token, its log probability under the raw logits, log sum exp of those, and the likeliest tokens where asked for."""

    token: int
    logprob: float
    total: float
    top: tuple[tuple[int, float], ...] = ()


def supports(logits_NV: Tensor) -> str | None:
    """Why the extension cannot sample these rows; None when it can."""
    if native.module() is None:
        return native.missing()
    if logits_NV.device.type != "cpu" or logits_NV.dtype != torch.float32 or logits_NV.stride(-1) != 1:
        return f"it takes rows of fp32 on the CPU, got {logits_NV.dtype} on {logits_NV.device.type}"
    return None


def choose_rows(logits_NV: Tensor, draws: Sequence[Draw], top: int = 0) -> list[Choice]:
    """One token a row. top: how many of the likeliest tokens to name. token -1 where the logits are not finite or the mask forbids all."""
    if supports(logits_NV) is not None:
        return [_choose_row(logits_V, draw, top) for logits_V, draw in zip(logits_NV, draws)]
    if native.watched(logits_NV):
        *columns, ids, logprobs = CHOOSE(logits_NV, *as_tensors(draws, logits_NV.shape[1]), top)
        chosen = list(zip(*(column.tolist() for column in columns)))
    else:
        ids, logprobs = _tops(len(draws), top) if top else (None, None)
        chosen = _choose_asked(logits_NV, [None if draw is GREEDY else _asked(draw) for draw in draws], ids, logprobs)
    if ids is None or logprobs is None:
        return [Choice(*found) for found in chosen]
    tops = zip(ids.tolist(), logprobs.tolist())
    return [Choice(token, logprob, total, tuple(zip(i, p))) for (token, logprob, total), (i, p) in zip(chosen, tops)]


Asked = tuple[list[float], list[int], list[int], list[int], list[float], int]


def _tops(rows: int, top: int) -> tuple[Tensor, Tensor]:
    return torch.empty(rows, top, dtype=torch.int32), torch.empty(rows, top, dtype=torch.float64)


def _choose_asked(logits_NV: Tensor, asked: Sequence[Asked | None], ids: Tensor | None, logprobs: Tensor | None) -> Any:
    into = (0, 0, 0) if ids is None or logprobs is None else (ids.shape[1], ids.data_ptr(), logprobs.data_ptr())
    return native.module().choose(logits_NV.data_ptr(), logits_NV.stride(0), logits_NV.shape[1], asked, *into)  # [(token, logprob, total)]


def _asked(draw: Draw) -> Asked:
    """A row's request as the extension takes it (csrc/bind_sampler.cpp)."""
    numbers = [draw.temperature, draw.top_k, draw.top_p, draw.min_p, draw.repetition_penalty, draw.presence_penalty, draw.frequency_penalty, draw.u]
    times, mask = draw.seen if draw.penalised else {}, 0 if draw.mask_W is None else draw.mask_W.data_ptr()
    return numbers, list(times), list(times.values()), list(draw.bias), list(draw.bias.values()), mask


def as_tensors(draws: Sequence[Draw], vocab: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The requests as the op takes them: numbers fp64 [N, 8]; ids and times of what was seen int32 [2, all], with their borders [N + 1];
    biased ids and biases, with theirs; masks int32 [N, words], all ones where a row has none."""
    numbers, seen, times, ids, biases, _ = zip(*map(_asked, draws)) if draws else ((),) * 6
    masks = torch.stack([torch.full((-(-vocab // 32),), -1, dtype=torch.int32) if draw.mask_W is None else draw.mask_W for draw in draws])
    flat = [[number for row in rows for number in row] for rows in (seen, times, ids, biases)]
    borders = (torch.tensor([0, *accumulate(map(len, rows))], dtype=torch.int32) for rows in (seen, ids))
    return (torch.tensor(numbers, dtype=torch.float64), torch.tensor(flat[:2], dtype=torch.int32), next(borders), torch.tensor(flat[2], dtype=torch.int32),
            torch.tensor(flat[3], dtype=torch.float32), next(borders), masks)  # fmt: skip


def _run(logits: Tensor, numbers: Tensor, seen: Tensor, seen_cu: Tensor, bias_ids: Tensor, biases: Tensor, bias_cu: Tensor, masks: Tensor,
         top: int) -> tuple[Tensor, ...]:  # fmt: skip
    ids, times = seen.tolist()
    parts = [pairwise(borders.tolist()) for borders in (seen_cu, bias_cu)]
    asked = [(row, ids[a:b], times[a:b], bias_ids[c:d].tolist(), biases[c:d].tolist(), mask.data_ptr())
             for row, mask, (a, b), (c, d) in zip(numbers.tolist(), masks.unbind(), *parts)]  # fmt: skip
    ids, logprobs = _tops(len(asked), top)
    token, logprob, total = zip(*_choose_asked(logits, asked, ids, logprobs))
    return torch.tensor(token), torch.tensor(logprob, dtype=torch.float64), torch.tensor(total, dtype=torch.float64), ids, logprobs


def _fake(logits: Tensor, numbers: Tensor, seen: Tensor, seen_cu: Tensor, bias_ids: Tensor, biases: Tensor, bias_cu: Tensor, masks: Tensor,
          top: int) -> tuple[Tensor, ...]:  # fmt: skip
    return (*(logits.new_empty(logits.shape[0], dtype=kind) for kind in (torch.int64, torch.float64, torch.float64)), *_tops(logits.shape[0], top))


CHOOSE = native.define("choose_rows(Tensor logits, Tensor numbers, Tensor seen, Tensor seen_cu, Tensor bias_ids, Tensor biases, Tensor bias_cu, Tensor masks, "
                       "int top) -> (Tensor token, Tensor logprob, Tensor total, Tensor top_ids, Tensor top_logprobs)", _run, _fake)  # fmt: skip


def _choose_row(logits_V: Tensor, draw: Draw, top: int) -> Choice:
    total = float(logits_V.logsumexp(-1))
    if not abs(total) < float("inf"):
        return Choice(-1, 0.0, total)
    changed_V = logits_V.clone()
    for token, times in draw.seen.items() if draw.penalised else ():
        value = float(changed_V[token])
        value = value / draw.repetition_penalty if value > 0 else value * draw.repetition_penalty
        changed_V[token] = value - draw.presence_penalty * (times > 0) - draw.frequency_penalty * times
    for token, value in draw.bias.items():
        changed_V[token] += value
    if draw.mask_W is not None:
        allowed = (draw.mask_W[:, None] >> torch.arange(32, dtype=torch.int32) & 1).flatten()[: len(changed_V)].bool()
        changed_V = changed_V.masked_fill(~allowed, float("-inf"))
    if bool((changed_V == float("-inf")).all()):
        return Choice(-1, 0.0, total)
    token = choose(changed_V, (), draw.u, temperature=draw.temperature, top_k=draw.top_k, top_p=draw.top_p, min_p=draw.min_p, repetition_penalty=1.0)
    values, ids = logits_V.topk(top)
    best = tuple((i, v - total) for i, v in zip(ids.tolist(), values.tolist()))
    return Choice(token, float(logits_V[token]) - total, total, best)


def uniform(seed: int, position: int) -> float:
    """The random number in [0, 1) of the token at a position, 53 bits, from (seed, position) alone."""
    return (seeds.key("sample", seed, position) >> 3) / 2**53


def penalise(logits_V: Tensor, seen: Collection[int], penalty: float) -> Tensor:
    """A copy in which each token of the prompt and the answer is less likely: logit / penalty if > 0, else logit * penalty."""
    index = torch.tensor(sorted(set(seen)), device=logits_V.device)
    score = logits_V[index]
    return logits_V.index_copy(0, index, torch.where(score > 0, score / penalty, score * penalty))


def candidates(logits_V: Tensor, *, temperature: float, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> tuple[Tensor, Tensor]:
    """The tokens that may be drawn and their probabilities: (ids_K, probs_K float64 with sum 1).

    temperature > 0. top_k = 0, top_p = 1, min_p = 0 are off. Ties with the k-th token stay, as in transformers. Sorted by falling
    probability, except when no filter or only min_p is on: then in the order of the vocabulary.
    """
    scaled_V = logits_V.double() / temperature
    if top_k or top_p < 1:
        values_K, ids_K = _largest(logits_V, scaled_V, top_k or len(logits_V), top_p)
    else:
        values_K, ids_K = scaled_V, torch.arange(len(scaled_V), device=logits_V.device)
    if min_p:
        stays_K = values_K >= values_K.max() + math.log(min_p)
        values_K, ids_K = values_K[stays_K], ids_K[stays_K]
    return ids_K, values_K.softmax(0)


def draw(ids_K: Tensor, probs_K: Tensor, u: float) -> int:
    """The token whose stretch of the cumulative distribution holds u, in [0, 1)."""
    cumulative_K = probs_K.cumsum(0)
    at = torch.searchsorted(cumulative_K, u * cumulative_K[-1], right=True).clamp(max=len(ids_K) - 1)
    return int(ids_K[at])


def _largest(logits_V: Tensor, scaled_V: Tensor, top_k: int, top_p: float) -> tuple[Tensor, Tensor]:
    """The top-k with ties, then the smallest part of them, largest first, whose mass reaches top_p."""
    vocab = width = len(logits_V)
    if top_k < vocab:
        width = int((logits_V >= logits_V.topk(top_k).values[-1]).sum())
    if top_p == 1:
        values_K, ids_K = scaled_V.topk(width)
        return values_K, ids_K
    total = scaled_V.logsumexp(0) if width == vocab else scaled_V.topk(width).values.logsumexp(0)
    part = min(64, width)
    while True:
        values_K, ids_K = scaled_V.topk(part)
        before_K = (values_K - total).exp().cumsum(0)  # mass up to and with each token
        if part == width or before_K[-1] >= top_p:
            break
        part = min(part * 8, width)
    keep = 1 + int((before_K[:-1] < top_p).sum())  # a token stays when the mass before it is below top_p
    return values_K[:keep], ids_K[:keep]


def choose(
    logits_V: Tensor, seen: Collection[int], u: float, *, temperature: float, top_k: int, top_p: float, min_p: float, repetition_penalty: float
) -> int:
    """The next token of one row. `seen`: ids of prompt and answer; `u`: the row's random number; temperature 0 = the largest logit."""
    if repetition_penalty != 1:
        logits_V = penalise(logits_V, seen, repetition_penalty)
    if temperature == 0:
        return int(logits_V.argmax())
    return draw(*candidates(logits_V, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p), u)
