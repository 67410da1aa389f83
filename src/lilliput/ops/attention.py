"""Attention's front door: softmax(q k^T * scale) v over the keys each query may see. It picks a backend and says why.

Queries lie at the END of the keys: with 3 queries and 10 keys, causal lets query 0 see keys 0..7. (torch's `is_causal`
aligns at the start; that differs as soon as there is a cache.) window = W: a query sees itself and W - 1 keys before it.
Query heads share key heads in groups (GQA): head h reads key head h // (H / G). A query that sees nothing answers 0.

    flash       FlashAttention-2 (ops/flash.py), compiled; training and prompts
    sdpa        torch's scaled_dot_product_attention; its CPU flash kernel keeps no scores
    reference   plain torch, [B, H, T, S] scores in memory; the oracle

Backends state in `supports` what they cannot take. Attention over a paged cache is ops/paged.py.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lilliput.base.errors import UserError, did_you_mean
from lilliput.ops import flash


def visible(queries: int, keys: int, window: int | None, device: torch.device | str) -> Tensor:
    """bool [queries, keys]: which keys each query may see, causally, queries at the end of the keys."""
    ahead = torch.arange(keys, device=device) - torch.arange(keys - queries, keys, device=device).unsqueeze(1)
    seen = ahead <= 0
    return seen if window is None else seen & (ahead > -window)


class Flash:
    """The compiled FlashAttention-2."""

    name = "flash"

    def supports(self, **arguments: Any) -> str | None:
        """Refuses masks, and single queries, which are quicker without tiles."""
        if arguments["mask"] is not None:
            return "flash takes causal masks and windows, no explicit ones"
        if arguments["q"].shape[2] == 1:
            return "flash works on tiles of queries, this is one"
        return flash.supports(arguments["q"], arguments["k"], arguments["v"])


class Reference:
    """Plain torch."""

    name = "reference"

    def supports(self, **arguments: Any) -> str | None:
        """Takes everything."""
        return None

    def run(self, q_BHTD: Tensor, k_BGSD: Tensor, v_BGSD: Tensor, mask: Tensor | None, causal: bool, scale: float) -> Tensor:
        """mask broadcastable to [B, H, T, S], bool or added; causal: a square causal mask in its place."""
        group = q_BHTD.shape[1] // k_BGSD.shape[1]
        k, v = (k_BGSD, v_BGSD) if group == 1 else (k_BGSD.repeat_interleave(group, 1), v_BGSD.repeat_interleave(group, 1))
        scores = (q_BHTD * scale) @ k.transpose(-1, -2)
        if causal:
            mask = visible(q_BHTD.shape[2], k.shape[2], None, q_BHTD.device)
        if mask is None or mask.dtype != torch.bool:
            return (scores if mask is None else scores + mask).softmax(-1) @ v
        return scores.masked_fill(~mask, float("-inf")).softmax(-1).masked_fill(~mask, 0.0) @ v


class Sdpa:
    """torch.nn.functional.scaled_dot_product_attention."""

    name = "sdpa"

    def supports(self, **arguments: Any) -> str | None:
        """Refuses what torch would answer wrongly or not at all."""
        q, k, v = arguments["q"], arguments["k"], arguments["v"]
        if not q.dtype == k.dtype == v.dtype:
            return f"sdpa needs one dtype, got q {q.dtype}, k {k.dtype}, v {v.dtype}"
        return None

    def run(self, q_BHTD: Tensor, k_BGSD: Tensor, v_BGSD: Tensor, mask: Tensor | None, causal: bool, scale: float) -> Tensor:
        """As Reference.run."""
        grouped = q_BHTD.shape[1] != k_BGSD.shape[1]
        return F.scaled_dot_product_attention(q_BHTD, k_BGSD, v_BGSD, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=grouped)


BACKENDS: dict[str, Any] = {backend.name: backend for backend in (Flash(), Sdpa(), Reference())}  # in order of preference


def _overlay(mask: Tensor | None, seen: Tensor) -> Tensor:
    if mask is None:
        return seen
    return mask & seen if mask.dtype == torch.bool else mask.masked_fill(~seen, float("-inf"))


def choose(q_BHTD: Tensor, k_BGSD: Tensor, v_BGSD: Tensor, mask: Tensor | None = None) -> tuple[str, str]:
    """(backend name, reason): the first of BACKENDS that takes these tensors, with why the ones before it do not."""
    refusals: list[str] = []
    for name, backend in BACKENDS.items():
        refusal = backend.supports(q=q_BHTD, k=k_BGSD, v=v_BGSD, mask=mask)
        if refusal is None:
            return name, "; ".join(refusals) or "first choice"
        refusals.append(refusal)
    raise AssertionError("the reference takes everything")


def attend(q_BHTD: Tensor, k_BGSD: Tensor, v_BGSD: Tensor, *, causal: bool, window: int | None = None, mask: Tensor | None = None,
           scale: float | None = None, backend: str = "auto") -> Tensor:
    """q [B, H, T, D] over k, v [B, G, S, D] (G divides H; v may have another D) -> [B, H, T, D of v].

    mask, broadcastable to [B, H, T, S]: bool (True = may be seen) or floats added to the scores. With causal=True the
    causal and window mask is laid over it; make the mask once and pass causal=False where many layers share it.
    scale: 1/sqrt(D) when None. window needs causal.
    """
    if backend != "auto" and backend not in BACKENDS:
        raise UserError(f"unknown attention backend `{backend}`", fix=did_you_mean(backend, [*BACKENDS, "auto"]))
    if window is not None and not causal:
        raise UserError("a window needs causal attention", "it is the number of keys up to and including the query's own", "pass causal=True or window=None")
    queries, keys = q_BHTD.shape[2], k_BGSD.shape[2]
    if causal and queries > keys:
        raise UserError(f"{queries} queries over {keys} keys", "causal queries lie at the end of the keys", "pass at least as many keys as queries")
    if window is not None and window >= keys:
        window = None
    scale = q_BHTD.shape[-1] ** -0.5 if scale is None else scale
    name = choose(q_BHTD, k_BGSD, v_BGSD, mask)[0] if backend == "auto" else backend
    refusal = BACKENDS[name].supports(q=q_BHTD, k=k_BGSD, v=v_BGSD, mask=mask)
    if refusal is not None:
        raise UserError(f"attention backend `{name}` cannot take these tensors", refusal, 'pass backend="auto"')
    if name == "flash":
        return flash.attention(q_BHTD, k_BGSD, v_BGSD, causal=causal, window=window, scale=scale)
    if causal and mask is None and window is not None and queries == 1:  # one new token: its keys are a slice, no mask at all
        k_BGSD, v_BGSD, causal = k_BGSD[:, :, -window:], v_BGSD[:, :, -window:], False
    elif causal and (mask is not None or window is not None or 1 < queries < keys):
        seen = visible(queries, keys, window, q_BHTD.device)
        mask, causal = _overlay(mask, seen), False
    elif queries == 1:
        causal = False
    return BACKENDS[name].run(q_BHTD, k_BGSD, v_BGSD, mask, causal, scale)
