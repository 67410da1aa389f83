"""Low-rank adapters as files, in peft's layout: adapter_config.json and adapter_model.safetensors.

Where a family's checkpoint keeps q, k and v as one matrix (GPT-2's c_attn), three updates of rank r become one of rank
3r with stacked A and block-diagonal B; the product is the same. Read back, any update of the joint matrix is cut by rows.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lilliput.base.errors import UserError
from lilliput.models.families import checkpoint_names

if TYPE_CHECKING:
    from lilliput.models.spec import DecoderSpec

PREFIX = "base_model.model."
Pair = tuple[torch.Tensor, torch.Tensor]  # A [rank, in], B [out, rank]


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
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2))


def read_adapter(folder: Path, spec: DecoderSpec, scale: float) -> dict[str, Pair]:
    """Canonical path -> (A, B), such that scale x B A is the stored update. UserError when the folder holds no LoRA of this model."""
    from safetensors.torch import load_file

    if not (folder / "adapter_config.json").is_file() or not (folder / "adapter_model.safetensors").is_file():
        raise UserError(f"{folder} holds no adapter", "adapter_config.json and adapter_model.safetensors are expected", "lora.adapter=runs/x/adapter")
    config = json.loads((folder / "adapter_config.json").read_text())
    refused = [k for k in ("use_dora", "layer_replication", "use_rslora", "modules_to_save") if config.get(k)]
    if config.get("peft_type") != "LORA" or refused:
        raise UserError(f"{folder} is not a plain LoRA adapter", f"peft_type={config.get('peft_type')} {' '.join(refused)}".strip())
    tensors = load_file(folder / "adapter_model.safetensors")
    result = {}
    for path, (module, transform) in modules(spec).items():
        a, b = tensors.get(f"{PREFIX}{module}.lora_A.weight"), tensors.get(f"{PREFIX}{module}.lora_B.weight")
        if a is None or b is None:
            continue
        name = module.rsplit(".", 1)[-1]
        stored = config.get("alpha_pattern", {}).get(name, config["lora_alpha"]) / config.get("rank_pattern", {}).get(name, config["r"])
        if is_slice(transform):
            b = b.chunk(transform[2])[transform[1]]
        result[path] = (a.float(), b.float() * (stored / scale))
    if not result:
        raise UserError(f"the adapter in {folder} touches no Linear of this model", f"it has {', '.join(sorted(tensors)[:3])} ...")
    return result


def is_slice(transform: Any) -> bool:
    """True where a parameter is a part of a joint checkpoint matrix: ("slice", part, parts, ...)."""
    return isinstance(transform, tuple) and transform[0] == "slice"
