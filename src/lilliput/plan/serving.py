"""Where a server's memory goes, before it starts and without torch: weights as they are stored, cache blocks, the work of one step.

    weights   bits a weight of the storage, scales included; a GGUF file as large as it lies on disk
    cache     serve.kv_tokens, or as many tokens as the engine takes by itself: four contexts, at most a quarter of the free memory
    swap      serve.swap_tokens beside it
    adapters  serve.max_adapters of them, each as large as the largest that lies in serve.adapters; as narrow as ops/low_rank.py keeps them
    a step    activations of one block for a full step, an upper bound
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lilliput.base.facts import Facts
from lilliput.base.show import size
from lilliput.models.adapters import ranks
from lilliput.models.facts import facts
from lilliput.serve.adapters import Library
from lilliput.serve.blocks import BLOCK, blocks_for

if TYPE_CHECKING:
    from lilliput.base.job import Serve
    from lilliput.models.spec import DecoderSpec

WEIGHT_BITS = {"fp32": 32.0, "fp16": 16.0, "w8": 8.05, "q4": 4.25, "nf4": 4.25, "fp8": 8.05, "fp8_rows": 8.05}  # scales of groups of 64 or of rows
KV_BITS = {"fp32": 32, "fp16": 16, "int8": 8, "int4": 4}
PANEL = 16  # outputs side by side in a packed matrix, ops/panels.py
HALF_EMBEDDING = ("nf4", "fp8", "fp8_rows")  # the embedding stays fp16


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


def memory_plan(spec: DecoderSpec, path: Path | None, serve: Serve, runner: str, free: int) -> MemoryPlan:
    """The plan of a model (`path`: its file or folder, None for a bare size) run as the section `serve` says, with `free` bytes."""
    about = facts(spec)
    weights, stored = _weights(about, spec, path, serve.weights if runner == "native" else "fp32")
    token = kv_token_bytes(spec, serve.kv if runner == "native" else "fp32")
    assert about.kv is not None and about.activations is not None, "a decoder states its cache and its activations"
    tokens = serve.kv_tokens or max(BLOCK, min(4 * spec.context, free // 4 // about.kv.bytes_per_token(4)))
    rows = min(serve.max_batch_tokens, tokens)
    step = sum(a.size for a in about.activations(1, rows, 4) if a.per == "block" and a.saved) + 4 * spec.vocab * 16
    return MemoryPlan(weights, stored, about.parameters, blocks_for(tokens), token * BLOCK, spec.context, step, free, serve.max_batch_tokens,
                      token * BLOCK * (serve.swap_tokens // BLOCK), *_adapters(spec, serve, runner, stored))  # fmt: skip


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


def _adapters(spec: DecoderSpec, serve: Serve, runner: str, stored: str) -> tuple[int, str]:
    if not serve.adapters:
        return 0, ""
    found = Library(serve.adapters).found()
    half = runner == "native" and stored != "fp32"
    each = max((adapter_bytes(spec, ranks(folder, spec), runner, half) for folder in found.values()), default=0)
    return serve.max_adapters * each, f"{serve.max_adapters} at most, {size(each)} each in {'fp16' if half else 'fp32'}; {len(found)} are loaded at the start"


def _weights(about: Facts, spec: DecoderSpec, path: Path | None, weights: str) -> tuple[int, str]:
    if weights == "file" and path is not None and path.suffix == ".gguf":
        return path.stat().st_size, "the file's own blocks"
    kind = "fp32" if weights == "file" else weights
    embedding = spec.vocab * (spec.embed_dim or spec.dim)
    if kind in HALF_EMBEDDING:
        return int((about.parameters - embedding) * WEIGHT_BITS[kind] / 8) + 2 * embedding, f"{kind}, embedding fp16"
    return int(about.parameters * WEIGHT_BITS[kind] / 8), kind
