"""Everything stays, what the first stages saved in fewer bits: no operation runs again, and gradients are rounded.

Small tensors stay exact (a thirty-second of what enters the stage, or less): they save nothing, and they are what a rounding would
hurt, statistics of norms and the softmax's logarithms. What is no fp32 stays as it is.
"""

from __future__ import annotations

from lilliput.memory.plan import Codec, Decision
from lilliput.memory.planners.chain import Chain

SMALL = 1 / 32


def coded(chain: Chain, codec: Codec, until: int) -> dict[int, Decision]:
    """Decisions that keep what stages before `until` saved in a codec."""
    storages, crossing = chain.trace.storages, max(stage.crossing for stage in chain.stages)
    members = (storages[s] for stage in chain.stages[:until] for s in stage.members)
    return {s.index: Decision(codec=codec) for s in members if s.packs and s.dtype == "float32" and s.bytes > SMALL * crossing}
