"""Where a server's memory goes, before it starts and without torch: weights as they are stored, cache blocks, the work of one step.

    weights     as the runner holds them, to the byte: models/stored.py
    cache       serve.kv_tokens, or as many tokens as the engine takes by itself: four contexts, at most a quarter of the free memory (of its
                share of it, where several replicas are on this machine)
    swap        serve.swap_tokens beside it
    adapters    serve.max_adapters of them, each as large as the largest that lies in serve.adapters; as narrow as ops/low_rank.py keeps them
    draft       a model that guesses: its weights, and a cache of as many tokens; other drafters read what is there
    embeddings  http.embeddings of a decoder: its weights once more, as the eager runner holds them
    a step      activations of one block for a full step, an upper bound
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lilliput.base import registry
from lilliput.base.show import size
from lilliput.models import safetensor
from lilliput.models.adapters import ranks
from lilliput.models.facts import facts
from lilliput.models.load import choose_runner, resolve
from lilliput.models.stored import PANEL, native_bytes
from lilliput.plan.ledgers import ELEMENT
from lilliput.serve.adapters import Library
from lilliput.serve.admission import cache_tokens, context_of
from lilliput.serve.blocks import BLOCK, blocks_for

if TYPE_CHECKING:
    from lilliput.base.job import Job, Serve
    from lilliput.models.checkpoints import Checkpoint
    from lilliput.models.spec import DecoderSpec

PARTS = ("swap", "adapters", "draft", "embeddings")
KV_BITS = {"fp32": 32, "fp16": 16, "int8": 8, "int4": 4}


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes of a server on a device with `free` bytes. `stored`: how the weights lie; `more`: part -> (bytes, in words); `draft_block`: of
    a block of the drafter's cache; `times`: such servers on the device."""

    weights: int
    stored: str
    parameters: int
    blocks: int
    block_bytes: int
    context: int
    step: int
    free: int
    step_tokens: int
    more: Mapping[str, tuple[int, str]]
    draft_block: int = 0
    times: int = 1

    @property
    def tokens(self) -> int:
        """That the cache holds."""
        return self.blocks * BLOCK

    @property
    def kv(self) -> int:
        """Bytes of the cache."""
        return self.blocks * self.block_bytes

    @property
    def total(self) -> int:
        """Bytes of all, of one server."""
        return self.weights + self.kv + self.step + sum(count for count, _ in self.more.values())

    @property
    def fits(self) -> bool:
        """Whether all of it is free now, as often as it is asked for."""
        return self.total * self.times <= self.free

    @property
    def fix(self) -> str:
        """What makes it fit: as many tokens of cache as are left, where the rest fits. A drafter's cache shrinks with it."""
        each = self.block_bytes + self.draft_block
        left = (self.free // self.times - self.total + self.blocks * each) // each * BLOCK
        return f"serve.kv_tokens={left}" if left > 0 else "serve.weights=q4, or a smaller model"

    def rows(self) -> Iterator[tuple[str, int, str]]:
        """(part, bytes, in words)."""
        yield "weights", self.weights, f"{self.parameters:,} parameters as {self.stored}"
        shared = f"{self.tokens / self.context:.1f} contexts of {self.context:,}"
        yield "cache", self.kv, f"{self.blocks:,} blocks of {BLOCK} tokens, {size(self.block_bytes)} each: {self.tokens:,} tokens, {shared}"
        for part, (count, words) in self.more.items():
            yield part, count, words
        yield "a step", self.step, f"{self.step_tokens:,} tokens at most"
        yield "together", self.total, f"{size(self.free)} are free"

    def document(self) -> dict[str, Any]:
        """For --json."""
        return {
            "weights": self.weights, "stored": self.stored, "parameters": self.parameters, "kv": self.kv, "blocks": self.blocks, "block_tokens": BLOCK,
            "block_bytes": self.block_bytes, "kv_tokens": self.tokens, "context": self.context,
            **{part: self.more.get(part, (0, ""))[0] for part in PARTS}, "step": self.step, "total": self.total, "free": self.free, "fits": self.fits,
        }  # fmt: skip


def memory_plan(job: Job, free: int, device: str = "cpu", times: int = 1) -> tuple[MemoryPlan, str, str]:
    """(plan, runner, why that one) of a job's model served on a device of this kind with `free` bytes, `times` times. Fetches nothing."""
    spec, checkpoint = resolve(job.top.model, fetch=False)
    serve, dtype = job.serve, job.top.dtype
    runner, reason = choose_runner(spec, serve, device)
    about, context = facts(spec), context_of(serve.context, spec.context)
    weights, stored, half = weight_bytes(spec, checkpoint, serve, runner, dtype)
    assert about.kv is not None and about.activations is not None, "a decoder states its cache and its activations"
    tokens = serve.kv_tokens or cache_tokens(context, free // times, about.kv.bytes_per_token(4))
    rows, blocks, swapped = min(serve.max_batch_tokens, tokens), blocks_for(tokens), serve.swap_tokens // BLOCK
    step = sum(a.size for a in about.activations(1, rows, 4) if a.per == "block" and a.saved) + 4 * spec.vocab * 16
    block = kv_token_bytes(spec, serve.kv if runner == "native" else "fp32") * BLOCK
    more: dict[str, tuple[int, str]] = {"swap": (swapped * block, f"{swapped:,} blocks")} if swapped else {}
    if serve.adapters:
        more["adapters"] = _adapters(spec, serve, runner, half)
    draft_block = 0
    if serve.draft and serve.draft.partition(":")[0] not in registry.names("drafter"):
        kept, draft_block, how = _draft(serve, device)
        cache = draft_block * blocks
        more["draft"] = kept + cache, f"{serve.draft}: weights {size(kept)} as {how}, cache {size(cache)}"
    if job.http.embeddings != "off":
        more["embeddings"] = about.parameters * ELEMENT[dtype], f"{about.parameters:,} parameters as {dtype}, from the first request on"
    plan = MemoryPlan(weights, stored, about.parameters, blocks, block, context, step, free, serve.max_batch_tokens, more, draft_block, times)
    return plan, runner, reason


def kv_token_bytes(spec: DecoderSpec, codec: str) -> int:
    """Bytes of one token's keys and values over all layers; int8 and int4 have a scale and a minimum a head."""
    head = spec.head_dim * KV_BITS[codec] // 8 + (4 if codec in ("int8", "int4") else 0)
    return 2 * spec.layers * spec.kv_heads * head


def adapter_bytes(spec: DecoderSpec, ranks: Mapping[str, int], runner: str, half: bool) -> int:
    """Bytes of one adapter (rank of each Linear that it updates) as a runner holds it: compiled kernels read outputs in panels of 16."""
    shapes, total = spec.shapes(), 0
    for path, rank in ranks.items():
        outputs, inputs = shapes[f"{path}.weight"]
        total += rank * (inputs + (-(-outputs // PANEL) * PANEL if runner == "native" else outputs))
    return total * (2 if half else 4)


def _adapters(spec: DecoderSpec, serve: Serve, runner: str, half: bool) -> tuple[int, str]:
    found = Library(serve.adapters).found()
    each = max((adapter_bytes(spec, ranks(folder, spec), runner, half) for folder in found.values()), default=0)
    return serve.max_adapters * each, f"{serve.max_adapters} at most, {size(each)} each in {'fp16' if half else 'fp32'}; {len(found)} are loaded at the start"


def _draft(serve: Serve, device: str) -> tuple[int, int, str]:
    """(bytes of weights, bytes of a block of its cache, how they are stored) of the model that guesses."""
    spec, checkpoint = resolve(serve.draft, fetch=False)
    runner, _ = choose_runner(spec, serve, device)
    weights, stored, _ = weight_bytes(spec, checkpoint, serve, runner, "fp32")
    return weights, BLOCK * kv_token_bytes(spec, serve.kv if runner == "native" else "fp32"), stored


def weight_bytes(spec: DecoderSpec, checkpoint: Checkpoint | None, serve: Serve, runner: str, dtype: str) -> tuple[int, str, bool]:
    """(bytes, how they are stored, whether adapters beside them are fp16)."""
    if runner != "native":
        return facts(spec).parameters * ELEMENT[dtype], dtype, False
    on_read = registry.made("kv_policy", serve.policy).positions == "in_cache"
    held = native_bytes(spec, serve.weights, checkpoint.layout if checkpoint else lambda name: None, on_read)
    most = sorted(held.formats, key=lambda name: -held.formats[name])
    stored = " and ".join(f"{name} ({size(held.formats[name])})" for name in most) if len(most) > 1 else most[0]
    return held.bytes, stored + (", as in the file" if serve.weights == "file" and most != ["f32"] else ""), held.narrow


def encoder_bytes(folder: Path) -> int:
    """Of a BERT-class encoder as models/encoder.py holds it: fp32, and the matrices of its blocks once more in panels."""
    headers = {name: entry.shape for name, (_, entry) in safetensor.shards(folder).items()}
    inside = {name.removeprefix("bert."): math.prod(shape) for name, shape in headers.items() if not name.startswith("cls.")}
    kept = {name: count for name, count in inside.items() if name.startswith(("embeddings.", "encoder.", "pooler.")) and not name.endswith("position_ids")}
    panels = sum(count for name, count in kept.items() if name.startswith("encoder.") and "LayerNorm" not in name and name.endswith("weight"))
    return 4 * (sum(kept.values()) + panels)
