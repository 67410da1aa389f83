"""AdamW whose two moments are fp32 whatever the weights are stored in, with its state under parameter names.

fp32 weights: torch.optim.AdamW's update to the last bits, in one pass of a compiled kernel (ops/adamw.py).
bf16 weights: no fp32 master copy (10 bytes a parameter instead of 14); each tensor is rounded back stochastically. The random
bits come from a hash keyed by (seed, step, tensor, index), so a resumed run draws the same ones.

Loshchilov & Hutter 2019, arXiv 1711.05101, algorithm 2.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from lilliput.base.seeds import key
from lilliput.dist.link import lasting
from lilliput.ops.adamw import Rule, update


class AdamW:
    """Decoupled weight decay on tensors of two or more dims; none on norms and biases."""

    def __init__(self, parameters: Mapping[str, torch.nn.Parameter], *, betas: tuple[float, float], eps: float, weight_decay: float, seed: int) -> None:
        self.parameters = dict(parameters)
        self.betas, self.eps, self.weight_decay, self.seed = betas, eps, weight_decay, seed
        self.steps = 0
        zeros = lambda p: lasting(p.shape, torch.float32) if p.device.type == "cpu" else torch.zeros_like(p, dtype=torch.float32)
        self.first = {n: zeros(p) for n, p in self.parameters.items()}
        self.second = {n: zeros(p) for n, p in self.parameters.items()}

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """One update at this learning rate from the `.grad` of each parameter that has one."""
        self.steps += 1
        for name, parameter in self.parameters.items():
            if parameter.grad is not None:
                rule = Rule(lr, self.betas, self.eps, self.weight_decay if parameter.dim() >= 2 else 0.0, self.steps)
                update(parameter, parameter.grad, self.first[name], self.second[name], rule, key(self.seed, self.steps, name))

    def zero_grad(self) -> None:
        """Free the gradients."""
        for parameter in self.parameters.values():
            parameter.grad = None

    def state(self) -> dict[str, torch.Tensor]:
        """Moments by `first.<name>` and `second.<name>`; the step count is `steps`, kept beside."""
        return {f"first.{n}": t for n, t in self.first.items()} | {f"second.{n}": t for n, t in self.second.items()}

    def restore(self, tensors: Mapping[str, torch.Tensor], steps: int) -> None:
        """Copy a saved state back; KeyError when a tensor is missing."""
        for name, tensor in self.state().items():
            tensor.copy_(tensors[name])
        self.steps = steps
