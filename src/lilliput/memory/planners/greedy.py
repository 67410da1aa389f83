"""Greedy: always drop the tensor that frees the most bytes for each second of running again, until the budget is met.

The price of a tensor is what its stage's run again grows by: the operations that make it from what is kept, less those that run again there
anyway, and, where later stages read it, what their runs grow by. After each choice the prices of its neighbours are found anew. What a stage
drops comes back in one run, at the first of its tensors that the backward pass asks for.

Fits any trace, quickly; no bound on how far from the best (two cheap tensors may stand in the way of a dear one that frees more). As the
heuristics of Kirisame et al. 2021 (DTR), arXiv 2006.09616, but with the whole backward pass known.
"""

from __future__ import annotations

from collections.abc import Iterator

from lilliput.memory.plan import Decision
from lilliput.memory.planners.chain import Chain
from lilliput.memory.trace import closure


class _Pass:
    """What is dropped so far, by stage, and the operations that each stage runs again."""

    def __init__(self, chain: Chain) -> None:
        self.chain, self.trace = chain, chain.trace
        self.stage = {s: number for number, stage in enumerate(chain.stages) for s in stage.members}
        self.kept = set(self.stage)
        self.dropped: list[set[int]] = [set() for _ in chain.stages]
        self.again: list[frozenset[int]] = [frozenset() for _ in chain.stages]
        able = lambda s: all(self.trace.ops[w].replayable for w in self.trace.storages[s].writers)
        self.open = {s for s, number in self.stage.items() if chain.stages[number].asked is not None and self.trace.storages[s].packs and able(s)}

    def runs(self, number: int, without: int) -> frozenset[int]:
        """Operations that a stage would run again if one more tensor were dropped."""
        targets = self.dropped[number] | ({without} if self.stage[without] == number else set())
        ops, _ = closure(self.trace, targets, lambda s: s in self.kept and s != without, strict=False)
        return frozenset(ops)

    def readers(self, storage: int) -> list[int]:
        """Stages whose runs change with a tensor: its own, and those that run an operation again which reads it."""
        read = self.trace.storages[storage].readers
        return [n for n, ops in enumerate(self.again) if n == self.stage[storage] or any(op in ops for op in read)]

    def price(self, storage: int) -> float | None:
        """Seconds that dropping it takes; None where something on the way cannot run again."""
        total = 0.0
        for number in self.readers(storage):
            now = self.runs(number, storage)
            if any(not self.trace.ops[op].replayable for op in now):
                return None
            total += sum(self.trace.ops[op].seconds for op in now) - sum(self.trace.ops[op].seconds for op in self.again[number])
        return total

    def drop(self, storage: int) -> list[int]:
        """It runs again from now on; the stages whose prices change."""
        changed = self.readers(storage)
        runs = {number: self.runs(number, storage) for number in changed}
        self.kept.discard(storage)
        self.open.discard(storage)
        self.dropped[self.stage[storage]].add(storage)
        for number, ops in runs.items():
            self.again[number] = ops
        return changed

    def decisions(self) -> dict[int, Decision]:
        """As they are now."""
        spans = [((stage.asked, None),) if stage.asked is not None else () for stage in self.chain.stages]
        return {s: Decision("recompute", spans=spans[number]) for number, group in enumerate(self.dropped) for s in group}


def greedy(chain: Chain, levels: int = 8) -> Iterator[tuple[int, dict[int, Decision]]]:
    """(bytes freed, decisions) each time another 1/levels of what is saved is freed, until nothing more can be dropped."""
    state, freed, told = _Pass(chain), 0, 0
    whole = sum(stage.saved for stage in chain.stages)
    size = chain.trace.storages
    prices = {s: state.price(s) for s in state.open}

    def rate(s: int) -> float:
        price = prices[s]
        return 0.0 if price is None else size[s].bytes / max(price, 1e-12)

    while state.open:
        best = max(sorted(state.open), key=rate)
        if prices[best] is None:
            break
        freed += size[best].bytes
        changed = set(state.drop(best))
        near = {n + by for n in changed for by in (-1, 0, 1)}
        prices |= {s: state.price(s) for s in state.open if state.stage[s] in near}
        if freed * levels >= (told + 1) * whole:
            told = freed * levels // whole
            yield freed, state.decisions()
    yield freed, state.decisions()
