"""Learning rate over the steps: linear warm-up, then cosine, constant, or warm-up-stable-decay (WSD)."""

from __future__ import annotations

import math

from lilliput.base.job import Train


def learning_rate(step: int, train: Train) -> float:
    """Rate of step 0..steps-1. The last step has lr x lr_end (cosine, wsd).

    Cosine: Loshchilov & Hutter 2017, arXiv 1608.03983. WSD: Hu et al. 2024 (MiniCPM), arXiv 2404.06395, section 4.
    """
    low = train.lr * train.lr_end
    if step < train.warmup:
        return train.lr * (step + 1) / train.warmup
    if train.schedule == "constant":
        return train.lr
    length = max(1, train.steps - train.warmup - 1)
    if train.schedule == "cosine":
        share = min(1.0, (step - train.warmup) / length)
        return low + (train.lr - low) * 0.5 * (1 + math.cos(math.pi * share))
    falling = max(1, round(train.steps * train.decay))
    into = step - (train.steps - falling)
    return train.lr if into < 0 else train.lr + (low - train.lr) * min(1.0, (into + 1) / falling)
