"""QLoRA: LoRA on a base whose Linears are stored in 4 bits, Y = X decode(W) + X A B scaled; the base never learns.

Idea: a frozen weight is only read, so it may lie in the fewest bits that reading bears: NF4, the 16 quantiles of a normal
distribution, a scale for each 64 weights, and the scales quantised again: 4.127 bits a weight. Products stay in fp32 (or
the dtype of a CUDA run): a matrix is decoded for one product and let go, in the forward pass and again in the backward pass.
Gain: the Linears of the blocks take 1/7.75 of their fp32 bytes; gradients and moments exist for the adapter only, as in lora.
Cost: two decodings a matrix and micro-batch (three under remat), and the model starts from the rounded weights, not from
the file's: small models lose most. Embedding, norms and head stay as they are stored.
The run writes model/ (decoded, the update merged) and adapter/, which peft reads over a base rounded the same way.
Skip it when the base fits as it is: lora is faster and starts from the exact model.

Dettmers et al. 2023, arXiv 2305.14314; published: 65B fine-tuned in 48 GB instead of 780 GB.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from lilliput.base.facts import Facts
from lilliput.base.ledger import Ledger, Term
from lilliput.base.protocols import Phase, Site
from lilliput.train.lora import Lora

if TYPE_CHECKING:
    from torch import Tensor

    from lilliput.parallel.rig import Rig

BLOCK, SECOND = 64, 256  # weights that share a scale, and scales that share one


class Qlora(Lora):
    """Fields are the knobs, lora's own; `targets` says which Linears learn, all of those in the blocks are stored in 4 bits."""

    def acts(self) -> Mapping[Phase, Callable[[Rig], Rig]]:
        """Sets the `codec` slot of every Linear in the blocks, then the `deltas` slot of the chosen ones."""
        return {Phase.SWAP: lambda rig: self.adapt(self.quantise(rig))}

    def refuses(self, others: Mapping[str, Any], facts: Facts) -> str | None:
        """Refuses what lora refuses, lora itself, and matrices that are not made of blocks of 64."""
        if "lora" in others:
            return "it is lora on a base in 4 bits, and has the same keys: set qlora.rank instead of lora.rank"
        odd = next((path for path, (rows, columns) in self.stored(facts).items() if rows * columns % BLOCK), None)
        if odd is not None:
            return f"{odd} has {' x '.join(map(str, facts.shapes[odd + '.weight']))} weights, no multiple of {BLOCK}"
        return super().refuses(others, facts)

    def cost(self, ledger: Ledger, facts: Facts, site: Site) -> Ledger:
        """lora's, with the Linears in their stored bytes, and one matrix decoded beside them."""
        counts = [rows * columns for rows, columns in self.stored(facts).values()]
        ledger = super().cost(ledger, facts, site)
        parameters = ledger.terms["parameters"]
        saved = sum(count * site.element - stored_bytes(count) for count in counts)
        each = 4 if site.hardware.device.kind == "cpu" or site.element == 4 else 6  # fp32, and beside it what a bf16 product takes
        return ledger.put(
            parameters=replace(parameters, size=parameters.size - saved),
            **{"transient.one matrix decoded": Term(each * max(counts), moments=("backward",))},
        )

    def stored(self, facts: Facts) -> dict[str, tuple[int, int]]:
        """Module path -> (out, in) of every Linear that is stored in 4 bits."""
        return self.model_copy(update={"targets": ("all",)}).chosen(facts)

    def quantise(self, rig: Rig) -> Rig:
        """Give each Linear its codec and, for its weight, as many bytes; they are made from what the weight's own source gives."""
        import torch

        from lilliput.ops.nf4 import Nf4

        codecs = {f"{path}.weight": Nf4(*shape) for path, shape in self.stored(rig.facts).items()}
        for name, codec in codecs.items():
            linear = rig.model.get_submodule(name.removesuffix(".weight"))
            linear.codec = codec
            linear.weight = torch.nn.Parameter(torch.empty(sum(codec.sections), dtype=torch.uint8, device="meta"), requires_grad=False)

        def encoded(name: str, shape: tuple[int, ...], seed: int) -> Tensor:
            return codecs[name].encode(rig.source(name)(name, rig.facts.shapes[name], seed))

        home = replace(rig.homes[0][1], codec="nf4")
        return replace(
            rig,
            homes=(*rig.homes, *((f"{pattern}.weight", home) for pattern in rig.facts.linears)),
            init=(*rig.init, *((f"{pattern}.weight", encoded) for pattern in rig.facts.linears)),
        )


def stored_bytes(weights: int) -> int:
    """Bytes of a matrix of so many weights: 4 bits each, a byte a block, an fp32 scale each 256 blocks, and their mean."""
    blocks = weights // BLOCK
    return weights // 2 + blocks + 4 * (-(-blocks // SECOND) + 1)
