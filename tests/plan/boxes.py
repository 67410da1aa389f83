"""A machine of any size, and a model small enough to add up by hand."""

from __future__ import annotations

from lilliput.base.facts import Activation, Facts, KVShape
from lilliput.base.hardware import DeviceSpec, Hardware


def machine(gib: float, kind: str = "cpu") -> Hardware:
    """One device with this much memory, all of it free; 1 Tflop/s and 100 GB/s."""
    spec = DeviceSpec(kind, "box", round(gib * 2**30), {"fp32": 1e12, "bf16": 4e12}, 1e11, 1, round(gib * 2**30), 4)
    return Hardware("box", (spec,), spec)


HAND = Facts(  # one block of 6 parameters between an embedding of 20 and a tied head
    family="hand", shapes={"embed.weight": (10, 2), "layers.0.w": (3, 2)}, chain=("embed", "layers.*", "head"), layers=1, vocab=10, context=8,
    tied=(("embed.weight", "head.weight"),), kv=KVShape(1, 1, 2), flops=lambda tokens, context: 100.0 * tokens,
    activations=lambda s, t, e: [
        Activation("x", 5 * s * t * e),
        Activation("y", 7 * s * t * e, "model"),
        Activation("z", 3 * s * t * e, "model", early=True),
        Activation("loss", 11, "model", False),
        Activation("block", 13, "block", False),
    ],
)  # fmt: skip
