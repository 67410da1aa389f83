"""Recursion: keep nothing but the input; to run backward through n stages, run forward to the middle, do the right half, then the left.

Memory log2(n) boundaries and one stage, for at most n log2(n) forward stages.   Chen et al. 2016, arXiv 1604.06174, section 4.4, k = 1.
"""

from __future__ import annotations

from lilliput.memory.plan import Decision
from lilliput.memory.planners.chain import Chain, Layout


def recursive(chain: Chain) -> dict[int, Decision]:
    """Every saved tensor runs again; boundaries of halves stay while their right half runs backward."""
    layout = Layout(chain)

    def halve(first: int, end: int) -> None:
        stages = [stage for stage in chain.stages[first:end] if stage.asked is not None]
        if not stages:
            return
        now = min(stages, key=lambda stage: stage.leaves).asked
        if end - first == 1:
            layout.keep(chain.stages[first].members, now)
            return
        middle = (first + end) // 2
        layout.keep(chain.stages[middle].boundary, now)
        halve(middle, end)
        halve(first, middle)

    halve(0, len(chain))
    return layout.done()
