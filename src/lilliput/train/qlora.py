"""QLoRA: LoRA on a base whose Linears are stored in 4 bits, Y = X decode(W) + X A B scaled; the base never learns.

Idea: a frozen weight is only read, so it may lie in the fewest bits that reading bears: NF4, the 16 quantiles of a normal
distribution, a scale for each 64 weights, and the scales quantised again: 4.127 bits a weight. Products stay in fp32 (or
the dtype of a CUDA run): a matrix is decoded for one product and let go, in the forward pass and again in the backward pass.
`storage=file`: a GGUF's own 4-bit numbers (Q4_0, Q4_1) instead, 4.51 bits: what was rounded once is not rounded again.
Gain: the Linears of the blocks take 1/7.75 (file: 1/7.1) of their fp32 bytes; gradients and moments exist for the adapter only.
Cost: two decodings a matrix and micro-batch (three under remat), and with nf4 the model starts from the rounded weights, not
from the file's: small models lose most. Embedding, norms and head stay as they are stored.
The run writes adapter/, which peft reads over a base rounded the same way, and model/ with the update merged into the decoded weights, those it was
trained over; `merge=original`: into the weights from before the rounding, and how far the logits are then from the trained ones (adapter/merge.json).
Skip it when the base fits as it is: lora is faster and starts from the exact model.

Dettmers et al. 2023, arXiv 2305.14314; published: 65B fine-tuned in 48 GB instead of 780 GB.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from lilliput.base import records
from lilliput.base.errors import UserError
from lilliput.base.facts import Facts
from lilliput.base.ledger import Ledger, Term
from lilliput.base.protocols import Phase, Site
from lilliput.ops.four_bits import BLOCKS, SECOND, SECTIONS
from lilliput.train.lora import Lora, merged

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from lilliput.ops.nf4 import Nf4
    from lilliput.ops.q4 import Q4
    from lilliput.parallel.rig import Rig


class Qlora(Lora):
    """Fields are the knobs, lora's own; `targets` says which Linears learn, all of those in the blocks are stored in 4 bits."""

    storage: Literal["nf4", "file"] = Field("nf4", description="what the base is kept in: NF4, or the 4-bit numbers of the GGUF that it comes from")
    double: bool = Field(True, description="quantise the blocks' scales too, to int8")
    merge: Literal["decoded", "original"] = Field("decoded", description="what model/ adds the update to: the base in 4 bits decoded, or the weights before")

    def acts(self) -> Mapping[Phase, Callable[[Rig], Rig]]:
        """Sets the `codec` slot of every Linear in the blocks, then the `deltas` slot of the chosen ones."""
        return {Phase.SWAP: self.swap}

    def refuses(self, others: Mapping[str, Any], facts: Facts) -> str | None:
        """Refuses what lora refuses, lora itself, and matrices that are not made of whole blocks."""
        if "lora" in others:
            return "it is lora on a base in 4 bits, and has the same keys: set qlora.rank instead of lora.rank"
        odd = next((path for path, (rows, columns) in self.stored(facts).items() if rows * columns % BLOCKS[self.storage]), None)
        if odd is not None:
            return f"{odd} has {' x '.join(map(str, facts.shapes[odd + '.weight']))} weights, no multiple of {BLOCKS[self.storage]}"
        return super().refuses(others, facts)

    def cost(self, ledger: Ledger, facts: Facts, site: Site) -> Ledger:
        """lora's, with the Linears in their stored bytes, and one matrix decoded beside them."""
        counts = [rows * columns for rows, columns in self.stored(facts).values()]
        ledger = super().cost(ledger, facts, site)
        parameters = ledger.terms["parameters"]
        saved = sum(count * site.element - self.bytes(count) for count in counts)
        each = 4 if site.hardware.device.kind == "cpu" or site.element == 4 else 6  # fp32, and beside it what a bf16 product takes
        return ledger.put(
            parameters=replace(parameters, size=parameters.size - saved),
            **{"transient.one matrix decoded": Term(each * max(counts), moments=("backward",))},
        )

    def stored(self, facts: Facts) -> dict[str, tuple[int, int]]:
        """Module path -> (out, in) of every Linear that is stored in 4 bits."""
        return self.model_copy(update={"targets": ("all",)}).chosen(facts)

    def swap(self, rig: Rig) -> Rig:
        """Quantise, adapt, and say which weights model/ is made of."""
        adapted = self.adapt(self.quantise(rig))
        if self.merge == "decoded":
            return adapted
        originals = Originals(rig, frozenset(self.stored(rig.facts)))
        return replace(adapted, weight=originals.merged, exports={**adapted.exports, "adapter": lambda now, folder: self.report(now, folder, originals)})

    def report(self, rig: Rig, folder: Path, originals: Originals) -> str:
        """Write the adapter, and beside it how far model/ is from what was trained; the same as a sentence."""
        self.write(rig, folder)
        apart = originals.apart(rig)
        records.write_json(folder / "merge.json", {"base": "original", **apart})
        figures = f"logits {apart['rms']:.4f} apart from the trained ones (rms {apart['of']:.2f}, largest {apart['largest']:.2f})"
        return f"model/ has the update over the original weights: {figures}"

    def quantise(self, rig: Rig) -> Rig:
        """Give each Linear its codec and, for its weight, as many bytes; they are made from what the weight's own source gives."""
        import torch

        from lilliput.ops.q4 import Q4

        codecs = {f"{path}.weight": self.codec(*shape) for path, shape in self.stored(rig.facts).items()}
        for name, codec in codecs.items():
            linear = rig.model.get_submodule(name.removesuffix(".weight"))
            linear.codec = codec
            linear.weight = torch.nn.Parameter(torch.empty(codec.bytes, dtype=torch.uint8, device="meta"), requires_grad=False)

        def encoded(name: str, shape: tuple[int, ...], seed: int) -> Tensor:
            codec = codecs[name]
            if isinstance(codec, Q4):
                return codec.encode(*self.of_file(rig, name))
            return codec.encode(rig.source(name)(name, rig.facts.shapes[name], seed))

        home = replace(rig.homes[0][1], codec="codes")
        return replace(
            rig,
            homes=(*rig.homes, *((f"{pattern}.weight", home) for pattern in rig.facts.linears)),
            init=(*rig.init, *((f"{pattern}.weight", encoded) for pattern in rig.facts.linears)),
        )

    @property
    def span(self) -> int:
        """Weights that share scales: what a matrix may be cut into."""
        return BLOCKS[self.storage] * (SECOND if self.double else 1)

    def codec(self, outputs: int, inputs: int) -> Nf4 | Q4:
        """How one matrix is stored."""
        from lilliput.ops.nf4 import Nf4
        from lilliput.ops.q4 import Q4

        return Nf4(outputs, inputs, self.double) if self.storage == "nf4" else Q4(outputs, inputs, self.double)

    def of_file(self, rig: Rig, name: str) -> tuple[str, np.ndarray]:
        """(GGUF type, rows of blocks) of a matrix. UserError where the model comes from no file of such blocks."""
        found = rig.blocks(name)
        if found is None:
            raise UserError(f"qlora.storage=file: no file has `{name}` in 4 bits", "it keeps the 4-bit blocks of a GGUF (Q4_0, Q4_1)", "qlora.storage=nf4")
        return found

    def bytes(self, weights: int) -> int:
        """Of a matrix of so many weights: 4 bits each; a block's scale in int8 (or fp32), an fp32 step each 256 of them and their mean; in
        storage=file the same twice, for scales and offsets (or both in fp16)."""
        return sum(SECTIONS[self.storage](weights, self.double))


@dataclass(frozen=True)
class Originals:
    """The weights from before the rounding, read again one by one. before: the rig that had them; stored: paths of the Linears in 4 bits."""

    before: Rig
    stored: frozenset[str]

    def read(self, path: str) -> Tensor:
        """The fp32 matrix of a Linear."""
        name = f"{path}.weight"
        return self.before.source(name)(name, self.before.facts.shapes[name], self.before.seed).float()

    def merged(self, rig: Rig, name: str) -> Tensor:
        """A parameter as files hold it: the original, with the update where there is one."""
        path, _, leaf = name.rpartition(".")
        if leaf != "weight" or path not in self.stored:
            return merged(rig, name)
        deltas, value = rig.model.get_submodule(path).deltas, self.read(path)
        return value + deltas["lora"].weight().detach() if "lora" in deltas else value

    def apart(self, rig: Rig) -> dict[str, float]:
        """Logits over the original weights less those over the base in 4 bits, on 128 random tokens: their rms, the largest, the rms of the logits."""
        import torch

        spec = rig.model.spec
        tokens_BT = torch.randint(spec.vocab, (1, min(128, spec.context)), generator=torch.Generator().manual_seed(0)).to(rig.device)
        logits = []
        rig.model.eval()
        with torch.no_grad():
            for decode in (None, self.read):
                held = self.decoding(rig.model, decode) if decode else {}
                logits.append(rig.model(tokens_BT))
                for linear, codec in held.items():
                    linear.codec = codec
        difference = logits[1] - logits[0]
        rms = lambda t: float(t.square().mean().sqrt())
        return {"rms": rms(difference), "largest": float(difference.abs().max()), "of": rms(logits[0])}

    def decoding(self, model: Any, read: Callable[[str], Tensor]) -> dict[Any, Any]:
        """Have every stored Linear read its matrix; Linear (or tile of one) -> the codec that it had."""
        held = {}
        for path in self.stored:
            linear = model.get_submodule(path)
            for number, part in enumerate(linear.tiles or [linear]):
                held[part] = part.codec
                part.codec = Reading(part.codec.bytes, path, read, number, max(1, len(linear.tiles)))
        return held


@dataclass(frozen=True)
class Reading:
    """Stands where a codec stands and reads the matrix elsewhere."""

    bytes: int
    path: str
    read: Callable[[str], Tensor]
    number: int
    count: int

    def decode(self, stored: Tensor) -> Tensor:
        """The matrix, or one of `count` equal pieces of its rows."""
        return self.read(self.path).to(stored.device).chunk(self.count)[self.number]
