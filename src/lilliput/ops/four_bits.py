"""Bytes of frozen matrices in 4 bits, by arithmetic: one source for the codecs (nf4.py, q4.py) and for what a plan says of them. No torch."""

from __future__ import annotations

NF4_BLOCK, Q4_BLOCK = 64, 32  # weights that share a scale
SECOND = 256  # scales that share one, where they are quantised again


def second_level(blocks: int) -> tuple[int, int]:
    """Bytes of the fp32 numbers (a step each 256 scales, and their mean) and of the int8 scales."""
    return 4 * (-(-blocks // SECOND) + 1), blocks


def nf4(weights: int, double: bool) -> tuple[int, int, int]:
    """Bytes of the fp32 numbers, of the 4-bit numbers and of the int8 scales."""
    blocks = weights // NF4_BLOCK
    wide, narrow = second_level(blocks) if double else (4 * blocks, 0)
    return wide, weights // 2, narrow


def q4(weights: int, double: bool) -> tuple[int, int, int, int, int]:
    """Bytes of the wide parts of scales and of offsets, of the 4-bit numbers, and of the int8 scales and offsets."""
    blocks = weights // Q4_BLOCK
    wide, narrow = second_level(blocks) if double else (2 * blocks, 0)
    return wide, wide, weights // 2, narrow, narrow


BLOCKS = {"nf4": NF4_BLOCK, "file": Q4_BLOCK}  # by qlora.storage
SECTIONS = {"nf4": nf4, "file": q4}
