"""Where a server's memory goes, before it starts and without torch: weights as they are stored, cache blocks, the work of one step.

    weights   as the runner holds them, to the byte: models/stored.py
    cache     serve.kv_tokens, or as many tokens as the engine takes by itself: four contexts, at most a quarter of the free memory
    swap      serve.swap_tokens beside it
    adapters  serve.max_adapters of them, each as large as the largest that lies in serve.adapters; as narrow as ops/low_rank.py keeps them
    a step    activations of one block for a full step, an upper bound
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lilliput.base import registry
from lilliput.base.show import size
from lilliput.models.adapters import ranks
from lilliput.models.facts import facts
from lilliput.models.stored import PANEL, native_bytes
from lilliput.plan.ledgers import ELEMENT
from lilliput.serve.adapters import Library
from lilliput.serve.admission import context_of
from lilliput.serve.blocks import BLOCK, blocks_for

if TYPE_CHECKING:
    from lilliput.base.job import Serve
    from lilliput.models.checkpoints import Checkpoint
    from lilliput.models.spec import DecoderSpec

KV_BITS = {"fp32": 32, "fp16": 16, "int8": 8, "int4": 4}


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes of a server on a device with `free` bytes. `stored`: how the weights lie."""

    weights: int
    stored: str
    parameters: int
    blocks: int
    block_bytes: int
    context: int
    step: int
    free: int
    step_tokens: int = 512
    swap: int = 0
    adapters: int = 0
    adapters_note: str = ""

    @property
    def kv(self) -> int:
        """Bytes of the cache."""
        return self.blocks * self.block_bytes

    @property
    def total(self) -> int:
        """Bytes of all."""
        return self.weights + self.kv + self.swap + self.adapters + self.step

    @property
    def fits(self) -> bool:
        """Whether all of it is free now."""
        return self.total <= self.free

    @property
    def fix(self) -> str:
        """What makes it fit: as many tokens of cache as are left, where the rest fits."""
        left = (self.free - self.weights - self.step - self.swap - self.adapters) // self.block_bytes * BLOCK
        return f"serve.kv_tokens={left}" if left > 0 else "serve.weights=q4, or a smaller model"

    def rows(self) -> Iterator[tuple[str, int, str]]:
        """(part, bytes, in words)."""
        yield "weights", self.weights, f"{self.parameters:,} parameters as {self.stored}"
        tokens = self.blocks * BLOCK
        shared = f"{tokens / self.context:.1f} contexts of {self.context:,}"
        yield "cache", self.kv, f"{self.blocks:,} blocks of {BLOCK} tokens, {size(self.block_bytes)} each: {tokens:,} tokens, {shared}"
        if self.swap:
            yield "swap", self.swap, f"{self.swap // self.block_bytes:,} blocks"
        if self.adapters_note:
            yield "adapters", self.adapters, self.adapters_note
        yield "a step", self.step, f"{self.step_tokens:,} tokens at most"
        yield "together", self.total, f"{size(self.free)} are free"

    def document(self) -> dict[str, Any]:
        """For --json."""
        return {
            "weights": self.weights, "stored": self.stored, "parameters": self.parameters, "kv": self.kv, "blocks": self.blocks, "block_tokens": BLOCK,
            "block_bytes": self.block_bytes, "kv_tokens": self.blocks * BLOCK, "context": self.context, "swap": self.swap, "adapters": self.adapters,
            "step": self.step, "total": self.total, "free": self.free, "fits": self.fits,
        }  # fmt: skip


def memory_plan(spec: DecoderSpec, checkpoint: Checkpoint | None, serve: Serve, runner: str, free: int, dtype: str = "fp32") -> MemoryPlan:
    """The plan of a model (`checkpoint`: None for a bare size) run as the section `serve` says, with `free` bytes. dtype: of the eager runner's weights."""
    about = facts(spec)
    weights, stored, half = weight_bytes(spec, checkpoint, serve, runner, dtype)
    token = kv_token_bytes(spec, serve.kv if runner == "native" else "fp32")
    assert about.kv is not None and about.activations is not None, "a decoder states its cache and its activations"
    context = context_of(serve.context, spec.context)
    tokens = serve.kv_tokens or max(BLOCK, min(4 * context, free // 4 // about.kv.bytes_per_token(4)))
    rows = min(serve.max_batch_tokens, tokens)
    step = sum(a.size for a in about.activations(1, rows, 4) if a.per == "block" and a.saved) + 4 * spec.vocab * 16
    return MemoryPlan(weights, stored, about.parameters, blocks_for(tokens), token * BLOCK, context, step, free, serve.max_batch_tokens,
                      token * BLOCK * (serve.swap_tokens // BLOCK), *_adapters(spec, serve, runner, half))  # fmt: skip


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
    if not serve.adapters:
        return 0, ""
    found = Library(serve.adapters).found()
    each = max((adapter_bytes(spec, ranks(folder, spec), runner, half) for folder in found.values()), default=0)
    return serve.max_adapters * each, f"{serve.max_adapters} at most, {size(each)} each in {'fp16' if half else 'fp32'}; {len(found)} are loaded at the start"


def weight_bytes(spec: DecoderSpec, checkpoint: Checkpoint | None, serve: Serve, runner: str, dtype: str) -> tuple[int, str, bool]:
    """(bytes, how they are stored, whether adapters beside them are fp16)."""
    if runner != "native":
        return facts(spec).parameters * ELEMENT[dtype], dtype, False
    on_read = registry.made("kv_policy", serve.policy).positions == "in_cache"
    held = native_bytes(spec, serve.weights, checkpoint.layout if checkpoint else lambda name: None, on_read)
    most = sorted(held.formats, key=lambda name: -held.formats[name])
    stored = " and ".join(f"{name} ({size(held.formats[name])})" for name in most) if len(most) > 1 else most[0]
    return held.bytes, stored + (", as in the file" if serve.weights == "file" and most != ["f32"] else ""), held.narrow
