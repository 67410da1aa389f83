"""Random LoRA adapters, as files and merged into a model, for the tests of serve/."""

from __future__ import annotations

import copy
from pathlib import Path

import torch

from lilliput.models.adapters import write_adapter
from lilliput.models.decoder import Decoder
from lilliput.models.native import NativeDecoder

Pairs = dict[str, tuple[torch.Tensor, torch.Tensor]]
ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def pairs_of(model: Decoder, seed: int, rank: int = 4, targets: tuple[str, ...] = ALL) -> Pairs:
    """A and B of every target, large enough to change what a model of tests/served.py says."""
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for name, (rows, columns) in ((n, s) for n, s in model.spec.shapes().items() if len(s) == 2):
        path = name.removesuffix(".weight")
        if path.rpartition(".")[2] in targets:
            made[path] = (torch.randn(rank, columns, generator=generator) / columns**0.5, 0.3 * torch.randn(rows, rank, generator=generator))
    return made


def written(folder: Path, model: Decoder, seed: int, rank: int = 4, targets: tuple[str, ...] = ALL) -> Path:
    """The same in a folder, as the room `lora` writes it; alpha is 2 x rank."""
    folder.mkdir(parents=True)
    write_adapter(folder, model.spec, pairs_of(model, seed, rank, targets), rank=rank, alpha=2.0 * rank, dropout=0.0)
    return folder


def merged(model: Decoder, seed: int, rank: int = 4, targets: tuple[str, ...] = ALL) -> Decoder:
    """A copy of the model with the adapter of `written` added to its weights."""
    made = copy.deepcopy(model)
    with torch.no_grad():
        for path, (a, b) in pairs_of(model, seed, rank, targets).items():
            made.get_submodule(path).weight += 2.0 * b @ a
    return made


def lowered(model: Decoder) -> NativeDecoder:
    """The same weights on the native kernels, in fp32."""
    return NativeDecoder(model.spec, lambda name: model.get_parameter(name).detach(), weights="fp32")
