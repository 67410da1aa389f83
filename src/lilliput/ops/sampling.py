"""Sampling: from a row of logits to one token. Order as in transformers: repetition penalty, temperature, top-k, top-p, min-p.

The random number of a token is a hash of (request seed, position), not the next draw of a generator: the same seed
gives the same tokens whatever else is in the batch, however prompts are chunked, and after a restart.

The candidates come out sorted by probability, so a draw is one binary search. A full sort of 49,152 logits takes
2.8 ms, a partial select of 50 takes 0.05 ms; top-p therefore selects 64, 512, ... until their mass is enough.
Probabilities are float64: the sum over a large vocabulary must not decide which token is drawn.

Holtzman et al. 2020, arXiv 1904.09751 (top-p); Keskar et al. 2019, arXiv 1909.05858 (repetition penalty);
Nguyen et al. 2024, arXiv 2407.01082 (min-p).
"""

from __future__ import annotations

import math
from collections.abc import Collection

import torch
from torch import Tensor

from lilliput.base import seeds


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
