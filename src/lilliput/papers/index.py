"""All 27 systems, in the order of the house: training apart, training on little, serving, compression, models at work.

Listing them imports 27 small files without torch (milliseconds); torch loads when a claim is measured.
"""

from __future__ import annotations

import importlib

from lilliput.base.errors import UserError, did_you_mean
from lilliput.papers.paper import Paper

GROUPS: dict[str, tuple[str, ...]] = {
    "training on many devices": ("gpipe", "zero", "megatron", "sequence_parallelism", "zeropp"),
    "training on limited memory": ("checkpointing", "zero_offload", "zero_infinity", "poet", "qlora", "fp8"),
    "serving": ("flash_attention", "deepspeed_inference", "byte_transformer", "paged_attention", "flexgen", "et", "speculative"),
    "compression and sparsity": ("streaming_llm", "h2o", "smoothquant", "gptq", "deja_vu"),
    "models at work": ("instaflow", "petal", "autogen", "dcn_v2"),
}


def papers() -> dict[str, list[Paper]]:
    """Group -> its papers, in table order."""
    return {group: [importlib.import_module(f"lilliput.papers.{file}").PAPER for file in files] for group, files in GROUPS.items()}


def find(name: str) -> Paper:
    """The paper of this name or system name, in any case; UserError with the nearest one otherwise."""
    known = [paper for group in papers().values() for paper in group]
    for paper in known:
        if name.lower() in (paper.name, paper.system.lower()):
            return paper
    raise UserError(f"unknown paper `{name}`", fix=did_you_mean(name.lower(), [paper.name for paper in known]))
