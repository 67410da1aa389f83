"""llama2.c's first checkpoint format (v0, `.bin`): seven int32 and then nothing but fp32 weights, in a fixed order.

    dim, ffn, layers, heads, kv_heads, vocab (negative: the head is a tensor of its own), context
    embed, then for each kind of weight all layers together, the final norm, RoPE tables (unused), the head

The sizes decide the length of the file to the byte, so a wrong or truncated one is refused before a weight is read. q and k
rows are in Meta's order of RoPE pairs, as in GGUF. The tokenizer is a second file in the same folder.

karpathy/llama2.c, run.c (memory_map_weights) and export.py (legacy_export).
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lilliput.base.errors import UserError
from lilliput.models.spec import DecoderSpec

if TYPE_CHECKING:
    import numpy as np

HEADER = 28  # bytes
FIELDS = ("dim", "ffn", "layers", "heads", "kv_heads", "vocab", "context")
VERSIONED = 0x616B3432  # "ak42": the later versions begin with it
ORDER = ("input_norm.weight", "attn.q_proj.weight", "attn.k_proj.weight", "attn.v_proj.weight", "attn.o_proj.weight",
         "mlp_norm.weight", "mlp.gate_proj.weight", "mlp.down_proj.weight", "mlp.up_proj.weight")  # fmt: skip


@dataclass(frozen=True)
class Header:
    """Where each canonical tensor lies: (shape, first byte)."""

    path: Path
    spec: DecoderSpec
    tensors: dict[str, tuple[tuple[int, ...], int]]


def read_header(path: Path) -> Header:
    """The sizes, checked against the length of the file. UserError when they do not match to the byte."""
    size = path.stat().st_size
    with path.open("rb") as file:
        raw = file.read(HEADER)
    if len(raw) < HEADER:
        raise _broken(path, f"the file has {size} bytes; the header alone has {HEADER}")
    if struct.unpack_from("<I", raw)[0] == VERSIONED:
        raise UserError(f"{path} is a llama2.c file of a later version", "read is version 0 (legacy)",
                        "export it with `python export.py model.bin --version 0 ...`")
    values = dict(zip(FIELDS, struct.unpack("<7i", raw)))
    tied, values["vocab"] = values["vocab"] > 0, abs(values["vocab"])
    if min(values.values()) < 1 or values["dim"] % values["heads"] or values["heads"] % values["kv_heads"] or values["dim"] // values["heads"] % 2:
        raise _broken(path, f"its header says {values}")
    head_dim = values["dim"] // values["heads"]
    spec = DecoderSpec(family="llama", head_dim=head_dim, tied=tied, bos_id=1, eos_ids=(2,), **values)
    width = {name.removeprefix("layers.0."): shape for name, shape in spec.shapes().items() if name.startswith("layers.0.")}
    shapes: dict[str, tuple[int, ...]] = {"embed.weight": (spec.vocab, spec.dim)}
    expected = 4 * (math.prod(shapes["embed.weight"]) + spec.dim + sum(map(math.prod, width.values())) * spec.layers)
    expected += HEADER + 4 * spec.context * head_dim + (0 if tied else 4 * spec.vocab * spec.dim)
    if expected != size:  # before a table of absurdly many layers is made
        raise _broken(path, f"its header says {values}, which makes {expected:,} bytes; the file has {size:,}")
    shapes |= {f"layers.{layer}.{name}": width[name] for name in ORDER for layer in range(spec.layers)} | {"norm.weight": (spec.dim,)}
    tensors, at = {}, HEADER
    for name, shape in shapes.items():
        tensors[name] = (shape, at)
        at += 4 * math.prod(shape)
    if not tied:
        tensors["head.weight"] = (spec.vocab, spec.dim), at + 4 * spec.context * head_dim  # past the cos and sin tables
    return Header(path, spec, tensors)


def read(header: Header, name: str) -> np.ndarray:
    """One tensor by its canonical name, fp32, rows as in the file."""
    import numpy as np

    shape, start = header.tensors[name]
    return np.fromfile(header.path, dtype="<f4", count=math.prod(shape), offset=start).reshape(shape)


def _broken(path: Path, why: str) -> UserError:
    return UserError(f"{path} is damaged or not a llama2.c checkpoint", why, "download it again")
