"""FP8: all three products of every Linear in the blocks take 8-bit floats: E4M3 weights and activations, E5M2 gradients.

    Y = X8 W8        dX = G8 W8        dW = G8 X8        each tensor times one power of two, 2^b, taken off the result again

Idea: 8 bits hold a tensor's numbers where its largest comes near the format's largest, and a power of two scales without error.
scaling = "amax"    b = floor(log2(largest / amax)) of each tensor, anew each time: no history, so recomputation finds the same
scaling = "cscale"  one b for all weights, activations and gradients; right only in an interval, which narrows as models grow
Gain: what Linears keep for the backward pass takes one byte a number instead of four, each input once for all that read it.
On devices with 8-bit float units the products are faster too; CPUs have none: there fp32 products of the decoded codes cost more.
Cost: a byte a weight for codes made once an optimizer step; the loss moves by some tenths of a percent. Weights, moments,
norms, attention, embeddings and the head stay as they are. An infinite or NaN tensor makes the step's gradient NaN: it is skipped.
With lora or qlora the frozen products are in FP8, and so is x A of the adapter, which keeps the same codes of x.
Skip it when: activations of Linears are not what fills the memory, or the loss must be that of the plain run (remat).

Perez et al. 2023, arXiv 2309.17224. Published: GPT and Llama 2 from 111M to 70B within 0.5 % of FP16.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from lilliput.base.config import Section
from lilliput.base.facts import Facts
from lilliput.base.ledger import Ledger, Term
from lilliput.base.protocols import Phase, Site

if TYPE_CHECKING:
    from lilliput.parallel.rig import Rig

Format = Literal["e4m3fn", "e4m3fnuz", "e5m2", "e5m2fnuz"]


class Fp8(Section):
    """Fields are the knobs; see the module's lesson."""

    needs: ClassVar[tuple[str, ...]] = ()
    after: ClassVar[tuple[str, ...]] = ("infinity", "lora", "offload", "qlora")  # which weights learn, how they are stored and where

    scaling: Literal["amax", "cscale"] = Field("amax", description="each tensor's own power of two, or one for all")
    bias: int = Field(0, ge=-126, le=126, description="cscale: the exponent b of that power; 0 = unscaled")
    forward: Format = Field("e4m3fn", description="format of weights and activations")
    backward: Format = Field("e5m2", description="format of gradients")
    histogram: bool = Field(False, description="count the exponents of each Linear's tensors and write them to fp8/ (CSV, PNG)")

    def acts(self) -> Mapping[Phase, Callable[[Rig], Rig]]:
        """Sets the `product` slot of the Linears in the blocks; keeps the codes of their weights up to date."""
        return {Phase.SWAP: self.swap, Phase.STEP: self.keep_fresh}

    def refuses(self, others: Mapping[str, Any], facts: Facts) -> str | None:
        """Refuses a model without named Linears, and a bias that nothing reads."""
        if not facts.linears:
            return f"the {facts.family} model does not state which Linear modules its blocks have (facts.linears)"
        return f"fp8.bias={self.bias} is cscale's, amax finds its own: fp8.scaling=cscale" if self.bias and self.scaling == "amax" else None

    def cost(self, ledger: Ledger, facts: Facts, site: Site) -> Ledger:
        """A byte a number of what only the Linears keep, a byte a weight, and the operands of one product decoded."""
        assert facts.activations is not None, "the base ledger was made from them"
        shapes = linears(facts)
        rows = site.sequences * site.tokens
        if "transient.one matrix decoded" not in ledger.terms and ledger.terms["parameters"].tier == "device":  # else they are coded anew each time
            ledger = ledger.put(**{"weights in 8 bits": Term(sum(n * k + 4 for n, k in shapes.values()))})
        width, inner = shapes[f"layers.0.{facts.linears[-1].removeprefix('layers.*.')}"]
        decoded = rows * width * (site.computed + 1)  # the gradient's codes, and decoded
        gradients = ledger.terms["gradients"]
        own = [a for a in facts.activations(site.sequences, site.tokens, site.computed) if a.inputs_of]
        for a in own:
            if f"activations.{a.name}" in ledger.terms:
                ledger = ledger.scale(f"activations.{a.name}", 1 / site.computed)
        if "activations.dropped inputs" in ledger.terms:
            ledger = ledger.scale("activations.dropped inputs", 1 / site.computed)
        for leaf, name in (("o_proj", "attention output"), ("down_proj", "mlp")):  # kept by what made them, too
            if not any(leaf in a.inputs_of for a in own):
                term, (_, k) = ledger.terms[f"activations.{name}"], next(s for p, s in shapes.items() if p.endswith(leaf))
                ledger = ledger.put(**{f"activations.{name}": replace(term, size=term.size + rows * k * facts.layers)})
        if gradients.tier != "device" or gradients.size == facts.parameters * site.element:  # the weights learn
            decoded += min(rows * inner, width * inner) * site.computed
        return ledger.put(**{"transient.operands decoded": Term(decoded, moments=("backward",))})

    def swap(self, rig: Rig) -> Rig:
        """One product a Linear, and one an adapter's A; those that read the same tensor share its codes."""
        from lilliput.models.exponents import Exponents
        from lilliput.models.products import Fp8 as Product
        from lilliput.models.products import Reads
        from lilliput.ops.fp8 import FORMATS, Scaling

        scaling = Scaling(self.forward, self.backward, None if self.scaling == "amax" else self.bias)
        exponents = Exponents(rig.counter) if self.histogram else None
        shared: dict[tuple[str, ...], Reads] = {}  # readers are counted as they are found
        for path in linears(rig.facts):
            linear, together = rig.model.get_submodule(path), readers(rig.facts, path)
            scaling = scaling if exponents is None else replace(scaling, note=partial(exponents.note, path))
            reads = shared.setdefault(together, Reads(0))
            linear.product = Product(scaling, reads)
            reads.readers += 1
            for name, delta in linear.deltas.items():
                scaling = scaling if exponents is None else replace(scaling, note=partial(exponents.note, f"{path}.{name}"))
                alone = delta.dropout is not None  # it reads what dropout leaves
                delta.product = Product(scaling, Reads(1) if alone else reads)
                reads.readers += 0 if alone else 1
            if linear.codec is None and rig.home(f"{path}.weight").tier == "device":
                linear.product.room(linear.weight, rig.device)
        if exponents is not None:
            rig = replace(rig, exports={**rig.exports, "fp8": lambda rig, folder: exponents.write(folder)})
        return replace(rig, computes=(*rig.computes, str(FORMATS[self.forward]).removeprefix("torch.")))

    def keep_fresh(self, rig: Rig) -> Rig:
        """Code what has changed before the objective is asked for, outside of any memory plan."""
        return replace(rig, objective=Fresh(rig.objective))


@dataclass(frozen=True)
class Fresh:
    """An objective before which the codes of weights that have changed are made again: once an optimizer step."""

    inner: Callable[[Any, Any], Any]

    def __call__(self, model: Any, micro: Any) -> Any:
        """See Rig.objective."""
        from lilliput.models.products import refresh

        refresh(model)
        return self.inner(model, micro)


def linears(facts: Facts) -> dict[str, tuple[int, int]]:
    """Module path -> (out, in) of the Linears in the blocks."""
    return {name.removesuffix(".weight"): (shape[0], shape[1]) for name, shape in facts.shapes.items() if name in facts.matrices}


def readers(facts: Facts, path: str) -> tuple[str, ...]:
    """The Linears of a block that read the same tensor as this one, itself included: those that one norm feeds."""
    prefix, layer, _ = path.split(".", 2)
    for fed in facts.feeds.values():
        together = tuple(f"{prefix}.{layer}.{name.removeprefix('layers.*.')}" for name in fed if name in facts.linears)
        if path in together:
            return together
    return (path,)
