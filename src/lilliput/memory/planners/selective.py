"""Run again what is cheap, keep what was dear: outputs of products and convolutions stay, norms, activations and masks do not.

Cheap is seconds of the operation a byte that it frees. Chen et al. 2016, arXiv 1604.06174, section 3 (keep convolutions, drop the
rest); Korthikanti et al. 2022, arXiv 2205.05198 (selective recomputation of attention).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from lilliput.memory.plan import KEEP, RECOMPUTE, Decision
from lilliput.memory.trace import Trace


def selective(trace: Trace, share: float = 1.0, given: Mapping[int, Decision] | None = None, but: Collection[int] = ()) -> dict[int, Decision]:
    """The cheapest `share` of the bytes that operations without arithmetic units' work made run again, each when it is asked for.

    given: decisions that stand; only tensors that they keep (or do not name) are looked at. but: tensors that stay, such as those
    that cross the cuts of a chain: without them everything would run again from the beginning.
    """
    given = dict(given or {})
    cheap = []
    for s in trace.saved():
        ops = [trace.ops[w] for w in s.writers]
        if s.index not in but and given.get(s.index, KEEP) == KEEP and all(op.replayable and not op.flops and op.forward for op in ops):
            cheap.append((sum(op.seconds for op in ops) / s.bytes, s.index))
    left = share * sum(trace.storages[s].bytes for _, s in cheap)
    for _, number in sorted(cheap):
        left -= trace.storages[number].bytes
        if left < 0:
            break
        given[number] = RECOMPUTE
    return given
