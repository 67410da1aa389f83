"""AdamW whose two moments are fp32 whatever the weights are stored in, with its state under parameter names.

fp32 weights: torch's fused kernel over all tensors, bitwise torch.optim.AdamW(fused=True).
bf16 weights: no fp32 master copy (10 bytes a parameter instead of 14). Each tensor is widened, updated in fp32 and
rounded back stochastically, since rounding to nearest would drop every update below 2^-9 of the weight. The random
bits come from a counter keyed by (seed, step, tensor), so a resumed run draws the same ones.

Loshchilov & Hutter 2019, arXiv 1711.05101, algorithm 2.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from lilliput.base.seeds import key


class AdamW:
    """Decoupled weight decay on tensors of two or more dims; none on norms and biases."""

    def __init__(self, parameters: Mapping[str, torch.nn.Parameter], *, betas: tuple[float, float], eps: float, weight_decay: float, seed: int) -> None:
        self.parameters = dict(parameters)
        self.betas, self.eps, self.weight_decay, self.seed = betas, eps, weight_decay, seed
        self.steps = 0
        self.first = {n: torch.zeros_like(p, dtype=torch.float32) for n, p in self.parameters.items()}
        self.second = {n: torch.zeros_like(p, dtype=torch.float32) for n, p in self.parameters.items()}
        self._exact = [n for n, p in self.parameters.items() if p.dtype == torch.float32]
        self._rounded = [n for n, p in self.parameters.items() if p.dtype != torch.float32]

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """One update at this learning rate from the `.grad` of each parameter that has one."""
        self.steps += 1
        for decayed in (True, False):
            names = [n for n in self._exact if (self.parameters[n].dim() >= 2) == decayed and self.parameters[n].grad is not None]
            if names:
                self._fused(names, [self.parameters[n] for n in names], [self.parameters[n].grad for n in names], lr, decayed)
        for name in self._rounded:
            parameter = self.parameters[name]
            if parameter.grad is None:
                continue
            wide = parameter.float()
            self._fused([name], [wide], [parameter.grad.float()], lr, parameter.dim() >= 2)
            parameter.copy_(round_stochastic(wide, key(self.seed, self.steps, name)))

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

    def _fused(self, names: list[str], weights: list, gradients: list, lr: float, decayed: bool) -> None:
        counts = [torch.tensor(float(self.steps), device=w.device) for w in weights]
        torch._fused_adamw_(
            weights, gradients, [self.first[n] for n in names], [self.second[n] for n in names], [], counts,
            lr=lr, beta1=self.betas[0], beta2=self.betas[1], weight_decay=self.weight_decay if decayed else 0.0,
            eps=self.eps, amsgrad=False, maximize=False,
        )  # fmt: skip


def round_stochastic(wide: torch.Tensor, seed: int) -> torch.Tensor:
    """fp32 -> bf16 of the same shape: up or down with probability by distance, so that the mean is the fp32 value.

    The 16 bits that bf16 drops plus 16 random bits carry into the ones that stay. Infinities and NaN pass unchanged.
    """
    generator = torch.Generator(device=wide.device).manual_seed(seed)
    noise = torch.randint(0, 1 << 16, wide.shape, dtype=torch.int32, device=wide.device, generator=generator)
    rounded = ((wide.view(torch.int32) + noise) & -65536).view(torch.float32)
    return torch.where(torch.isfinite(wide), rounded, wide).to(torch.bfloat16)
