"""What runs of training papers share: a decoder from scratch on the CPU with some rooms, assembled as a job's is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lilliput.models.spec import DecoderSpec
    from lilliput.parallel.rig import Rig

KNOBS = {"betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


def rig(spec: DecoderSpec, rooms: Mapping[str, Any], *, seed: int = 0, sequences: int = 1, tokens: int = 1024, clip: float = 1.0,
        optimizer: Mapping[str, Any] = KNOBS) -> Rig:  # fmt: skip
    """A complete rig, fp32. sequences x tokens: of one micro-batch."""
    import torch

    from lilliput.base.hardware import declared
    from lilliput.base.protocols import Site
    from lilliput.models.decoder import Decoder, init_tensor
    from lilliput.parallel.rig import assemble

    with torch.device("meta"):
        model = Decoder(spec)
    return assemble(
        model, rooms, site=Site(declared("laptop"), sequences=sequences, tokens=tokens), device=torch.device("cpu"), seed=seed, dtype="fp32", read=None,
        init=lambda name, shape, seed: init_tensor(name, shape, seed, spec), optimizer=optimizer, clip=clip,
    )  # fmt: skip
