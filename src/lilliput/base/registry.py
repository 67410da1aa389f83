"""The one table of rooms: kind -> name -> where its class lives. Nothing is imported until it is asked for.

Adding a technique is one file and one line here; loops, engine, planner, CLI and tests find it through this table.
Cost: a dictionary look-up and, at first use, the import of a torch-free file (milliseconds).
"""

from __future__ import annotations

import importlib
from typing import Any

from lilliput.base.errors import UserError, did_you_mean

ROOMS: dict[str, dict[str, str]] = {
    "train": {
        "chunked": "lilliput.train.chunked:Chunked",
        "fp8": "lilliput.train.fp8:Fp8",
        "infinity": "lilliput.train.infinity:Infinity",
        "lora": "lilliput.train.lora:Lora",
        "offload": "lilliput.train.offload:Offload",
        "paged": "lilliput.train.paged:Paged",
        "poet": "lilliput.train.poet:Poet",
        "qlora": "lilliput.train.qlora:Qlora",
        "remat": "lilliput.train.remat:Remat",
    },
    "kv_policy": {
        "full": "lilliput.serve.policies.full:Full",
        "sliding": "lilliput.serve.policies.sliding:Sliding",
        "sinks": "lilliput.serve.policies.sinks:Sinks",
        "heavy_hitter": "lilliput.serve.policies.heavy_hitter:HeavyHitter",
    },
    "drafter": {
        "ngram": "lilliput.serve.drafters.ngram:NGram",
        "layers": "lilliput.serve.drafters.by_model:Layers",
        "draft_model": "lilliput.serve.drafters.by_model:Model",
    },
}


def names(kind: str) -> list[str]:
    """Registered names of a kind, in table order."""
    return list(ROOMS[kind])


def find(kind: str, name: str) -> Any:
    """The class registered under (kind, name); UserError with the nearest name when there is none."""
    table = ROOMS[kind]
    if name not in table:
        raise UserError(f"unknown {kind.replace('_', ' ')} `{name}`", fix=did_you_mean(name, table))
    module, _, attribute = table[name].partition(":")
    return getattr(importlib.import_module(module), attribute)


def made(kind: str, words: str) -> Any:
    """What "name:argument" (or "name") asks for, made from its argument. UserError as `find`, and what the class says of the argument."""
    name, _, argument = words.partition(":")
    return find(kind, name)(argument)
