"""From a name to a model that runs, and from a name to its spec without torch.

Weights are built on the meta device and filled one tensor at a time, so loading needs the model and one tensor, once.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lilliput.base.errors import UserError
from lilliput.models import hub, sizes
from lilliput.models.checkpoints import Checkpoint, materialise, open_checkpoint
from lilliput.models.spec import DecoderSpec

if TYPE_CHECKING:
    from lilliput.data.tokenizer import Tokenizer
    from lilliput.models.decoder import Decoder


def resolve_spec(name: str, fetch: bool = True) -> tuple[DecoderSpec, Path | None]:
    """The spec of a path, a model's name or a preset, and where its weights lie (None: it is a size without weights).

    fetch=False never downloads: a known model that is not on this machine is answered with its preset.
    UserError for an unknown name or a damaged file.
    """
    path = hub.found(name)
    if path is None and name in sizes.PRESETS and not (fetch and name in hub.MODELS):
        return sizes.PRESETS[name], None
    path = path or hub.locate(name, fetch=fetch)
    return open_checkpoint(path).spec, path


def load_model(name_or_path: str | Path, device: str = "auto", dtype: str = "fp32") -> tuple[Decoder, Tokenizer, Checkpoint]:
    """A model in eval mode, its tokenizer and its checkpoint. dtype: "fp32" or "bf16", how the weights are stored.

    UserError for an unknown name, a size without weights, a damaged file, a missing tokenizer or device; the first four
    before torch is loaded.
    """
    checkpoint = open_checkpoint(hub.locate(str(name_or_path)))
    tokenizer = checkpoint.tokenizer()
    import torch

    from lilliput.models.decoder import Decoder

    place = pick_device(device)
    with torch.device("meta"):
        model = Decoder(checkpoint.spec)
    return materialise(model, checkpoint, dtype, place).eval(), tokenizer, checkpoint


def pick_device(device: str) -> str:
    """torch's name of "auto" (CUDA where there is one, else the CPU), "cpu", "cuda" or "cuda:N"; UserError when it is not there."""
    import torch

    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, number = device.partition(":")
    if kind not in ("cpu", "cuda") or (number and not number.isdigit()):
        raise UserError(f"unknown device `{device}`", "known: auto, cpu, cuda, cuda:N", "device=auto")
    if kind == "cuda" and int(number or 0) >= torch.cuda.device_count():
        raise UserError(f"there is no device `{device}`", f"torch sees {torch.cuda.device_count()} CUDA devices", "device=cpu")
    return device
