"""From a name to a model that runs, and from a name to its spec without torch.

Weights are built on the meta device and filled one tensor at a time, so loading needs the model and one tensor, once.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lilliput.base import hardware, registry
from lilliput.base.errors import UserError
from lilliput.models import hub, sizes
from lilliput.models.checkpoints import Checkpoint, materialise, open_checkpoint
from lilliput.models.spec import DecoderSpec
from lilliput.ops import native

if TYPE_CHECKING:
    from lilliput.base.job import Serve
    from lilliput.data.tokenizer import Tokenizer
    from lilliput.models.decoder import Decoder
    from lilliput.models.native import NativeDecoder


def resolve(name: str, fetch: bool = True) -> tuple[DecoderSpec, Checkpoint | None]:
    """The spec of a path, a model's name or a preset, and its opened checkpoint (None: it is a size without weights).

    fetch=False never downloads: a known model that is not on this machine is answered with its preset.
    UserError for an unknown name or a damaged file.
    """
    path = hub.found(name)
    if path is None and name in sizes.PRESETS and not (fetch and name in hub.MODELS):
        return sizes.PRESETS[name], None
    checkpoint = open_checkpoint(path or hub.locate(name, fetch=fetch))
    return checkpoint.spec, checkpoint


def resolve_spec(name: str, fetch: bool = True) -> tuple[DecoderSpec, Path | None]:
    """The same with the path alone."""
    spec, checkpoint = resolve(name, fetch)
    return spec, None if checkpoint is None else checkpoint.path


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


def choose_runner(spec: DecoderSpec, serve: Serve, device: str) -> tuple[str, str]:
    """("native" | "eager", reason), without torch. UserError when the section asks for what cannot run here."""
    refusal = native_refusal(spec, device)
    if serve.runner == "eager":
        return "eager", "asked for"
    if refusal is None:
        return "native", "asked for" if serve.runner == "native" else f"compiled kernels are here ({native.level()})"
    if serve.runner == "native":
        raise UserError("serve.runner=native cannot run this model here", refusal, "serve.runner=auto")
    if serve.weights not in ("file", "fp32") or serve.kv != "fp32":
        wanted = f"serve.weights={serve.weights}" if serve.weights not in ("file", "fp32") else f"serve.kv={serve.kv}"
        raise UserError(f"{wanted} needs the native runner", refusal, "serve.weights=file serve.kv=fp32")
    return "eager", refusal


def load_to_serve(name_or_path: str | Path, serve: Serve, device: str = "auto", dtype: str = "fp32") -> tuple[Decoder | NativeDecoder, Tokenizer, str]:
    """A model as the section `serve` asks for it, its tokenizer, and why it runs as it does. UserError as load_model.

    Only one form is in memory: the native runner packs each matrix as it is read. `dtype` is the eager runner's storage.
    """
    checkpoint = open_checkpoint(hub.locate(str(name_or_path)))
    place = pick_device(device)
    kind, reason = choose_runner(checkpoint.spec, serve, place)
    if kind == "eager":
        model, tokenizer, _ = load_model(name_or_path, device, dtype)
        return model, tokenizer, f"eager: {reason}"
    tokenizer = checkpoint.tokenizer()
    from lilliput.models.native import NativeDecoder

    on_read = registry.made("kv_policy", serve.policy).positions == "in_cache"
    lowered = NativeDecoder(checkpoint.spec, checkpoint.read, checkpoint.layout, checkpoint.packed, serve.weights, kv=serve.kv, rotate_on_read=on_read)
    hardware.trim()  # matrices were read whole and packed: without it 40 to 100 MB of a 135M model stay with the heap
    return lowered, tokenizer, f"native: {reason}"


def native_refusal(spec: DecoderSpec, device: str) -> str | None:
    """Why this model cannot run on the compiled kernels here; None when it can."""
    if native.missing():
        return native.missing()
    if not device.startswith("cpu"):
        return f"compiled kernels run on CPUs, the device is {device}"
    return f"heads of {spec.head_dim} are wider than 256" if spec.head_dim > 256 else None


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
