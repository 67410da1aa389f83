"""A paged optimizer: its moments leave the device when an activation spike needs their room, and are back for the update.

    budget = "600MB"   of the device, for weights, gradients, moments and activations together
    scratch = ""       pages go to the host's memory; a folder: to a file in it, made in its full size before training

One long batch in a thousand decides what a run needs. Adam's moments are 8 bytes a weight that nobody reads between two updates: the
first operation whose result does not fit evicts as many pages (one: both moments of one parameter, those updated last go first) as
are missing, exactly then and no more. They are copied, so the update is bitwise the plain one. What does not fit without any moments
is refused, with the bytes that would do. `evicted_bytes` of each step are in metrics.jsonl.
Gain: up to 8 bytes a trainable weight (CUDA's unified memory does the same by page faults). Cost: evicted bytes travel twice in
that step, and each operation is counted, about 10 us. Skip it when the moments are small beside the spike, as those of an adapter.

Dettmers et al. 2023 (QLoRA), arXiv 2305.14314, section 3.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from lilliput.base.config import Section
from lilliput.base.facts import Facts
from lilliput.base.ledger import Ledger, Moment, Term
from lilliput.base.protocols import Phase, Site
from lilliput.base.show import parse_size

if TYPE_CHECKING:
    from torch import Tensor

    from lilliput.data.batch import MicroBatch
    from lilliput.parallel.rig import Rig

ELSEWHERE = ("offload", "infinity")  # rooms that keep the moments off the device already


class Paged(Section):
    """Fields are the knobs; see the module's lesson."""

    needs: ClassVar[tuple[str, ...]] = ()
    evicts: ClassVar[bool] = True  # the moments are elsewhere while their room is needed

    budget: str = Field("", description="bytes of the device for weights, gradients, moments and activations: 600MB, 2GiB")
    scratch: str = Field("", description="folder for a page file; empty = pages go to the host's memory")

    def acts(self) -> Mapping[Phase, Callable[[Rig], Rig]]:
        """Runs the step under a meter that evicts, and the update after what was evicted is back."""
        return {Phase.STEP: self.page}

    def refuses(self, others: Mapping[str, Any], facts: Facts) -> str | None:
        """Refuses to stand without a budget, and beside rooms that keep the moments elsewhere."""
        if not self.budget:
            return "paged needs paged.budget=600MB, or another number of bytes"
        adapter = "lora" in others or "qlora" in others  # whose moments are on the device, wherever the weights are
        other = next((name for name in ELSEWHERE if name in others and not adapter), None)
        return f"{other} keeps the optimizer's moments off the device already" if other else None

    def cost(self, ledger: Ledger, facts: Facts, site: Site) -> Ledger:
        """Where the peak is above the budget, as many bytes of moments are elsewhere until the update."""
        if not self.budget or "optimizer" not in ledger.terms:
            return ledger
        moments = ledger.terms["optimizer"]
        over = min(moments.bytes, ledger.peak()[0] - parse_size(self.budget))
        if over <= 0:
            return ledger
        return ledger.put(
            optimizer=replace(moments, size=moments.bytes - over, shard=()),
            **{
                "optimizer.pages back": Term(over, moments=("update",)),
                "optimizer.pages": self.pages(over, site.micro_batches),
            },
        )

    def pages(self, count: int, micro_batches: int) -> Term:
        """Of so many bytes, out and back once a step; a room counts a micro-batch."""
        moved = 2.0 * count / micro_batches
        moments: tuple[Moment, ...] = ("forward", "backward")
        if self.scratch:
            return Term(count, traffic=moved, written=moved / 2, tier="disk", moments=moments, lane="disk")
        return Term(count, traffic=moved, tier="host", moments=moments, lane="link")

    @property
    def files(self) -> str:
        """The folder of its page file, if it has one."""
        return self.scratch

    def page(self, rig: Rig) -> Rig:
        """Count what is there, then every operation of each step."""
        from lilliput.memory.stores import FileStore, HostStore

        assert rig.optimizer is not None, "the optimizer is built before rooms act on the step"
        moments = [(rig.optimizer.first[name], rig.optimizer.second[name]) for name in rig.optimizer.parameters]
        sizes = {2 * page + which: tensor.nbytes for page, pair in enumerate(moments) for which, tensor in enumerate(pair)}
        store = FileStore(Path(self.scratch) / "moments", sizes, device=rig.device) if self.scratch else HostStore(device=rig.device)
        pages = Pages(rig, store, parse_size(self.budget))
        limit = rig.meter.budget.get("device", pages.budget)
        rig.meter.budget["device"], rig.meter.relieve = min(limit, pages.budget), pages.evict
        return replace(rig, objective=pages.objective, schedule=pages.schedule, update=pages.update, tells={**rig.tells, "evicted_bytes": pages.last})


class Pages:
    """The moments of an optimizer as pages between the device and a store, and the meter that says when they go."""

    def __init__(self, rig: Rig, store: Any, budget: int) -> None:
        assert rig.optimizer is not None, "there are moments to page"
        self.optimizer, self.store, self.budget, self.within, self.after = rig.optimizer, store, budget, rig.schedule, rig.update
        self.inner = rig.objective
        self.names = list(rig.optimizer.parameters)
        self.away: dict[int, tuple[Tensor, ...]] = {}  # page -> its moments as shapes alone
        self.evicted, self.pinned, self.meter = 0, True, rig.meter  # pinned: nothing may leave

    def last(self) -> float:
        """Bytes that the last step evicted."""
        return float(self.evicted)

    def schedule(self, rig: Rig, batch: Sequence[MicroBatch], weight: int) -> Tensor:
        """The forward and backward passes of a step; the rig's meter asks for room."""
        self.evicted, self.pinned = 0, False
        try:
            return self.within(rig, batch, weight)
        finally:
            self.pinned = True  # what comes back must not push itself out, and what is being updated stays

    def objective(self, model: Any, micro: MicroBatch) -> tuple[Tensor, int]:
        """The loss; without gradients (held-out data) pages may leave for each micro-batch and are back after it, as a checkpoint wants them."""
        import torch

        if torch.is_grad_enabled():
            return self.inner(model, micro)
        self.pinned = False
        try:
            found = self.inner(model, micro)
        finally:
            self.pinned = True
        self.fetch()
        return found

    def update(self, rig: Rig, rate: float) -> float:
        """Bring the pages back and update."""
        self.fetch()
        return self.after(rig, rate)

    def evict(self, missing: int) -> None:
        """Send pages away, the one that is updated last first, until so many bytes are free or none is left."""
        import torch

        for page in reversed(range(len(self.names))):
            if missing <= 0 or self.pinned:
                return
            if page in self.away:
                continue
            pair = self.moments(page)
            with self.meter.placing("host"):
                for future in [self.store.write(2 * page + which, t.view(-1), t.dtype) for which, t in enumerate(pair)]:
                    future.result()
            self.away[page] = tuple(torch.empty_like(t, device="meta") for t in pair)
            count = sum(t.nbytes for t in pair)
            self.put(page, self.away[page])
            missing, self.evicted = missing - count, self.evicted + count

    def fetch(self) -> None:
        """Every page is back on the device. DoesNotFit where the moments and gradients alone are too much."""
        import torch

        for page in sorted(self.away):
            back = tuple(torch.empty_like(t, device=self.optimizer.parameters[self.names[page]].device) for t in self.away[page])
            for future in [self.store.read(2 * page + which, t.view(-1)) for which, t in enumerate(back)]:
                future.result()
            self.put(page, back)
            del self.away[page]
            for which in (0, 1):
                self.store.free(2 * page + which)

    def moments(self, page: int) -> tuple[Tensor, Tensor]:
        """Both of a page."""
        name = self.names[page]
        return self.optimizer.first[name], self.optimizer.second[name]

    def put(self, page: int, pair: Sequence[Tensor]) -> None:
        """Set both of a page."""
        name = self.names[page]
        self.optimizer.first[name], self.optimizer.second[name] = pair
