"""POET: one integer program decides of every activation whether it is kept, run again in the backward pass, or paged to storage.

    budget = "600MB"     for weights, gradients, optimizer and activations together, as in remat
    objective = "time"   or "energy", which needs a board whose watts are known
    deadline = 0         seconds of a micro-batch: the fewest joules within them (or bytes, with objective=time)
    scratch = ""         pages go to the host's memory; a folder: to a file in it, made in its full size before training
    board = ""           plan as for one of the paper's boards (mkr1000, m4f, a72): its rates and joules decide what pays

The forward pass is cut into at most `stages` stages (twice as many nodes; about 16 is what the solver closes in seconds), the program is
solved for several budgets, and the cheapest solution whose simulated peak, to the byte, is within the budget is executed. Running
again and paging together are never worse than either alone. Gradients are bitwise those of the plain run. Skip it where activations
are not what fills the memory, or where the chain's dynamic program (remat.budget) does without pages.

Patil, Jain, Dutta, Stoica, Gonzalez 2022, arXiv 2207.07697, section 4. Needs scipy (HiGHS).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from lilliput.base.config import Section
from lilliput.base.errors import DoesNotFit, UserError
from lilliput.base.facts import Facts
from lilliput.base.ledger import Ledger, Tier
from lilliput.base.protocols import Phase, Site
from lilliput.base.show import parse_size, size
from lilliput.train.remat import fewest

if TYPE_CHECKING:
    from lilliput.memory.simulate import Rates, Simulation
    from lilliput.memory.trace import Trace
    from lilliput.parallel.rig import Rig

LEVELS = 6  # budgets that the program is solved for
SECONDS = 20.0  # for each


class Poet(Section):
    """Fields are the knobs; see the module's lesson."""

    needs: ClassVar[tuple[str, ...]] = ()

    budget: str = Field("", description="bytes for weights, gradients, optimizer and activations: 600MB, 2GiB")
    objective: Literal["time", "energy"] = Field("time", description="what is least; energy needs a board")
    scratch: str = Field("", description="folder for a page file; empty = pages go to the host's memory")
    deadline: float = Field(0.0, ge=0, description="seconds that a micro-batch may take, running again and pages included; 0 = no limit")
    board: Literal["", "mkr1000", "m4f", "a72"] = Field("", description="plan by this board's rates; empty = this machine's")
    stages: int = Field(12, ge=2, le=24, description="stages of the forward pass, at most")

    def acts(self) -> Mapping[Phase, Callable[[Rig], Rig]]:
        """Runs the objective under a memory plan."""
        return {Phase.REMAT: self.place}

    def refuses(self, others: Mapping[str, Any], facts: Facts) -> str | None:
        """Refuses to stand beside remat, energy without watts, and no budget."""
        if "remat" in others:
            return "remat decides the place of the same activations; poet runs again what it does not page"
        if not self.budget:
            return "poet needs poet.budget=600MB, or another number of bytes"
        if self.objective == "energy" and not self.board:
            return "poet.objective=energy needs a board whose watts are known: poet.board=m4f"
        return None

    def cost(self, ledger: Ledger, facts: Facts, site: Site) -> Ledger:
        """By closed forms, as if the fewest blocks that meet the budget ran again; the run itself plans to the byte, with pages."""
        return fewest(ledger, facts, site, parse_size(self.budget)) if self.budget else ledger

    @property
    def files(self) -> str:
        """The folder of its page file, if it has one."""
        return self.scratch

    @property
    def tier(self) -> Tier:
        """Where pages go."""
        return "disk" if self.scratch else "host"

    def place(self, rig: Rig) -> Rig:
        """Plan for the job's batch shape now, so that what does not fit is refused before anything is loaded."""
        from lilliput.memory.stores import pages
        from lilliput.parallel.budget import under

        standing = rig.standing()
        return under(rig, lambda trace: self.choose(trace, rig, standing), lambda trace: pages(trace, self.scratch, rig.device))

    def rates(self, trace: Trace, rig: Rig) -> Rates:
        """Seconds for the trace's operations, and the links: the board's or this machine's."""
        from lilliput.memory.boards import BOARDS
        from lilliput.memory.profile import estimate, links
        from lilliput.memory.simulate import Rates

        estimate(trace, rig.site.hardware)
        if not self.board:
            return links(rig.site.hardware)
        board = BOARDS[self.board]
        for op in trace.ops:
            op.seconds = board.seconds(max(op.flops, op.traffic / 8))  # at least one operation a number read and written
        return Rates({"disk": board.disk, "host": board.disk}, board.watts)

    def choose(self, trace: Trace, rig: Rig, standing: int) -> tuple[str, Mapping[int, Any]]:
        """(name, decisions) of the cheapest solution that fits; standing: bytes of weights and optimizer. DoesNotFit where none does."""
        from lilliput.memory.lower import lower
        from lilliput.memory.planners import poet
        from lilliput.memory.planners.chain import chain
        from lilliput.memory.simulate import simulate

        rates = self.rates(trace, rig)
        stages = chain(trace).merged(self.stages)
        graph = poet.of_chain(stages, rates.link(self.tier))
        page_seconds, deadline = (graph.page_in, graph.page_out), self.deadline or float("inf")
        if self.objective == "energy":
            graph = poet.energy(graph, rates.watts, rates.link(self.tier).watts)
        gradients = sum(s.bytes for s in trace.storages if s.external and s.kind == "gradient")
        room = parse_size(self.budget) - standing - gradients
        whole = sum(s.saved for s in stages.stages)
        found: list[tuple[str, dict[int, Any], Simulation]] = [("keep everything", {}, simulate(lower(trace, {}), rates))]
        limits = dict.fromkeys((self.deadline or None, None))  # a schedule that is too late tells how late
        for level, limit in itertools.product(range(1, LEVELS + 1), limits):
            try:
                solved = poet.solve(graph, whole * level / (LEVELS + 1), deadline=limit, page_seconds=page_seconds, limit=SECONDS)
            except UserError:  # no schedule for so few bytes, or none in time
                continue
            decisions = poet.decisions(stages, solved, self.tier)
            pages, again = len(solved.paged_in), len(solved.computed) - len(graph)
            found.append((f"POET: {pages} stages paged, {again} run again (gap {solved.gap:.1%})", decisions, simulate(lower(trace, decisions), rates)))
        within = [option for option in found if option[2].peak["device"] <= room]
        fits = [option for option in within if option[2].seconds <= deadline]
        if within and not fits:
            least_seconds = min(option[2].seconds for option in within)
            why = f"the quickest of {len(within)} schedules within {self.budget} takes {least_seconds:.4g} s"
            raise DoesNotFit(f"no schedule takes {self.deadline:g} s", why, f"poet.deadline={least_seconds * 1.01:.4g}, or a larger poet.budget")
        if not within:
            least = min(option[2].peak["device"] for option in found) + standing + gradients
            why = f"weights, optimizer{' and gradients' if gradients else ''} take {size(standing + gradients)}; {len(found)} schedules were tried"
            raise DoesNotFit(f"no schedule fits in {self.budget}", why, f"poet.budget={least}B, or a smaller train.micro_batch", least)
        name, decisions, _ = min(fits, key=lambda option: option[2].joules if self.objective == "energy" else option[2].seconds)
        return name, decisions
