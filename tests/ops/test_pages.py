"""Checksums of blocks: the kernel is the reference at every level, sees bits and places, and copies what it sums."""

from __future__ import annotations

import pytest
import torch

from lilliput.ops import native, pages
from lilliput.ops.pages import PAGE


@pytest.mark.parametrize("level", native.levels())
def test_kernel_equals_the_reference(level: str) -> None:
    draw = torch.Generator().manual_seed(0)
    for seed in range(30):
        count = int(torch.randint(1, 9 * PAGE, (), generator=draw)) if seed % 3 else (seed // 3 + 1) * PAGE
        start, offset = (int(x) for x in torch.randint(0, 130, (2,), generator=draw))
        start, offset = (0, 0) if seed % 2 else (start, offset)
        whole, room = torch.randint(0, 256, (count + 200,), dtype=torch.uint8, generator=draw), torch.zeros(count + 200, dtype=torch.uint8)
        part, into = whole[start : start + count], room[offset : offset + count]
        want = pages.reference(part, 2 * PAGE)
        with native.using(level):
            assert pages.sums(part, 2 * PAGE) == want, f"seed {seed}, {count} bytes"
            assert pages.sums(part, 2 * PAGE, into) == want and torch.equal(into, part), f"seed {seed}, {count} bytes"
        assert not room[:offset].any() and not room[offset + count :].any(), "nothing beside it is written"


def test_sees_bits_and_places() -> None:
    four = torch.randint(0, 256, (4 * PAGE,), dtype=torch.uint8)
    swapped = torch.cat([four[PAGE : 2 * PAGE], four[:PAGE], four[2 * PAGE :]])
    flipped = four.clone()
    flipped[5000] ^= 1
    for sums in (pages.sums, pages.reference):
        assert len({sums(x, 4 * PAGE)[0] for x in (four, swapped, flipped)}) == 3
    assert pages.sums(four[: 3 * PAGE + 1], 4 * PAGE) == pages.sums(torch.cat([four[: 3 * PAGE + 1], torch.zeros(PAGE - 1, dtype=torch.uint8)]), 4 * PAGE)
