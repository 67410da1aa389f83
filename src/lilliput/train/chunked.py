"""The loss in chunks of tokens: head, softmax and their gradients for `tokens` tokens at a time, so that no logits of a whole micro-batch exist.

    plain      logits, log-probabilities and their gradients: 3 x 4 bytes x tokens x vocabulary at the turn to the backward pass
    chunks     2 x 4 bytes x one chunk x vocabulary, the gradient of the head's input (tokens x width), and that of its weight if it learns

Why: with a small model and a large vocabulary that is the peak of a step, and no memory plan of the blocks moves it.
Cost: no product more. A chunk's products must be large enough: each one reads the head's weight and adds to its gradient.
tokens = "auto"   the largest power of two with which a chunk's numbers take no more than a quarter of the head's weight, 32 at least
What is bitwise: evaluation and loss, on machines where a product's rows do not depend on how many there are. Gradients are those of the
plain loss within rounding (1e-6 of their norm in fp32): the weight's is summed chunk by chunk and scaled by 1 / targets after that.
With bf16 weights the head is widened once a micro-batch and its gradient added up in fp32.
Skip it when the vocabulary is small, or the micro-batch no longer than a few chunks.

Hsu et al. 2024 (Liger kernel), arXiv 2410.10989; Wijmans et al. 2024 (cut cross-entropy), arXiv 2411.09009.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from lilliput.base.config import Section
from lilliput.base.facts import Facts
from lilliput.base.ledger import Ledger, Term
from lilliput.base.protocols import Phase, Site

if TYPE_CHECKING:
    from torch import Tensor

    from lilliput.parallel.rig import Rig

SHARE, LEAST = 4, 32  # `auto`: of the head's weight; tokens


class Chunked(Section):
    """Fields are the knobs; see the module's lesson."""

    needs: ClassVar[tuple[str, ...]] = ()
    after: ClassVar[tuple[str, ...]] = ("infinity", "lora", "offload", "qlora")  # which weights learn, and how they are stored

    tokens: int | Literal["auto"] = Field("auto", description="tokens of one chunk; 0 = all at once, as without the section")

    @classmethod
    def within(cls, device: int, folder: str) -> list[Chunked]:
        """Settings for a budget of bytes (lilliput.plan.choose)."""
        return [cls.model_validate({})]

    def acts(self) -> Mapping[Phase, Callable[[Rig], Rig]]:
        """Cuts the tokens of the head's part of the objective."""
        return {Phase.SHARD: self.cut}

    def refuses(self, others: Mapping[str, Any], facts: Facts) -> str | None:
        """Refuses a model whose chain does not end in a head over a vocabulary, and no number of tokens."""
        if self.tokens != "auto" and self.tokens < 0:
            return f"chunked.tokens={self.tokens} is no number of tokens"
        return None if facts.chain[-1:] == ("head",) else f"the {facts.family} model does not end in a head (facts.chain)"

    def each(self, facts: Facts) -> int:
        """Tokens of one chunk."""
        if self.tokens != "auto":
            return self.tokens
        most = facts.shapes["embed.weight"][1] // (2 * SHARE)  # logits and log-probabilities
        return max(LEAST, 1 << max(0, most.bit_length() - 1))

    def cost(self, ledger: Ledger, facts: Facts, site: Site) -> Ledger:
        """No log-probabilities are kept; what the loss leaves is the gradient of the head's input, and its weight's where that learns."""
        if not self.tokens:
            return ledger
        rows, wide, computed = site.sequences * site.tokens, facts.shapes["embed.weight"][1], site.computed
        gradients = ledger.terms["gradients"]
        learns = gradients.tier != "device" or gradients.size == facts.parameters * site.element
        table, stream = facts.vocab * wide * computed, rows * wide * computed
        narrow = ledger.terms["parameters"].size < facts.parameters * computed and ledger.terms["parameters"].tier == "device"
        ledger = ledger.drop("activations.log-probabilities")
        ledger = ledger.put(**{"activations.head gradients": Term(stream + table * learns, moments=("forward",))})
        kept = sum(t.bytes for name, t in ledger.terms.items() if name.startswith("activations.") and "forward" in t.moments)
        last = (3 * table if facts.tied else table + stream) - kept if learns else 0  # when the backward pass is over
        most = max(2 * min(self.each(facts), rows) * facts.vocab * 4 + table * narrow, 2 * stream, last)
        return ledger.put(**{"transient.gradients in the loss": Term(most, moments=("forward",))})

    def cut(self, rig: Rig) -> Rig:
        """The objective of next tokens, in chunks."""
        return replace(rig, objective=ByChunks(self.each(rig.facts))) if self.tokens else rig


@dataclass(frozen=True)
class ByChunks:
    """parallel.rig.next_token, `tokens` at a time in the head."""

    tokens: int

    def __call__(self, model: Any, micro: Any) -> tuple[Tensor, int]:
        """See Rig.objective."""
        return model.head(model.hidden(micro.tokens_BT), micro.targets_BT.flatten(), self.tokens), micro.weight
