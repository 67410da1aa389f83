"""GPTQ and AWQ checkpoints: safetensors whose config.json has a `quantization_config`.

A Linear `X` lies there as X.qweight, X.qzeros, X.scales (GPTQ: X.g_idx too) instead of X.weight; which ones do is read from the file, so what
was left in floating point (the head, GPTQ's `dynamic`, AWQ's `modules_to_not_convert`) is no special case. Bits and group follow from
the shapes. Served as stored, nothing is rounded (ops/words.py); anything else reads the decoded fp32 matrix.

AutoGPTQ's older files give every quantised Linear a bias of zeros, which is left out where the model has none.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lilliput.base.errors import UserError
from lilliput.models import safetensor
from lilliput.models.families import Transform
from lilliput.models.safetensor import Entry
from lilliput.models.stored import Layout

if TYPE_CHECKING:
    from lilliput.ops.panels import PackedWeight
    from lilliput.ops.words import Numbers

Stored = Mapping[str, tuple[Path, Entry]]
GROUPS = (128, 64, 32)  # that the kernels have
TAKE = "take a model of the same name in another format, or the unquantised one"
DECODED = "serve.weights=fp16"  # of the decoded matrices


@dataclass(frozen=True)
class Method:
    """gptq or awq. plus_one: zeros are stored less one (GPTQ's format v1)."""

    name: str
    plus_one: bool = False


def method(config: Mapping[str, Any]) -> Method | None:
    """The method of a parsed config.json; None when it has none. UserError for one that is not read, naming those that are."""
    asked = config.get("quantization_config")
    if asked is None:
        return None
    name = asked.get("quant_method") if isinstance(asked, dict) else None
    if name not in ("gptq", "awq"):
        raise UserError(f"config.json says quantization_config.quant_method={name!r}", "read are gptq and awq, and GGUF files", TAKE)
    bits, valid = asked.get("bits", asked.get("w_bit", 4)), (4, 8) if name == "gptq" else (4,)
    if bits not in valid:
        raise UserError(f"{name} with bits={bits!r} is not read", f"the kernels have {' and '.join(map(str, valid))} bits for it", TAKE)
    form = str(asked.get("checkpoint_format" if name == "gptq" else "version") or ("gptq" if name == "gptq" else "gemm")).lower()
    known = ("gptq", "gptq_v2") if name == "gptq" else ("gemm",)
    if form not in known:
        raise UserError(f"{name} in the layout {form!r} is not read", f"read are {', '.join(known)}", TAKE)
    return Method(name, form == "gptq")


class Place(NamedTuple):
    """Where a matrix lies: its module in the file, which part of that it is, and what the shapes say."""

    module: str
    transform: Transform
    inputs: int
    bits: int
    group: int


@dataclass(frozen=True)
class Quantised:
    """The quantised matrices of a checkpoint, by their canonical names."""

    method: Method
    stored: Stored
    places: Mapping[str, Place]

    @property
    def files(self) -> set[str]:
        """The tensors that they consist of."""
        return {name for place in self.places.values() for name in self.parts(place.module).values()}

    def parts(self, module: str) -> dict[str, str]:
        """Part -> its tensor's name, of those that are there."""
        return {part: name for part in ("qweight", "qzeros", "scales", "g_idx") if (name := f"{module}.{part}") in self.stored}

    def layout(self, name: str) -> Layout | None:
        """How the kernels would read a matrix; None where it is not quantised. UserError where they cannot."""
        if name not in self.places:
            return None
        module, _, inputs, bits, group = self.places[name]
        if self.reordered(module, inputs, group):
            raise UserError(f"{module} is grouped by activation", "its g_idx does not rise (desc_act), and the kernels read groups side by side", DECODED)
        if bits == 8 and group == inputs:
            return Layout("w8")
        found = next((g for g in GROUPS if group % g == 0), None)
        if found is None:
            raise UserError(f"{module} has groups of {group} inputs", "the kernels have groups of 32, 64 and 128, and those that they divide", DECODED)
        return Layout("w8", found) if bits == 8 else Layout("q4", found, "zeros")

    def reordered(self, module: str, inputs: int, group: int) -> bool:
        """Whether inputs lie in other groups than in order."""
        place = self.stored.get(f"{module}.g_idx")
        if place is None or group == inputs:
            return False
        import numpy as np

        return not np.array_equal(safetensor.raw(*place).view("<i4"), np.arange(inputs) // group)

    def numbers(self, name: str) -> Numbers:
        """A matrix as numbers, scales and zeros."""
        from lilliput.ops import words

        module, transform, _, bits, group = self.places[name]
        read = {part: safetensor.read(self.stored[full][0], full) for part, full in self.parts(module).items()}
        if self.method.name == "awq":
            found = words.awq(read["qweight"], read["qzeros"], read["scales"])
        else:
            found = words.gptq(read["qweight"], read["qzeros"], read["scales"], bits, group, read.get("g_idx"), self.method.plus_one)
        if isinstance(transform, str):
            return found
        each = found.n_NK.shape[0] // transform[2]
        return found.rows(transform[1] * each, (transform[1] + 1) * each)

    def packed(self, names: Sequence[str]) -> PackedWeight:
        """Matrices of one layout, stacked."""
        from lilliput.ops import words

        layout, numbers = self.layout(names[0]), [self.numbers(name) for name in names]
        assert layout is not None, f"{names[0]} is not quantised"
        return words.pack(numbers, layout.group, self.places[names[0]].module)


def find(path: Path, how: Method | None, spec_shapes: Mapping[str, tuple[int, ...]], places: Mapping[str, tuple[str, Transform]], stored: Stored) -> Quantised:
    """The matrices of `places` that lie in words, their shapes checked. UserError for one whose parts do not fit each other."""
    found = dict[str, Place]()
    for name, (source, transform) in places.items() if how else ():
        assert how is not None, "there is a method"
        module = source.removesuffix(".weight")
        if source in stored or not source.endswith(".weight") or f"{module}.qweight" not in stored:
            continue
        outputs, inputs = spec_shapes[name]
        outputs *= 1 if isinstance(transform, str) else transform[2]  # GPT-2's q, k and v lie in one
        found[name] = Place(module, transform, inputs, *_shapes(path, how, module, outputs, inputs, stored))
    return Quantised(how or Method("none"), stored, found)


def _shapes(path: Path, how: Method, module: str, outputs: int, inputs: int, stored: Stored) -> tuple[int, int]:
    """(bits, group) that the shapes of a matrix's parts say."""
    missing = [part for part in ("qzeros", "scales") if f"{module}.{part}" not in stored]
    if missing:
        raise UserError(f"{path}: {module} lacks {' and '.join(missing)}", "a quantised matrix has qweight, qzeros and scales", "download it again")
    here = {part: stored[name][1] for part in ("qweight", "qzeros", "scales", "g_idx") if (name := f"{module}.{part}") in stored}
    rows, groups = ((here[part].shape or (0,))[0] for part in ("qweight", "scales"))
    bits, group = 32 * rows // inputs if how.name == "gptq" else 4, -(-inputs // groups) if groups else 0
    if bits not in (4, 8):
        raise UserError(f"{path}: {module} has {bits} bits", "the kernels have 4 and 8", TAKE)
    per = 32 // bits
    whole: dict[str, tuple[int, ...]] = {"qzeros": (groups, outputs // per), "scales": (groups, outputs)}
    whole["qweight"] = (inputs // per, outputs) if how.name == "gptq" else (inputs, outputs // per)
    if "g_idx" in here:
        whole["g_idx"] = (inputs,)
    types = {part: safetensor.FLOATS if part == "scales" else ("I32",) for part in whole}
    wrong = [part for part, wanted in whole.items() if here[part].shape != wanted or here[part].dtype not in types[part]]
    if wrong or not group or inputs % group:
        part = wrong[0] if wrong else "scales"
        why = f"{inputs} inputs and {outputs} outputs in {bits} bits make it {' or '.join(types[part])} {list(whole[part])}, of groups that divide the inputs"
        raise UserError(f"{path}: `{module}.{part}` is {here[part].dtype} {list(here[part].shape)}", why, "download it again")
    return bits, group


def zero_bias(path: Path, quantised: Quantised) -> Callable[[str], bool]:
    """Whether a tensor is a bias of zeros beside a quantised matrix, which changes nothing. UserError for one that is not of zeros."""
    modules = {module for module, *_ in quantised.places.values()}

    def ignorable(name: str) -> bool:
        module, _, kind = name.rpartition(".")
        if kind != "bias" or module not in modules:
            return False
        if safetensor.raw(*quantised.stored[name]).any():
            raise UserError(f"{path}: `{name}` is not zero", "this architecture has no bias there", "check config.json, or download it again")
        return True

    return ignorable
