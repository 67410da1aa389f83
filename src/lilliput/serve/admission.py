"""Admission: what an engine refuses before it costs anything, each refusal with the numbers and with what would fit.

Arithmetic on what never changes (vocabulary, context, blocks of the pool), so any thread may ask.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lilliput.base import hardware
from lilliput.base.errors import DoesNotFit, UserError
from lilliput.base.protocols import KVPolicy
from lilliput.serve.blocks import BLOCK
from lilliput.serve.request import Sampling
from lilliput.serve.scheduler import Scheduler

if TYPE_CHECKING:
    from lilliput.models.decoder import Decoder
    from lilliput.models.native import NativeDecoder


@dataclass(frozen=True)
class Door:
    """What a request has to fit into."""

    vocab: int
    context: int
    policy: KVPolicy
    scheduler: Scheduler

    def limit(self, prompt: Sequence[int], how: Sampling) -> int:
        """New tokens of each answer at most. UserError for a prompt that is empty or beyond the context, for ids beyond the vocabulary, DoesNotFit
        where the cache can never hold the request."""
        if not prompt:
            raise UserError("the prompt has no tokens", why="the model needs at least one to go on from", fix="give some text")
        for ids in (prompt, how.logit_bias, how.stop_ids):
            if ids and not 0 <= min(ids) <= max(ids) < self.vocab:
                stranger = min(ids) if min(ids) < 0 else max(ids)
                raise UserError(f"token id {stranger} is not in the vocabulary", f"ids go from 0 to {self.vocab - 1}", "use the model's own tokenizer")
        endless = self.policy.positions == "in_cache"  # positions never leave the cache
        if len(prompt) >= self.context and not endless:
            why = f"{len(prompt):,} tokens of prompt, {self.context:,} tokens of context, and the answer needs at least one"
            raise UserError("the prompt is longer than the context", why, f"shorten the prompt by {len(prompt) - self.context + 1:,} tokens or more")
        if self.policy.evicts and how.width > 1:
            raise UserError("several answers share the prompt's keys, and this cache policy moves them", f"{how.width} answers", "n=1, and ask several times")
        limit = how.max_tokens if endless else min(how.max_tokens, self.context - len(prompt))
        self._room(len(prompt), limit, how.width)
        return limit

    def most(self, prompt: int, limit: int, width: int) -> int:
        """Blocks that a request can need."""
        return self.scheduler.most(prompt, self.policy.budget(prompt, limit), width)

    def _room(self, prompt: int, limit: int, width: int) -> None:
        total, rows = self.scheduler.pool.total, self.scheduler.max_batch_tokens
        if width > rows:
            raise DoesNotFit("the request has too many answers", f"{width} answers need a token each in a step, it has {rows}",
                             f"max_batch_tokens={width} or n={rows}")  # fmt: skip
        need = self.most(prompt, limit, width)
        if need <= total:
            return
        times = f"{width} answers of {limit:,}" if width > 1 else f"{limit:,} of answer"
        why = f"{prompt:,} tokens of prompt and {times} need {need * BLOCK:,} tokens of cache in blocks of {BLOCK}, it has {total * BLOCK:,}"
        fits = bisect.bisect_right(range(1, limit), total, key=lambda tokens: self.most(prompt, tokens, width))
        raise DoesNotFit("the request does not fit into the cache", why, f"kv_tokens={need * BLOCK}" + (f" or max_tokens={fits}" if fits else ""))


def context_of(asked: int, own: int) -> int:
    """Tokens of one request: what is asked for, else the model's own context. UserError for more than that."""
    if asked > own:
        raise UserError(f"context={asked} is beyond the model", f"it was made for {own:,} positions", f"serve.context={own}")
    return asked or own


def affordable(model: Decoder | NativeDecoder, context: int) -> int:
    """Tokens of cache of this model where nobody says how many."""
    kv = model.facts.kv
    assert kv is not None, "a decoder states the shape of its keys and values"
    if model.device.type == "cuda":
        import torch

        from lilliput.models.native import NativeDecoder

        assert not isinstance(model, NativeDecoder), "native models run on CPUs"
        free, element = torch.cuda.mem_get_info(model.device)[0], next(model.parameters()).element_size()
    else:
        free, element = hardware.memory()[1], 4
    return cache_tokens(context, free, kv.bytes_per_token(element))


def cache_tokens(context: int, free: int, token: int) -> int:
    """Four contexts, at most a quarter of the `free` bytes, at least a block. `token`: bytes of one."""
    return max(BLOCK, min(4 * context, free // 4 // token))
