"""Gradient checkpointing: keep the input of every k-th block, recompute the rest in the backward pass.

Idea: of n blocks only n/k inputs are kept, and while one segment runs backward, its k blocks are alive again:
bytes = n/k inputs + k blocks. Where a layer keeps one tensor the size of its input (the paper's case) that is smallest
at k = sqrt(n). A decoder block keeps 10 to 20 times its input, so there k = 1 is smallest; a larger k costs no time.
Each forward op runs once more: about a third more flops. Values and gradients are bitwise those of the plain run.
Skip it when activations are not what fills the memory: `lilliput plan` shows the terms.

Chen, Xu, Zhang, Guestrin 2016, arXiv 1604.06174, section 4.1. Published: a 1000-layer ResNet from 48 GB to 7 GB at 30 % more time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from lilliput.base.config import Section
from lilliput.base.facts import Facts
from lilliput.base.ledger import Ledger, Term
from lilliput.base.protocols import Phase, Site

if TYPE_CHECKING:
    from lilliput.parallel.rig import Rig


class Remat(Section):
    """Fields are the knobs; see the module's lesson."""

    needs: ClassVar[tuple[str, ...]] = ()

    every: int | Literal["sqrt"] = Field(1, description="blocks in one recomputed segment; sqrt = the square root of the depth")

    def acts(self) -> Mapping[Phase, Callable[[Rig], Rig]]:
        """Replaces the walk over blocks."""
        return {Phase.REMAT: self.recompute}

    def refuses(self, others: Mapping[str, Any], facts: Facts) -> str | None:
        """Refuses a model that is not a chain of blocks, and segments longer than the chain."""
        if facts.layers < 1:
            return f"the {facts.family} model states no chain of blocks (facts.layers)"
        if self.every != "sqrt" and not 1 <= self.every <= facts.layers:
            return f"remat.every={self.every}, but the model has {facts.layers} blocks"
        return None

    def segment(self, facts: Facts) -> int:
        """Blocks in one segment."""
        return round(math.sqrt(facts.layers)) if self.every == "sqrt" else self.every

    def cost(self, ledger: Ledger, facts: Facts, site: Site) -> Ledger:
        """Saved block terms shrink from all blocks to one segment; the inputs of the segments and a second forward come in."""
        every = self.segment(facts)
        for name, term in ledger.terms.items():
            if term.blocks:
                ledger = ledger.put(**{name: replace(term, size=term.size * every // term.blocks, blocks=every, moments=("backward",))})
        width = facts.shapes["embed.weight"][1]
        inputs, each = math.ceil(facts.layers / every), site.sequences * site.tokens * width * 4
        again = ledger.terms["forward"].flops
        return ledger.put(
            **{
                "activations.segment inputs": Term(size=each * (inputs - 1), flops=again, moments=("forward", "backward"), falling=True),
                # in the backward pass the last segment's input is one of the tensors that its blocks keep
                "activations.last segment input": Term(size=each, moments=("forward",)),
            }
        )

    def recompute(self, rig: Rig) -> Rig:
        """Let the model walk its blocks in recomputed segments."""
        from lilliput.memory.execute import recompute_every

        rig.model.walk = recompute_every(self.segment(rig.facts))
        return rig
