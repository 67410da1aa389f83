"""AdamW in one pass: weights, gradients and both moments are read once and written once, in tiles over the pool.

    m += (1 - b1)(g - m)      v = b2 v + (1 - b2) g^2      w = (1 - lr wd) w - lr / (1 - b1^t) * m / (sqrt(v) / sqrt(1 - b2^t) + eps)

bf16 weights are widened, updated in fp32 and rounded stochastically in the same pass: rounding to nearest would drop every
update below 2^-9 of the weight. Random bits are a hash of (key, index), so a resumed run draws the same ones. Every number's update
depends on itself alone: the same bits for any tiling and any number of threads. 28 bytes a number in fp32: bound by memory.

Mixed precision (`update_master`): the weights are fp32 masters, the gradient is bf16 (or fp32, summed) and is scaled on the way in,
and the bf16 copy that the model computes with, rounded to nearest even, is written on the way out: 28 bytes a number too. `ahead`:
the copy is where the weights will be if the next update is this one again.

Loshchilov & Hutter 2019, arXiv 1711.05101, algorithm 2.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lilliput.ops import native


@dataclass(frozen=True)
class Rule:
    """The numbers of one update."""

    lr: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    step: int  # from 1


def supports(weight: Tensor, gradient: Tensor) -> str | None:
    """Why the extension cannot update this tensor; None when it can."""
    if native.module() is None:
        return native.missing()
    if weight.device.type != "cpu" or weight.dtype not in (torch.float32, torch.bfloat16) or gradient.dtype != weight.dtype:
        return f"it takes fp32 or bf16 on the CPU with gradients alike, got {weight.dtype} and {gradient.dtype} on {weight.device.type}"
    return None if weight.is_contiguous() else "it takes contiguous weights"


@torch.no_grad()
def update(weight: Tensor, gradient: Tensor, first: Tensor, second: Tensor, rule: Rule, key: int) -> None:
    """One update of a weight and its fp32 moments, in place. key: of the rounding of bf16 weights."""
    if supports(weight, gradient) is not None:
        return reference(weight, gradient, first, second, rule, key)
    (UPDATE if native.watched(weight) else _update)(weight, gradient.contiguous(), first, second, *_numbers(rule), (key + _HALF) % (2 * _HALF) - _HALF)


@torch.no_grad()
def update_master(weight: Tensor, gradient: Tensor, first: Tensor, second: Tensor, copy: Tensor, rule: Rule, scale: float = 1.0,
                  ahead: bool = False) -> None:  # fmt: skip
    """One update of fp32 masters and moments by `scale` times a bf16 or fp32 gradient, in place; `copy` (bf16) becomes the masters rounded,
    or, `ahead`, the masters with what the update changed added once more.

    All flat and contiguous, of as many numbers, on the CPU; elsewhere and without kernels by plain torch.
    """
    given = (weight, gradient, first, second, copy)
    if native.module() is None or any(t.device.type != "cpu" or not t.is_contiguous() for t in given):
        before = weight.clone() if ahead else weight
        reference(weight, gradient.float() * scale, first, second, rule, 0)
        copy.copy_(weight + (weight - before) if ahead else weight)
        return
    kinds = [t.dtype for t in given]
    assert kinds[0] == kinds[2] == kinds[3] == torch.float32 and kinds[1] in (torch.float32, torch.bfloat16), f"masters and moments are fp32, not {kinds}"
    assert kinds[4] == torch.bfloat16 and len({t.numel() for t in given}) == 1, f"the copy is bf16, of as many numbers: {kinds}, {[t.numel() for t in given]}"
    (UPDATE_MASTER if native.watched(weight) else _update_master)(weight, gradient, first, second, copy, ahead, scale, *_numbers(rule))


def _numbers(rule: Rule) -> tuple[float, float, float, float, float, float, float]:
    b1, b2 = rule.betas
    return rule.lr, b1, b2, rule.eps, 1 - rule.lr * rule.weight_decay, 1 - b1**rule.step, (1 - b2**rule.step) ** 0.5


@torch.no_grad()
def reference(weight: Tensor, gradient: Tensor, first: Tensor, second: Tensor, rule: Rule, key: int) -> None:
    """The same by plain torch, on any device; other random bits."""
    wide, g, (b1, b2) = weight.float(), gradient.float(), rule.betas
    first.lerp_(g, 1 - b1)
    second.mul_(b2).addcmul_(g, g, value=1 - b2)
    bottom = second.sqrt() / (1 - b2**rule.step) ** 0.5 + rule.eps
    wide = wide * (1 - rule.lr * rule.weight_decay) - rule.lr / (1 - b1**rule.step) * first / bottom
    weight.copy_(wide if weight.dtype == torch.float32 else round_stochastic(wide, key))


def round_stochastic(wide: Tensor, key: int) -> Tensor:
    """fp32 -> bf16 of the same shape: up or down with probability by distance, so that the mean is the fp32 value.

    The 16 bits that bf16 drops plus 16 random bits carry into the ones that stay. Infinities and NaN pass unchanged.
    """
    generator = torch.Generator(device=wide.device).manual_seed(key & 0x7FFFFFFFFFFFFFFF)
    noise = torch.randint(0, 1 << 16, wide.shape, dtype=torch.int32, device=wide.device, generator=generator)
    rounded = ((wide.view(torch.int32) + noise) & -65536).view(torch.float32)
    return torch.where(torch.isfinite(wide), rounded, wide).to(torch.bfloat16)


_HALF = 1 << 63  # a key is 64 bits, and torch's numbers have a sign


def _update(weight: Tensor, gradient: Tensor, first: Tensor, second: Tensor, lr: float, b1: float, b2: float, eps: float, decay: float, correction1: float,
            root2: float, key: int) -> None:  # fmt: skip
    native.module().adamw(weight.data_ptr(), gradient.data_ptr(), first.data_ptr(), second.data_ptr(), weight.numel(), weight.dtype == torch.bfloat16,
                          lr, b1, b2, eps, decay, correction1, root2, key % (2 * _HALF))  # fmt: skip
    torch.autograd.graph.increment_version((weight, first, second))  # what autograd saved of them is stale


def _update_master(weight: Tensor, gradient: Tensor, first: Tensor, second: Tensor, copy: Tensor, ahead: bool, scale: float, lr: float, b1: float, b2: float,
                   eps: float, decay: float, correction1: float, root2: float) -> None:  # fmt: skip
    native.module().adamw_master(weight.data_ptr(), gradient.data_ptr(), gradient.dtype == torch.float32, first.data_ptr(), second.data_ptr(),
                                 copy.data_ptr(), ahead, weight.numel(), scale, lr, b1, b2, eps, decay, correction1, root2)  # fmt: skip
    torch.autograd.graph.increment_version((weight, first, second, copy))


_STATE = "Tensor(a!) weight, Tensor gradient, Tensor(b!) first, Tensor(c!) second"
_RULE = "float lr, float b1, float b2, float eps, float decay, float correction1, float root2"
UPDATE = native.define(f"adamw({_STATE}, {_RULE}, int key) -> ()", _update, lambda *given: None)
UPDATE_MASTER = native.define(f"adamw_master({_STATE}, Tensor(d!) copy, bool ahead, float scale, {_RULE}) -> ()", _update_master, lambda *given: None)
