"""LoRA: the weights stay as they are; each chosen Linear learns a low-rank update, W + (alpha / rank) B A.

Idea: the change that fine-tuning makes has low rank. A [rank, in] starts random, B [out, rank] starts at zero, so the
first step starts from the base model exactly.
Gain: gradients and both Adam moments exist for rank (in + out) values a matrix instead of in x out.
Cost: 2 rank (in + out) more flops a token forward; no memory saved in activations, since A's gradient needs the input.
After training it merges into W at no cost in inference, or travels as a small file that peft reads.
Skip it when: the model must learn much new (continued pre-training), or weights themselves are what does not fit.

Hu et al. 2021, arXiv 2106.09685, section 4.1; published: GPT-3 175B trained with 10,000x fewer trainable parameters.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from lilliput.base.config import Section
from lilliput.base.errors import UserError
from lilliput.base.facts import Facts
from lilliput.base.ledger import Ledger, Term
from lilliput.base.protocols import Phase, Site

if TYPE_CHECKING:
    from torch import Tensor

    from lilliput.parallel.rig import Rig


class Lora(Section):
    """Fields are the knobs; see the module's lesson."""

    needs: ClassVar[tuple[str, ...]] = ()

    rank: int = Field(8, ge=1, description="rank of the update")
    alpha: float = Field(16.0, gt=0, description="the update is scaled by alpha / rank")
    dropout: float = Field(0.0, ge=0, lt=1, description="on the input of the update")
    targets: tuple[str, ...] = Field(("all",), description="names of Linear modules (q_proj, v_proj, ...), or all of those inside blocks")
    adapter: str = Field("", description="start from this adapter folder (Lilliput's or peft's)")

    def acts(self) -> Mapping[Phase, Callable[[Rig], Rig]]:
        """Sets the `deltas` slot of the chosen Linears."""
        return {Phase.SWAP: self.adapt}

    def refuses(self, others: Mapping[str, Any], facts: Facts) -> str | None:
        """Refuses a model without named Linears, and targets that match none of them."""
        if not facts.linears:
            return f"the {facts.family} model does not state which Linear modules its blocks have (facts.linears)"
        known = sorted({pattern.rsplit(".", 1)[-1] for pattern in facts.linears})
        unknown = [t for t in self.targets if t not in (*known, "all")]
        return f"no Linear is named {', '.join(unknown)}; this model has {', '.join(known)}" if unknown else None

    def cost(self, ledger: Ledger, facts: Facts, site: Site) -> Ledger:
        """Gradients and optimizer shrink to the adapter; each target keeps `rank` more values a token."""
        shapes = self.chosen(facts)
        count = sum(self.rank * (rows + columns) for rows, columns in shapes.values())
        tokens = site.sequences * site.tokens
        gradients, parameters = ledger.terms["gradients"], ledger.terms["parameters"]
        assert facts.activations is not None, "the base ledger was made from them"
        leaves = set() if self.dropout else {path.rsplit(".", 1)[-1] for path in shapes}  # A reads what dropout leaves, which each target keeps
        frozen = [a for a in facts.activations(site.sequences, site.tokens, 4) if a.inputs_of and not leaves & set(a.inputs_of)]
        ledger = ledger.drop(*(f"activations.{a.name}" for a in frozen))
        dropped = Term(4 * tokens * sum(columns for _, columns in shapes.values()), moments=("forward", "backward"), blocks=facts.layers)
        return ledger.put(
            parameters=replace(parameters, size=parameters.size + 4 * count),
            gradients=replace(gradients, size=4 * count),
            optimizer=replace(ledger.terms["optimizer"], size=8 * count),
            **{
                **({"activations.dropped inputs": dropped} if self.dropout else {}),
                "activations.low_rank": Term(
                    size=4 * tokens * self.rank * len(shapes),
                    flops=6.0 * tokens * count,
                    moments=("forward", "backward"),
                    blocks=facts.layers,
                )
            },
        )

    def chosen(self, facts: Facts) -> dict[str, tuple[int, int]]:
        """Module path -> (out, in) of every Linear that gets an update."""
        result = {}
        for name, shape in facts.shapes.items():
            path, _, leaf = name.rpartition(".")
            inside = any(fnmatch.fnmatchcase(path, pattern) for pattern in facts.linears)
            if leaf == "weight" and inside and ("all" in self.targets or path.rsplit(".", 1)[-1] in self.targets):
                result[path] = (shape[0], shape[1])
        return result

    def adapt(self, rig: Rig) -> Rig:
        """Freeze every weight and put one LowRank on each chosen Linear; the file keeps W merged, adapter/ keeps A and B."""
        import torch

        from lilliput.models.deltas import LowRank
        from lilliput.ops.dropout import Dropout

        for parameter in rig.model.parameters():
            parameter.requires_grad_(False)
        with torch.device("meta"):
            for site, (path, (rows, columns)) in enumerate(self.chosen(rig.facts).items(), start=1_000_000):  # past the model's own sites
                drop = Dropout(rig.counter, site) if self.dropout else None
                if drop is not None:
                    drop.p = self.dropout
                rig.model.get_submodule(path).deltas["lora"] = LowRank(columns, rows, self.rank, self.alpha / self.rank, drop)
        return replace(
            rig,
            homes=(*rig.homes, ("*.deltas.lora.*", replace(rig.homes[0][1], codec="fp32"))),
            init=(*rig.init, ("*.deltas.lora.*", self.start(rig))),
            exports={**rig.exports, "adapter": self.write},
            weight=merged,
        )

    def start(self, rig: Rig) -> Callable[[str, tuple[int, ...], int], Tensor]:
        """Initial A and B: from `adapter`, else A uniform in +-1/sqrt(in) (Kaiming, a = sqrt 5), keyed by (seed, name), and B zero."""
        import torch

        from lilliput.base.seeds import key

        given = {}
        if self.adapter:
            from lilliput.models.adapters import read_adapter

            given = read_adapter(Path(self.adapter), rig.model.spec, self.alpha / self.rank)

        def fresh(name: str, shape: tuple[int, ...], seed: int) -> Tensor:
            if given:
                path, _, leaf = name.partition(".deltas.lora.")
                if path not in given or tuple(given[path][leaf == "b"].shape) != shape:
                    found = tuple(given[path][leaf == "b"].shape) if path in given else "nothing"
                    why = f"{path}: needs {leaf.upper()} {list(shape)}, has {found}"
                    raise UserError(f"adapter {self.adapter} does not fit", why, "set lora.rank and lora.targets as it was made")
                return given[path][leaf == "b"]
            if name.endswith(".b"):
                return torch.zeros(shape)
            generator = torch.Generator().manual_seed(key(seed, name))
            return torch.empty(shape).uniform_(-1 / math.sqrt(shape[1]), 1 / math.sqrt(shape[1]), generator=generator)

        return fresh

    def write(self, rig: Rig, folder: Path) -> None:
        """Write the adapter in peft's layout into an existing folder."""
        from lilliput.models.adapters import write_adapter

        pairs = {path: (m.deltas["lora"].a, m.deltas["lora"].b) for path, m in adapted(rig.model)}
        write_adapter(folder, rig.model.spec, pairs, rank=self.rank, alpha=self.alpha, dropout=self.dropout)


def adapted(model: Any) -> list[tuple[str, Any]]:
    """(path, Linear) of every module that carries an update."""
    return [(path, m) for path, m in model.named_modules() if "lora" in getattr(m, "deltas", {})]


def merged(rig: Rig, name: str) -> Tensor:
    """A parameter by name, its update added; the model is left as it is."""
    from lilliput.parallel.rig import whole

    path, _, leaf = name.rpartition(".")
    linear, value = rig.model.get_submodule(path), whole(rig.model, name)
    adapted = leaf == "weight" and "lora" in getattr(linear, "deltas", {})
    return (value.float() + linear.deltas["lora"].weight().detach()).to(value.dtype) if adapted else value


def merge(model: Any) -> int:
    """Add every update to its weight in place and take it off; returns how many. The deltas are kept aside for `unmerge`.

    UserError where weights are stored in so few bits that they cannot hold the sum; `merged` gives it in fp32.
    """
    count = 0
    for path, linear in adapted(model):
        if linear.codec is not None:
            raise UserError("a quantised base takes no update in place", f"{path} is stored in 4 bits", "load the model/ folder that the run writes")
        delta = linear.deltas["lora"]
        del linear.deltas["lora"]
        linear.merged = delta
        linear.weight.data += delta.weight().detach().to(linear.weight.dtype)
        count += 1
    return count


def unmerge(model: Any) -> int:
    """Take merged updates out of the weights (to rounding: about 1e-7 of a weight in fp32) and put the deltas back."""
    count = 0
    for module in list(model.modules()):
        delta = getattr(module, "merged", None)
        if delta is None:
            continue
        del module.merged
        module.weight.data -= delta.weight().detach().to(module.weight.dtype)
        module.deltas["lora"] = delta
        count += 1
    return count
