"""Gradients that leave the device as they come: each is handed on when the backward pass has completed it, and its parameter keeps none."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch


def when_complete(parameters: Mapping[str, torch.nn.Parameter], take: Callable[[str, torch.Tensor], None]) -> None:
    """From now on take(name, gradient), for every gradient that is complete."""

    def hand_on(name: str, parameter: torch.Tensor) -> None:
        gradient, parameter.grad = parameter.grad, None
        assert gradient is not None, f"autograd completed the gradient of {name}"
        take(name, gradient)

    for name, parameter in parameters.items():
        parameter.register_post_accumulate_grad_hook(lambda p, name=name: hand_on(name, p))
