"""Run again what is cheap, keep what was dear: outputs of products and convolutions stay, norms, activations and masks do not.

Dear is an operation that counts flops; a tensor is dropped when only cheap operations lie between it and what stays. Cheapest
first: seconds a byte that is freed. Attention without stored scores counts as cheap: it runs again from its inputs.
Chen et al. 2016, arXiv 1604.06174, section 3; Korthikanti et al. 2022, arXiv 2205.05198 (selective recomputation).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from lilliput.memory.plan import KEEP, RECOMPUTE, Decision
from lilliput.memory.trace import Trace, closure


def selective(trace: Trace, share: float = 1.0, given: Mapping[int, Decision] | None = None, but: Collection[int] = ()) -> dict[int, Decision]:
    """The cheapest `share` of the bytes that cheap operations made run again, each when it is asked for.

    given: decisions that stand; only tensors that they keep (or do not name) are looked at. but: tensors that stay, such as those
    that cross the cuts of a chain: without them everything would run again from the beginning.
    """
    given = dict(given or {})
    there = {s.index for s in trace.saved() if given.get(s.index, KEEP) == KEEP}
    cost: dict[int, float] = {}
    for s in sorted(there - set(but), key=lambda s: trace.storages[s].writers[0]):  # what it depends on is decided by then
        ops, _ = closure(trace, [s], (there - {s}).__contains__, strict=False)
        if all(_cheap(trace, number) for number in ops):
            cost[s] = sum(trace.ops[number].seconds for number in ops)
            there.discard(s)
    left = share * sum(trace.storages[s].bytes for s in cost)
    for s in sorted(cost, key=lambda s: (cost[s] / trace.storages[s].bytes, s)):
        left -= trace.storages[s].bytes
        if left < 0:
            break
        given[s] = RECOMPUTE
    return given


def _cheap(trace: Trace, number: int) -> bool:
    op = trace.ops[number]
    return op.replayable and op.forward and not op.flops
