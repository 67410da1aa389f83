"""How the native runner stores each matrix, and the bytes that takes, without torch: what models/native.py packs and a plan counts.

A matrix here is one product of a step: q, k and v stacked along their outputs are one, gate and up another. Where the section says
`file`, a matrix whose parts all lie in one of the forms that the kernels read (Layout) stays as it is, bit for bit; else it is fp32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from lilliput.base.errors import UserError
from lilliput.models.spec import DecoderSpec

PANEL = 16  # outputs side by side in a packed matrix, ops/panels.py
ELEMENT = {"f32": 4.0, "f16": 2.0, "w8": 1.0, "q4": 0.5, "nf4": 0.5, "e4m3": 1.0}  # bytes of a number
SCALE = {"w8": 4, "e4m3": 4, "q4": 2, "nf4": 2}  # bytes of a scale, and of an offset
FLOATS = {"fp32": "f32", "fp16": "f16", "fp8": "e4m3", "fp8_rows": "e4m3"}
HALF_EMBEDDING = ("nf4", "fp8", "fp8_rows")  # the embedding stays fp16


class Layout(NamedTuple):
    """Format, inputs that share a scale (0: all of an output) and offset of a packed matrix, as in ops/panels.py."""

    format: str
    group: int = 0
    offset: str = "symmetric"

    def bytes(self, outputs: int, inputs: int) -> int:
        """Of a matrix in panels, padding included."""
        rows, wide = -(-outputs // PANEL) * PANEL, -(-inputs // 4) * 4 if self.format == "w8" else inputs
        scales = SCALE.get(self.format, 0) * (inputs // self.group if self.group else 1)
        return round(rows * wide * ELEMENT[self.format]) + rows * scales * (1 if self.offset == "symmetric" else 2)


Layouts = Callable[[str], Layout | None]  # canonical name of a matrix -> how its file stores it, where kernels read that


class Matrix(NamedTuple):
    """One product of a step: its layer (None: the top), slot and parts, by their canonical names, stacked along the outputs."""

    layer: int | None
    slot: str
    parts: tuple[str, ...]


def matrices(spec: DecoderSpec) -> Iterator[Matrix]:
    """Every matrix of a decoder, layer by layer, then those of the top (embed, head, project_in, project_out)."""
    for layer in range(spec.layers):
        at = f"layers.{layer}"
        yield Matrix(layer, "qkv", tuple(f"{at}.attn.{part}_proj.weight" for part in "qkv"))
        yield Matrix(layer, "out", (f"{at}.attn.o_proj.weight",))
        yield Matrix(layer, "up", tuple(f"{at}.mlp.{part}_proj.weight" for part in (("gate", "up") if spec.gated else ("up",))))
        yield Matrix(layer, "down", (f"{at}.mlp.down_proj.weight",))
    tops = ["embed"] + ([] if spec.tied else ["head"]) + (["project_in", "project_out"] if spec.embed_dim else [])
    yield from (Matrix(None, top, (f"{top}.weight",)) for top in tops)


def chosen(matrix: Matrix, inputs: int, weights: str, stored: Layouts) -> Layout:
    """How `serve.weights` stores a matrix. UserError where its inputs make no groups, or its file's form has no kernel."""
    if weights == "file":
        return together(matrix.parts, stored) or Layout("f32")
    if matrix.slot == "embed" and weights in HALF_EMBEDDING:
        return Layout("f16")
    if weights in FLOATS:
        return Layout(FLOATS[weights])
    if weights == "w8":
        return Layout("w8")
    group = next((g for g in (64, 32) if inputs % g == 0), None)
    if group is None:
        raise UserError(f"{matrix.parts[0]} cannot be stored as {weights}", f"its {inputs} inputs are not a multiple of 32", "serve.weights=w8")
    return Layout(weights, group)


def together(parts: Sequence[str], stored: Layouts) -> Layout | None:
    """The one layout that a file has all of these in; None where they differ or the kernels read none of them."""
    found = {stored(name) for name in parts}
    return found.pop() if len(found) == 1 else None


class Held(NamedTuple):
    """Bytes that a native decoder holds: all of them, and those of matrices by format. narrow: no matrix of a layer is fp32."""

    bytes: int
    formats: dict[str, int]
    narrow: bool


def native_bytes(spec: DecoderSpec, weights: str, stored: Layouts, on_read: bool = False) -> Held:
    """Everything that a native decoder keeps of a model. on_read: keys lie before RoPE."""
    shapes, formats, narrow, packed = spec.shapes(), dict[str, int](), True, set[str]()
    for matrix in matrices(spec):
        inputs = shapes[matrix.parts[0]][1]
        layout = chosen(matrix, inputs, weights, stored)
        formats[layout.format] = formats.get(layout.format, 0) + layout.bytes(sum(shapes[part][0] for part in matrix.parts), inputs)
        narrow &= matrix.layer is None or layout.format != "f32"
        packed.update(matrix.parts)
    vectors = 4 * sum(math.prod(shape) for name, shape in shapes.items() if name not in packed)
    positions = spec.context + (-(-spec.context // PANEL) * PANEL if on_read else 0)
    tables = 4 * positions * spec.head_dim if spec.positions == "rope" else 0
    return Held(sum(formats.values()) + vectors + tables, formats, narrow)
