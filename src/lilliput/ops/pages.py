"""Checksums of blocks on their way to and from a disk, in the pass that copies them.

    checksum of a block = sum over its pages of (2 * page + 1) * (sum of the page's 64-bit words)    mod 2^64; missing bytes are zeros

Every bit counts, and a page that is old, damaged or in another's place changes it. It is no defence against someone who wants it to fit. The
kernel does it at the memory's speed, streams what it copies past the caches, and holds no GIL.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from lilliput.ops import native

PAGE = 4096


def sums(pages: Tensor, block: int, into: Tensor | None = None) -> list[int]:
    """One checksum for every `block` (a multiple of a page) of a flat uint8 tensor on the CPU, copied into another of as many bytes."""
    assert block % PAGE == 0, f"blocks are whole pages, not {block} bytes"
    assert into is None or into.numel() == pages.numel(), "a copy is as long as what is copied"
    if native.module() is None or (into is not None and into.device.type != "cpu"):
        if into is not None:
            into.copy_(pages)
        return reference(pages, block)
    found = np.empty(-(-pages.numel() // block), np.uint64)
    native.module().page_sums(pages.data_ptr(), 0 if into is None else into.data_ptr(), pages.numel(), block, found.ctypes.data)
    return found.tolist()


def reference(pages: Tensor, block: int) -> list[int]:
    """The same by numpy."""
    odd = np.arange(block // PAGE, dtype=np.uint64) * np.uint64(2) + np.uint64(1)

    def one(part: Tensor) -> int:
        whole = np.zeros(-(-part.numel() // PAGE) * PAGE, np.uint8)
        torch.from_numpy(whole)[: part.numel()].copy_(part)  # a storage that numpy has seen can never be resized again: not the caller's
        each = np.add.reduce(whole.view(np.uint64).reshape(-1, PAGE // 8), axis=1)
        return int(np.add.reduce(each * odd[: len(each)]))

    return [one(part) for part in pages.split(block)]
