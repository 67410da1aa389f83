"""RoPE: positions as rotations of pairs (d, d + D/2) of each query and key head (the "half-split" order of Hugging Face).

Tables of cos and sin are made once a forward and shared by all layers. The sign of the rotation is folded into sin, so
rotating is three kernels (mul, roll, addcmul) and autograd keeps only the tables.

Scaling beyond the trained context: linear divides every frequency; llama3 divides the slow ones and blends between;
yarn blends by how often a dimension turns in the original context, and sharpens attention by `attention_factor`.
Frequencies are computed in fp32 in transformers' order of operations: at position 2000 one ulp is 1e-4 rad.

Su et al. 2021, arXiv 2104.09864; Peng et al. 2023 (YaRN), arXiv 2309.00071.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lilliput.models.spec import Rope


def frequencies(rope: Rope, head_dim: int) -> tuple[float, ...]:
    """Radians per token of each of the head_dim / 2 pairs: fp32 values, as Python floats so that no device owns them."""
    powers = rope.theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32, device="cpu") / head_dim)
    plain = 1.0 / powers
    if rope.kind == "linear":
        plain = plain / rope.factor
    elif rope.kind == "llama3":
        plain = _llama3(rope, plain)
    elif rope.kind == "yarn":
        plain = _yarn(rope, powers, head_dim)
    return tuple(plain.tolist())


def _llama3(rope: Rope, plain: Tensor) -> Tensor:
    turns = rope.original_context / (2 * math.pi / plain)  # how often a pair turns in the original context
    blend = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    blended = (1 - blend) * plain / rope.factor + blend * plain
    slow, fast = turns < rope.low_freq_factor, turns > rope.high_freq_factor
    return torch.where(slow, plain / rope.factor, torch.where(fast, plain, blended))


def _yarn(rope: Rope, powers: Tensor, head_dim: int) -> Tensor:
    def dimension(turns: float) -> float:
        return head_dim * math.log(rope.original_context / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    width = high - low or 0.001  # as transformers: no division by zero
    keep = 1 - ((torch.arange(head_dim // 2, dtype=torch.float32, device="cpu") - low) / width).clamp(0, 1)
    return 1.0 / (rope.factor * powers) * (1 - keep) + 1.0 / powers * keep


def tables(angles: tuple[float, ...], positions_BT: Tensor, scale: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and signed sin, each [B, T, 1, D]; `angles` from frequencies(), `scale` = rope.attention_factor."""
    speed = torch.tensor(angles, dtype=torch.float32, device=positions_BT.device)
    angle = positions_BT.unsqueeze(-1).float() * speed
    cos, sin = angle.cos() * scale, angle.sin() * scale
    return torch.cat((cos, cos), -1).unsqueeze(2).to(dtype), torch.cat((-sin, sin), -1).unsqueeze(2).to(dtype)


def rotate(x_BTHD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x * cos + swap_halves(x) * sin, with the sign already in sin. [B, T, H, D] -> the same."""
    return torch.addcmul(x_BTHD * cos, x_BTHD.roll(x_BTHD.shape[-1] // 2, -1), sin)
