"""Small rigs for tests: one decoder, some rooms, random tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from lilliput.base.hardware import detect
from lilliput.base.protocols import Site
from lilliput.data.batch import MicroBatch
from lilliput.models.decoder import Decoder, init_tensor
from lilliput.models.sizes import PRESETS
from lilliput.models.spec import DecoderSpec
from lilliput.parallel.rig import Rig, assemble

ADAMW = {"betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


def make_rig(
    rooms: Mapping[str, Any],
    spec: DecoderSpec | None = None,
    *,
    dtype: str = "fp32",
    dropout: float = 0.0,
    sequences: int = 2,
    tokens: int = 32,
    micro_batches: int = 1,
    device: str = "cpu",
    blocks: Callable[[str], Any] = lambda name: None,
    budget: Mapping[str, int] | None = None,
    plans: Mapping[str, Any] | None = None,
) -> Rig:
    """A rig with fresh weights (seed 0)."""
    spec = spec or PRESETS["tiny"]
    with torch.device("meta"):
        model = Decoder(spec)
    model.dropout = dropout
    site = Site(hardware=detect(), sequences=sequences, tokens=tokens, element=4 if dtype == "fp32" else 2, micro_batches=micro_batches)
    return assemble(
        model, rooms, site=site, device=torch.device(device), seed=0, dtype=dtype, read=None,
        init=lambda name, shape, seed: init_tensor(name, shape, seed, spec), optimizer=ADAMW, clip=1.0, blocks=blocks, budget=budget, plans=plans,
    )  # fmt: skip


def random_batch(vocab: int, *, micros: int = 2, sequences: int = 2, tokens: int = 32, seed: int = 0) -> list[MicroBatch]:
    """Micro-batches of random tokens and targets."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda: torch.randint(0, vocab, (sequences, tokens), generator=generator)
    return [MicroBatch(draw(), draw(), sequences * tokens) for _ in range(micros)]
