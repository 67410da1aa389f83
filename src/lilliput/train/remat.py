"""Gradient checkpointing: keep some of what the forward pass makes, run the rest again in the backward pass.

    plan = "every"      segments of `every` blocks keep only what enters them: n/k inputs + k blocks
    plan = "sqrt"       k = sqrt(n), the paper's choice: smallest where a layer keeps one tensor the size of its input
    plan = "selective"  what products made stays; norms, activations and attention run again
    budget = "600MB"    the fastest of some seventy plans (those above, Chen's own planner, recursion, greedy, a dynamic program over the blocks, with
                        integer programs inside them) whose peak, to the byte, is within the budget for weights, gradients, optimizer and activations
    planner = "greedy"  one of those planners alone proposes plans for the budget
    pages = "host"      (or "disk", in the folder `scratch`): a budget's plans may page tensors too, above all what enters a block
    plan = "coded"      nothing runs again; what blocks keep lies in `codec`: bf16 a half, fp8 a quarter, nf4 a seventh of the bytes

A decoder block keeps 10 to 20 times its input, so there k = 1 is smallest; a larger k costs no time. Running all blocks again is a third more flops.
Values and gradients are bitwise those of the plain run, dropout included, unless a codec rounds what is kept (`coded`, or a budget with a codec). A
budget that no plan meets is refused before training, with the smallest one that is met. Skip it when activations are not what fills the
memory: `lilliput plan` shows the terms.

Chen, Xu, Zhang, Guestrin 2016, arXiv 1604.06174. Published: a 1000-layer ResNet from 48 GB to 7 GB at 30 % more time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from lilliput.base.config import Section
from lilliput.base.errors import DoesNotFit
from lilliput.base.facts import Facts
from lilliput.base.ledger import Ledger, Moment, Term, Tier
from lilliput.base.protocols import Phase, Site
from lilliput.base.show import parse_size, size
from lilliput.memory.plan import stored_bytes

if TYPE_CHECKING:
    from lilliput.memory.trace import Trace
    from lilliput.parallel.rig import Rig

BLOCKS = "layers.*"  # the part of facts.chain that is planned block by block


class Remat(Section):
    """Fields are the knobs; see the module's lesson."""

    needs: ClassVar[tuple[str, ...]] = ()

    plan: Literal["every", "sqrt", "selective", "budget", "coded"] = Field("every", description="what is kept; a budget makes it `budget`")
    every: int | Literal["sqrt"] = Field(1, description="blocks in one recomputed segment; sqrt = the square root of the depth")
    budget: str = Field("", description="bytes for weights, gradients, optimizer and activations: 600MB, 2GiB")
    planner: Literal["all", "selective", "sqrt", "recursive", "chen", "segments", "dynamic", "greedy", "hierarchical", "paging"] = Field(
        "all", description="which planner proposes plans for a budget")
    pages: Literal["off", "host", "disk"] = Field("off", description="where tensors may be paged to under a budget, what enters a block first")
    scratch: str = Field("", description="folder of the page file (remat.pages=disk)")
    codec: Literal["exact", "bf16", "fp8", "nf4"] = Field("exact", description="how what blocks keep may lie until the backward pass (coded, budget)")

    @property
    def kind(self) -> str:
        """The plan that is meant."""
        return "budget" if self.budget else self.plan

    @classmethod
    def within(cls, device: int, folder: str) -> list[Remat]:
        """Settings for a budget of bytes (lilliput.plan.choose)."""
        return [cls.model_validate({"budget": f"{device}B"})]

    def acts(self) -> Mapping[Phase, Callable[[Rig], Rig]]:
        """Runs the objective under a memory plan."""
        return {Phase.REMAT: self.recompute}

    def refuses(self, others: Mapping[str, Any], facts: Facts) -> str | None:
        """Refuses a model that is not a chain of blocks, segments longer than the chain, and a budget without bytes."""
        if facts.layers < 1:
            return f"the {facts.family} model states no chain of blocks (facts.layers)"
        if self.every != "sqrt" and not 1 <= self.every <= facts.layers:
            return f"remat.every={self.every}, but the model has {facts.layers} blocks"
        if self.kind == "budget" and not self.budget:
            return "remat.plan=budget needs remat.budget=600MB, or another number of bytes"
        if self.planner != "all" and self.kind != "budget":
            return f"remat.planner={self.planner} plans for a budget: remat.budget=600MB"
        if self.planner == "paging" and self.pages == "off":
            return "remat.planner=paging needs remat.pages=host, or disk"
        if self.kind == "coded" and self.codec == "exact":
            return "remat.plan=coded needs remat.codec=bf16, fp8 or nf4"
        if self.pages != "off" and self.kind != "budget":
            return f"remat.pages={self.pages} is decided under a budget: remat.budget=600MB"
        if (self.pages == "disk") != bool(self.scratch):
            return "remat.pages=disk needs remat.scratch=FOLDER for its file, and nothing else does"
        if self.codec != "exact" and self.kind not in ("coded", "budget"):
            return f"remat.codec={self.codec} is for what is kept, and remat.plan={self.kind} runs it again: remat.plan=coded, or a budget"
        return None

    def segment(self, facts: Facts) -> int:
        """Blocks in one segment of the plans `every` and `sqrt`."""
        return round(math.sqrt(facts.layers)) if "sqrt" in (self.plan, self.every) else int(self.every)

    def cost(self, ledger: Ledger, facts: Facts, site: Site) -> Ledger:
        """Closed forms. Block terms shrink from all blocks to what is kept and one segment; inputs and what runs again come in.

        A budget takes the fewest blocks again that meet it by these forms; the run itself plans to the byte.
        """
        if self.kind == "selective":
            return self.without_cheap(ledger, facts, site)
        if self.kind == "coded":
            return self.encoded(ledger, facts)
        if self.kind != "budget":
            return shrunk(ledger, facts, site, self.segment(facts), facts.layers)
        return fewest(ledger, facts, site, parse_size(self.budget)) if self.budget else ledger

    def without_cheap(self, ledger: Ledger, facts: Facts, site: Site) -> Ledger:
        """Normed inputs, the attention's output, the activation and its product with the gate leave; attention's flops come again."""
        assert facts.flops is not None, "the base ledger was made from them"
        block = {n: t for n, t in ledger.terms.items() if t.blocks}
        gone = [n for n in block if n.removeprefix("activations.") in ("attention input", "mlp input", "mlp product", "attention output")]
        kept = {n: t for n, t in block.items() if n not in gone}
        if "activations.mlp" in kept and "activations.mlp product" in block and kept["activations.mlp"].size > block["activations.mlp product"].size:
            kept["activations.mlp"] = replace(kept["activations.mlp"], size=kept["activations.mlp"].size - block["activations.mlp product"].size)
        tokens = site.sequences * site.tokens
        again = facts.flops(tokens, site.tokens) - facts.flops(tokens, 1)  # what depends on the context: attention's products
        largest = max((block[n].size // facts.layers for n in gone), default=0)
        return ledger.drop(*gone).put(**kept, **{"transient.one tensor again": Term(largest, flops=again, moments=("backward",))})

    def encoded(self, ledger: Ledger, facts: Facts) -> Ledger:
        """Block terms in fewer bytes; what one of them takes comes back whole when the backward pass asks for it."""
        block = {n: t for n, t in ledger.terms.items() if t.blocks}
        largest = max(t.size // t.blocks for t in block.values())
        less = {n: replace(t, size=stored_bytes(self.codec, t.size)) for n, t in block.items()}
        return ledger.put(**less, **{"transient.decoded": Term(largest, moments=("backward",))})

    def recompute(self, rig: Rig) -> Rig:
        """Under a plan from now on."""
        from lilliput.memory.stores import pages
        from lilliput.parallel.budget import under

        standing = rig.standing()
        return under(rig, lambda trace: self.choose(trace, rig, standing), lambda trace: pages(trace, self.scratch, rig.device) if self.pages != "off" else {})

    @property
    def files(self) -> str:
        """The folder of its page file, if it has one."""
        return self.scratch

    def choose(self, trace: Trace, rig: Rig, standing: int) -> tuple[str, Mapping[int, Any]]:
        """(name, decisions) for one trace; standing: bytes of weights and optimizer. DoesNotFit where no plan meets the budget."""
        from lilliput.memory.codecs import speed
        from lilliput.memory.planners.budget import LEVELS, frontier
        from lilliput.memory.planners.chain import chain, entries
        from lilliput.memory.planners.coded import coded
        from lilliput.memory.planners.selective import selective
        from lilliput.memory.planners.sqrt import segments
        from lilliput.memory.profile import links
        from lilliput.memory.simulate import Rates

        blocks = chain(trace, entries(trace, BLOCKS))
        if self.kind == "selective":
            return "selective", selective(trace, but={s for stage in blocks.stages for s in stage.boundary})
        n, rounded = len(blocks), lambda until: coded(blocks, self.codec, until)
        if self.kind == "coded":
            return f"all blocks kept in {self.codec}", rounded(n)
        if self.kind == "budget":
            levels = dict.fromkeys(round(n * i / LEVELS) for i in range(1, LEVELS + 1)) if self.codec != "exact" else ()
            rates = Rates({**links(rig.site.hardware).links, **({"device": speed(self.codec, rig.device)} if levels else {})})
            tiers: tuple[Tier, ...] = () if self.pages == "off" else (self.pages,)
            gradients = sum(s.bytes for s in trace.storages if s.external and s.kind == "gradient")
            room = parse_size(self.budget) - standing - gradients
            try:
                more = [(f"the first {k} of {n} blocks kept in {self.codec}", rounded(k)) for k in levels]
                option = frontier(trace, rates, tiers, more, self.planner).pick({"device": max(0, room)})
            except DoesNotFit as fault:
                least = fault.needs + standing + gradients
                why = f"weights, optimizer{' and gradients' if gradients else ''} take {size(standing + gradients)}; {fault.why}"
                raise DoesNotFit(f"no memory plan fits in {self.budget}", why, f"remat.budget={least}B, or a smaller train.micro_batch", least) from None
            return option.name, option.decisions
        every = self.segment(rig.facts)
        return f"segments of {every} blocks", segments(blocks, [0, *range(1, len(blocks), every)], until=len(blocks) - 1)


def fewest(ledger: Ledger, facts: Facts, site: Site, limit: int) -> Ledger:
    """The ledger with the fewest blocks run again that bring its peak to `limit` bytes; the smallest where none does."""
    options = [ledger, *(shrunk(ledger, facts, site, 1, again) for again in range(1, facts.layers + 1))]
    return next((option for option in options if option.peak()[0] <= limit), None) or min(options, key=lambda option: option.peak()[0])


def shrunk(ledger: Ledger, facts: Facts, site: Site, every: int, again: int) -> Ledger:
    """The ledger when the first `again` blocks keep only what enters each segment of `every` of them, and run once more."""
    kept = facts.layers - again
    for name, term in ledger.terms.items():
        if term.blocks:
            alive = max(kept, every)
            moments: tuple[Moment, ...] = ("forward", "backward") if kept else ("backward",)
            ledger = ledger.put(**{name: replace(term, size=term.size * alive // term.blocks, blocks=alive, moments=moments)})
    width = facts.shapes["embed.weight"][1]
    inputs, each = math.ceil(again / every), site.sequences * site.tokens * width * 4
    return ledger.put(
        **{
            "activations.segment inputs": Term(
                size=each * (inputs - 1), flops=ledger.terms["forward"].flops * again / facts.layers, moments=("forward", "backward"), falling=True
            ),
            # in the backward pass the last segment's input is one of the tensors that its blocks keep
            "activations.last segment input": Term(size=each, moments=("forward",)),
        }
    )
