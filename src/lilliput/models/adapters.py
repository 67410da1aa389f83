"""Low-rank adapters as files, in peft's layout: adapter_config.json and adapter_model.safetensors.

Where a family's checkpoint keeps q, k and v as one matrix (GPT-2's c_attn), three updates of rank r become one of rank
3r with stacked A and block-diagonal B; the product is the same. Read back, any update of the joint matrix is cut by rows.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lilliput.base.errors import UserError
from lilliput.models import safetensor
from lilliput.models.families import checkpoint_names

if TYPE_CHECKING:
    import torch

    from lilliput.models.spec import DecoderSpec

    Pair = tuple[torch.Tensor, torch.Tensor]  # A [rank, in], B [out, rank]

PREFIX = "base_model.model."
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def modules(spec: DecoderSpec) -> dict[str, tuple[str, Any]]:
    """Canonical Linear path -> (module path in transformers, transform of its weight)."""
    result = {}
    for name, (sources, transform) in checkpoint_names(spec).items():
        path, _, leaf = name.rpartition(".")
        if leaf == "weight" and path.endswith("_proj"):
            result[path] = (sources[0].removesuffix(".weight"), transform)
    return result


def write_adapter(folder: Path, spec: DecoderSpec, pairs: Mapping[str, Pair], *, rank: int, alpha: float, dropout: float) -> None:
    """Write the updates B A (scaled by alpha / rank when applied) so that peft.PeftModel.from_pretrained reads them."""
    import torch
    from safetensors.torch import save_file

    places = modules(spec)
    joined: dict[str, list[tuple[int, int, Pair]]] = {}
    tensors: dict[str, torch.Tensor] = {}
    for path, (a, b) in pairs.items():
        module, transform = places[path]
        if is_slice(transform):
            joined.setdefault(module, []).append((transform[1], transform[2], (a.detach(), b.detach())))
        else:
            tensors[f"{PREFIX}{module}.lora_A.weight"], tensors[f"{PREFIX}{module}.lora_B.weight"] = a.detach().contiguous(), b.detach().contiguous()
    ranks, alphas = {}, {}
    for module, parts in joined.items():
        rows, count = parts[0][2][1].shape[0], parts[0][1]
        a = torch.cat([a for _, _, (a, _) in parts])
        b = a.new_zeros(rows * count, rank * len(parts))
        for column, (part, _, (_, update)) in enumerate(parts):
            b[part * rows : (part + 1) * rows, column * rank : (column + 1) * rank] = update
        tensors[f"{PREFIX}{module}.lora_A.weight"], tensors[f"{PREFIX}{module}.lora_B.weight"] = a, b
        name = module.rsplit(".", 1)[-1]
        ranks[name], alphas[name] = rank * len(parts), alpha * len(parts)
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": None, "inference_mode": True, "bias": "none",
        "r": rank, "lora_alpha": alpha, "lora_dropout": dropout, "fan_in_fan_out": spec.family == "gpt2",
        "target_modules": sorted({places[path][0].rsplit(".", 1)[-1] for path in pairs}), "rank_pattern": ranks, "alpha_pattern": alphas,
    }  # fmt: skip
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(config, indent=2))


def read_adapter(folder: Path, spec: DecoderSpec, scale: float) -> dict[str, Pair]:
    """Canonical path -> (A, B) fp32, such that scale x B A is the stored update. UserError as `ranks` says."""
    result = {}
    for path, (names, rank, alpha, transform) in _checked(folder, spec).items():
        a, b = (safetensor.read(folder / WEIGHTS, name).float() for name in names)
        result[path] = (a, (b.chunk(transform[2])[transform[1]] if is_slice(transform) else b) * (alpha / rank / scale))
    return result


def ranks(folder: Path, spec: DecoderSpec) -> dict[str, int]:
    """Canonical path -> the rank of its update.

    UserError, from the files' headers alone, for a folder that holds no plain LoRA of this model: each tensor's name and shape must be
    what the model and the configuration say, and none may be left over.
    """
    return {path: rank for path, (_, rank, _, _) in _checked(folder, spec).items()}


def _checked(folder: Path, spec: DecoderSpec) -> dict[str, tuple[list[str], int, float, Any]]:
    """Canonical path -> the names of A and B in the file, their rank and alpha, and which part of B is the path's."""
    config, entries = _config(folder), safetensor.read_header(_file(folder, WEIGHTS))
    strange = [name for name, entry in entries.items() if entry.dtype not in safetensor.FLOATS]
    if strange:
        raise UserError(f"the adapter in {folder} is not stored as floats", f"{strange[0]} is {entries[strange[0]].dtype}", "save it as fp32, fp16 or bf16")
    result, used = {}, set()
    for path, (module, transform) in modules(spec).items():
        names = [f"{PREFIX}{module}.lora_{part}.weight" for part in "AB"]
        if not any(name in entries for name in names):
            continue
        used.update(names)
        rank, alpha = _of(config, "r", "rank_pattern", module), _of(config, "lora_alpha", "alpha_pattern", module)
        rows, columns = spec.shapes()[f"{path}.weight"]
        parts = transform[2] if is_slice(transform) else 1
        for name, shape in zip(names, ((rank, columns), (rows * parts, rank))):
            found = list(entries[name].shape) if name in entries else "nothing"
            if found != list(shape):
                raise UserError(f"the adapter in {folder} does not fit this model", f"{name}: needs {list(shape)}, has {found}",
                                "an adapter fits the model that it was trained on")  # fmt: skip
        result[path] = (names, rank, alpha, transform)
    left = sorted(entries.keys() - used)
    if left:
        why = f"{len(left)} of {len(entries)} tensors belong to none of its Linears: {', '.join(left[:3])}"
        raise UserError(f"the adapter in {folder} does not fit this model", why, "an adapter fits the model that it was trained on")
    if not result:
        raise UserError(f"the adapter in {folder} touches no Linear of this model", "its file has no tensors")
    return result


def _file(folder: Path, name: str) -> Path:
    if not (folder / name).is_file():
        raise UserError(f"{folder} holds no adapter", f"{CONFIG} and {WEIGHTS} are expected, {name} is not there", "name a folder that a lora run wrote")
    return folder / name


def _config(folder: Path) -> dict[str, Any]:
    """The configuration of a plain LoRA."""
    try:
        config = json.loads(_file(folder, CONFIG).read_bytes())
        kind = config.get("peft_type")
        numbers = [config.get("r"), config.get("lora_alpha"), *config.get("rank_pattern", {}).values(), *config.get("alpha_pattern", {}).values()]
    except (ValueError, AttributeError, RecursionError) as error:
        raise UserError(f"{folder / CONFIG} cannot be read", f"{error or type(error).__name__}", "save the adapter again") from error
    refused = [k for k in ("use_dora", "layer_replication", "use_rslora", "modules_to_save", "target_parameters", "lora_bias") if config.get(k)]
    refused += [f"bias={config['bias']}"] if config.get("bias", "none") != "none" else []
    if kind != "LORA" or refused:
        raise UserError(f"{folder} is not a plain LoRA adapter", f"peft_type={kind} {' '.join(refused)}".strip())
    bad = [number for number in numbers if type(number) not in (int, float) or not 0 < number < 1e6]
    if bad:
        raise UserError(f"{folder / CONFIG} cannot be used", f"ranks and alphas are numbers above 0, got {bad[0]!r}", "save the adapter again")
    return config


def _of(config: dict[str, Any], key: str, patterns: str, module: str) -> Any:
    """A number of the configuration for one module: of the pattern that its name ends with, else the general one."""
    named = [value for name, value in config.get(patterns, {}).items() if module == name or module.endswith(f".{name}")]
    return named[0] if named else config[key]


def is_slice(transform: Any) -> bool:
    """True where a parameter is a part of a joint checkpoint matrix: ("slice", part, parts, ...)."""
    return isinstance(transform, tuple) and transform[0] == "slice"
