"""Segments of stages: keep what enters each segment, run the rest again. With k = sqrt(n) segments of an n-stage chain the bytes are
n/k inputs + one segment, smallest when stages keep about what enters them: O(sqrt n), for one more forward pass.

The last segment is kept: its backward pass comes first. Chen et al. 2016, arXiv 1604.06174, section 4.1.
"""

from __future__ import annotations

import math

from lilliput.memory.plan import Decision
from lilliput.memory.planners.chain import Chain, Layout


def segments(chain: Chain, starts: list[int], until: int | None = None) -> dict[int, Decision]:
    """Decisions for segments that begin at these stages; stages from `until` on (default: the last segment) are kept."""
    layout = Layout(chain)
    starts = sorted({0, *starts})
    kept = starts[-1] if until is None else until
    for start in [*starts[1:], kept]:
        if 0 < start < len(chain):
            layout.keep(chain.stages[start].boundary, None)
    for stage in chain.stages[kept:]:
        layout.keep(stage.members, None)
    ends = [*starts[1:], len(chain)]
    for start, end in zip(starts, ends, strict=True):
        group = [stage for stage in chain.stages[start : min(end, kept)] if stage.asked is not None]
        if group:
            first = min(group, key=lambda stage: stage.leaves)
            for stage in group:
                layout.keep(stage.members, first.asked)
    return layout.done()


def every(chain: Chain, size: int) -> dict[int, Decision]:
    """Segments of `size` stages."""
    return segments(chain, list(range(0, len(chain), size)))


def sqrt(chain: Chain) -> dict[int, Decision]:
    """About sqrt(n) segments of equal length."""
    count = max(1, round(math.sqrt(len(chain))))
    return segments(chain, [round(i * len(chain) / count) for i in range(count)])
