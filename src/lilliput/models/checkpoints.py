"""Checkpoints in: safetensors folders, GGUF and llama2.c files, by canonical parameter names. Out: a folder transformers loads.

open_checkpoint() reads headers only and settles everything that can be wrong with them before torch is loaded: what kind
of file it is (by its first bytes, not by its name), the spec, and that each parameter of the spec is there with its
shape and nothing is left over. Tensors are then read one at a time, so the peak is the model and one tensor. save_model()
goes the other way, tensor by tensor into shards, and the folder appears whole or not at all.

Pickle (pytorch_model.bin, .pt, .pth) is refused: unpickling a file runs whatever code its author put there.
"""

from __future__ import annotations

import hashlib
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lilliput.base import records
from lilliput.base.errors import UserError
from lilliput.base.version import __version__
from lilliput.models import families, gguf, gguf_spec, llama2c, quantised, safetensor
from lilliput.models.families import Transform
from lilliput.models.spec import DecoderSpec
from lilliput.models.stored import Layout, Layouts

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor
    from torch.nn import Module

    from lilliput.data.tokenizer import Tokenizer
    from lilliput.models.decoder import Decoder
    from lilliput.ops.panels import PackedWeight

CARD = "lilliput.json"
STORED = {"fp32": ("float32", 4), "bf16": ("bfloat16", 2), "codes": ("uint8", 1)}  # our word -> torch's word, bytes (codes: ops/nf4.py, ops/q4.py)
SHARD = 4 << 30  # bytes of one weight file at most
BUFFERS = (".rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias")  # constants that older files carry along
LLAMA2C_TOKENIZERS = "tok*.bin"
AS_STORED = {"F16": Layout("f16"), "Q4_0": Layout("q4", 32), "Q4_1": Layout("q4", 32, "mins"), "Q8_0": Layout("w8", 32)}  # type -> what kernels read as it is


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint. `read(name)` gives a canonical parameter: fp32 where it was quantised, else as stored."""

    path: Path
    format: str  # "safetensors" | "gguf" | "llama2c"
    spec: DecoderSpec
    read: Callable[[str], Tensor]
    tokenizer: Callable[[], Tokenizer]
    dtypes: Mapping[str, int]  # stored type -> bytes of the file in it
    files: tuple[Path, ...]  # that hold the weights
    lineage: Mapping[str, Any] | None  # lilliput.json: parents, sections, evaluation; None when another tool made it
    layout: Layouts = lambda name: None  # of a matrix that native kernels can read as it lies in the file; None: they take what `read` gives
    packed: Callable[[Sequence[str]], PackedWeight] | None = None  # matrices of one layout, stacked along their outputs, bit for bit
    blocks: Callable[[str], tuple[str, np.ndarray] | None] = lambda name: None  # (GGUF type, [outputs, bytes] as stored) of a quantised matrix

    @property
    def bytes(self) -> int:
        """Bytes of weights on disk."""
        return sum(self.dtypes.values())

    def digest(self) -> str:
        """sha256 of the weight files, in hex: what lineage calls a parent by (about 1 s a GB)."""
        return hashlib.sha256("".join(records.sha256(file) for file in self.files).encode()).hexdigest()


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Open a folder or a file by what it holds. UserError, before torch is loaded, for whatever a header shows to be wrong."""
    path = Path(path)
    try:
        return _open(path)
    except OSError as error:
        raise UserError(f"cannot read {path}", error.strerror or str(error), f"ls -l {path}") from error


def _open(path: Path) -> Checkpoint:
    if path.is_dir():
        return _open_folder(path)
    if not path.exists():
        raise UserError(f"there is no model at {path}", "neither a file nor a folder", "`lilliput pull smollm2-135m`, or check the path")
    with path.open("rb") as file:
        first = file.read(16)
    if first[:4] == b"GGUF":
        return _gguf(path)
    if first[:2] == b"PK" or first[:1] == b"\x80":
        raise _pickle(path)
    if first[8:9] == b"{":
        return _safetensors(path, path.parent)
    if path.suffix == ".gguf":
        gguf.read_header(path)  # says what is wrong with it
    if path.suffix == ".safetensors":
        safetensor.read_header(path)
    return _llama2c(path)


def _open_folder(path: Path) -> Checkpoint:
    if (path / safetensor.SINGLE).is_file() or (path / safetensor.INDEX).is_file():
        return _safetensors(path, path)
    for ending in ("*.gguf", "*.safetensors"):
        found = sorted(path.glob(ending))
        if len(found) == 1 and not (path / "adapter_config.json").is_file():
            return _open(found[0])
        if len(found) > 1:
            raise UserError(f"{path} has {len(found)} model files", ", ".join(file.name for file in found[:5]), f"name one: {found[0]}")
    if (path / "model" / "config.json").is_file():
        raise UserError(f"{path} is the folder of a run", "its model lies in model/", str(path / "model"))
    if (path / "adapter_config.json").is_file():
        raise UserError(f"{path} holds an adapter and no model", "adapter_config.json without the weights that it adapts", "name the model it was trained on")
    pickles = [file for ending in ("*.bin", "*.pt", "*.pth") for file in sorted(path.glob(ending)) if file.name != "training_args.bin"]
    if len(pickles) == 1 or (pickles and all(file.name.startswith("pytorch_model") for file in pickles)):
        return _open(pickles[0])
    names = sorted(file.name for file in path.iterdir())[:10]
    raise UserError(f"{path} holds no model", f"looked for {safetensor.SINGLE}, {safetensor.INDEX}, *.gguf; found {', '.join(names) or 'no files'}",
                    "check the path")


def _pickle(path: Path) -> UserError:
    fix = f"""python -c "from transformers import AutoModelForCausalLM as A; A.from_pretrained('{path.parent}').save_pretrained('{path.parent}-safe')\""""
    return UserError(f"{path} is a pickle and is not read", "unpickling a file runs any code its author put into it; safetensors holds numbers only",
                     f"if you trust it, convert it once: {fix}")


def materialise(model: Decoder, checkpoint: Checkpoint, dtype: str = "fp32", device: str = "cpu") -> Decoder:
    """Give a model built on the meta device its weights, one tensor at a time, stored as `dtype`. Returns the model.

    UserError names the first parameter that the checkpoint lacks or has in another shape (a checkpoint of another model).
    """
    import torch

    ours, theirs = model.spec.shapes(), checkpoint.spec.shapes()
    differ = [name for name in [*ours, *theirs] if ours.get(name) != theirs.get(name)]
    if differ:
        why = f"`{differ[0]}`: the model has {ours.get(differ[0], 'none')}, the checkpoint {theirs.get(differ[0], 'none')}; {len(differ)} parameters differ"
        raise UserError(f"{checkpoint.path} is a checkpoint of another model", why, "name the model that it was saved from")
    fill(model, lambda name, shape: checkpoint.read(name).to(device=device, dtype=getattr(torch, STORED[dtype][0])))
    return model


def fill(model: Module, value: Callable[[str, tuple[int, ...]], Tensor]) -> None:
    """Give every meta parameter its storage: value(name, shape), asked for one at a time, so the peak is the model plus one tensor."""
    from torch.nn import Parameter

    for path, module in model.named_modules():
        for leaf, meta in list(module.named_parameters(recurse=False)):
            if meta.is_meta:
                name = f"{path}.{leaf}" if path else leaf
                setattr(module, leaf, Parameter(value(name, tuple(meta.shape)).contiguous(), requires_grad=meta.requires_grad))


def save_model(folder: str | Path, read: Callable[[str], Tensor], spec: DecoderSpec, tokenizer: Tokenizer, *, dtype: str = "fp32",
               lineage: Mapping[str, Any] | None = None) -> None:  # fmt: skip
    """Write a model folder that open_checkpoint and transformers load; whole or not at all.

    read(name): a canonical parameter, asked for one at a time. lineage: parents, sections, evaluation for lilliput.json,
    which gets version and hashes besides. UserError when the disk is full or refuses.
    """
    config = families.hf_from_spec(spec) | {"torch_dtype": STORED[dtype][0]}
    needed = STORED[dtype][1] * sum(math.prod(shape) for shape in spec.shapes().values())
    ids = {key: config.get(key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    with records.atomic_folder(folder) as building:
        free = shutil.disk_usage(building).free
        if free < needed:
            raise UserError(f"disk full: {folder} cannot be written", f"the model needs {needed:,} bytes, {free:,} are free",
                            "free some space, or choose another folder")
        records.write_json(building / "config.json", config)
        records.write_json(building / "generation_config.json", {key: value for key, value in ids.items() if value is not None})
        tokenizer.save(building)
        files = _write_shards(building, read, spec, dtype)
        hashes = {"tokenizer": tokenizer.digest(), **{file.name: records.sha256(file) for file in files}}
        records.write_json(building / CARD, {"lilliput": __version__, "parents": [], "sections": {}, "evaluation": {}, **(lineage or {}), "hashes": hashes})


def _write_shards(folder: Path, read: Callable[[str], Tensor], spec: DecoderSpec, dtype: str) -> list[Path]:
    """Write the tensors into files of at most SHARD bytes, one file in memory at a time; an index where there are several."""
    import torch
    from safetensors.torch import save_file

    shards: list[list[str]] = []
    held: dict[str, Tensor] = {}
    size = total = 0

    def flush() -> None:
        save_file(held, folder / f"{len(shards)}.part", metadata={"format": "pt"})
        shards.append(list(held))
        held.clear()

    for name, tensor in families.from_canonical(spec, read):
        tensor = tensor.detach().to(device="cpu", dtype=getattr(torch, STORED[dtype][0]))
        if held and size + tensor.nbytes > SHARD:
            flush()
            size = 0
        held[name] = tensor
        size, total = size + tensor.nbytes, total + tensor.nbytes
    flush()
    names = [f"model-{n + 1:05d}-of-{len(shards):05d}.safetensors" for n in range(len(shards))] if len(shards) > 1 else [safetensor.SINGLE]
    for number, name in enumerate(names):
        (folder / f"{number}.part").rename(folder / name)
        (folder / name).chmod((folder / "config.json").stat().st_mode)  # the package writes files that only their owner may read
    if len(shards) > 1:
        weight_map = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
        records.write_json(folder / safetensor.INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    return [folder / name for name in names]


# ---- the formats


def _safetensors(path: Path, folder: Path) -> Checkpoint:
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} has no config.json", "the weights do not say what model they are", "copy the model's config.json there")
    config = records.read_json(folder / "config.json")
    if not isinstance(config, dict):
        raise UserError(f"{folder / 'config.json'} is not a JSON object", f"it holds a {type(config).__name__}", "download the model again")
    how = quantised.method(config)
    spec = families.spec_from_hf({key: value for key, value in config.items() if key != "quantization_config"})
    stored = safetensor.shards(path)
    _plausible(path, spec, len(stored))
    places = {name: (next((n for n in names if n in stored), names[0]), transform) for name, (names, transform) in families.checkpoint_names(spec).items()}
    coded = quantised.find(path, how, spec.shapes(), places, stored)
    shapes = {name: entry.shape for name, (_, entry) in stored.items() if name not in coded.files}
    whole = {places[name][0]: families.stored_shape(places[name][1], spec.shapes()[name]) for name in coded.places}
    tied, no_bias = {"lm_head.weight"} if spec.tied else set(), quantised.zero_bias(path, coded)
    _check(path, spec, places, shapes | whole, lambda name: name in tied or name.endswith(BUFFERS) or no_bias(name))
    floating = {name: source for name, (source, _) in places.items() if name not in coded.places}
    used = {*floating.values(), *coded.files}
    odd = [f"{name} ({stored[name][1].dtype})" for name in floating.values() if stored[name][1].dtype not in safetensor.FLOATS]
    if odd:
        raise UserError(f"{path}: {len(odd)} weights are not floating point", f"first: {odd[0]}; read are {', '.join(safetensor.FLOATS)}",
                        "take the unquantised model")
    if tied & set(stored):
        _same_head(path, stored["lm_head.weight"], stored[places["embed.weight"][0]])

    def read(name: str) -> Tensor:
        if name in coded.places:
            return coded.numbers(name).decode()
        source, transform = places[name]
        return families.to_canonical(transform, safetensor.read(stored[source][0], source))

    def layout(name: str) -> Layout | None:
        return AS_STORED.get(stored[floating[name]][1].dtype) if name in floating else coded.layout(name)

    def packed(names: Sequence[str]) -> PackedWeight:
        return _halves(read, names) if names[0] in floating else coded.packed(names)

    def tokenizer() -> Tokenizer:
        from lilliput.data.tokenizer import Tokenizer

        return _fitting(path, spec, Tokenizer.from_folder(folder))

    card = folder / CARD
    return Checkpoint(path, "safetensors", spec, read, tokenizer, _count((e.dtype, e.end - e.start) for n, (_, e) in stored.items() if n in used),
                      tuple(sorted({file for file, _ in stored.values()})), records.read_json(card) if card.is_file() else None, layout, packed)


def _halves(read: Callable[[str], Tensor], names: Sequence[str]) -> PackedWeight:
    """Matrices of fp16, stacked."""
    import torch

    from lilliput.ops import float_codecs

    return float_codecs.encode(torch.cat([read(name) for name in names]), "f16")


def _same_head(path: Path, head: tuple[Path, safetensor.Entry], embed: tuple[Path, safetensor.Entry]) -> None:
    """A tied model may store its head as well, as long as it is the embedding."""
    import numpy as np

    if head[1][:2] != embed[1][:2] or not np.array_equal(safetensor.raw(*head), safetensor.raw(*embed)):
        raise UserError(f"{path}: the head is not the embedding", "config.json says tie_word_embeddings=true, but lm_head.weight has other values",
                        "set tie_word_embeddings to false in config.json")


def _gguf(path: Path) -> Checkpoint:
    header = gguf.read_header(path)
    spec = gguf_spec.spec_from_gguf(header)
    places = gguf_spec.names(spec)
    _check(path, spec, places, {name: entry.shape for name, entry in header.tensors.items()}, lambda name: gguf_spec.ignorable(header, name))
    used = {name for name, _ in places.values()}

    def read(name: str) -> Tensor:
        source, transform = places[name]
        return families.to_canonical(transform, _unpermuted(spec, name, gguf.read(header, source)))

    def blocks(name: str) -> tuple[str, np.ndarray] | None:
        source, transform = places[name]
        rows = gguf.read_blocks(header, source)
        if rows is None:
            return None
        heads = gguf_spec.permuted_heads(spec, name)
        return header.tensors[source].dtype, families.to_canonical(transform, rows if heads is None else gguf_spec.unpermute(rows, heads))

    def layout(name: str) -> Layout | None:
        return AS_STORED.get(header.tensors[places[name][0]].dtype)

    def packed(names: Sequence[str]) -> PackedWeight:
        found = [part for name in names if (part := blocks(name)) is not None]
        if not found:
            return _halves(read, names)
        import numpy as np

        from lilliput.ops import codecs

        return codecs.from_gguf(found[0][0], np.concatenate([rows for _, rows in found]))

    def tokenizer() -> Tokenizer:
        from lilliput.data.tokenizer import Tokenizer

        return _fitting(path, spec, Tokenizer.from_gguf(header.metadata))

    sizes = _count((entry.dtype, entry.end - entry.start) for name, entry in header.tensors.items() if name in used)
    return Checkpoint(path, "gguf", spec, read, tokenizer, sizes, (path,), None, layout, packed, blocks)


def _llama2c(path: Path) -> Checkpoint:
    header = llama2c.read_header(path)

    def tokenizer() -> Tokenizer:
        from lilliput.data.tokenizer import Tokenizer

        found = sorted(path.parent.glob(LLAMA2C_TOKENIZERS))
        if len(found) != 1:
            why = f"looked for one {LLAMA2C_TOKENIZERS} beside it, found {len(found)}: {', '.join(file.name for file in found)}".rstrip(": ")
            raise UserError(f"{path} has no tokenizer", why, f"cp tok512.bin {path.parent}/")
        return _fitting(path, header.spec, Tokenizer.from_llama2c(found[0]))

    sizes = {"F32": sum(4 * math.prod(shape) for shape, _ in header.tensors.values())}
    return Checkpoint(path, "llama2c", header.spec, lambda name: _unpermuted(header.spec, name, llama2c.read(header, name)), tokenizer, sizes, (path,), None)


def _unpermuted(spec: DecoderSpec, name: str, rows: np.ndarray) -> Tensor:
    import torch

    heads = gguf_spec.permuted_heads(spec, name)
    return torch.tensor(rows if heads is None else gguf_spec.unpermute(rows, heads))  # a copy, aligned as torch's own: kernels round by alignment


# ---- checks


def _plausible(path: Path, spec: DecoderSpec, tensors: int) -> None:
    if spec.layers > tensors:
        raise UserError(f"{path} does not hold this model", f"config.json says {spec.layers:,} layers, the files have {tensors:,} tensors", "download it again")


def _check(path: Path, spec: DecoderSpec, places: Mapping[str, tuple[str, Transform]], stored: Mapping[str, tuple[int, ...]],
           ignorable: Callable[[str], bool]) -> None:  # fmt: skip
    """Every parameter of the spec is in the file with its shape, and nothing else is."""
    shapes = spec.shapes()
    missing = [source for source, _ in places.values() if source not in stored]
    known = {source for source, _ in places.values()}
    unexpected = [name for name in stored if name not in known and not ignorable(name)]
    if missing or unexpected:
        parts = [f"{len(names)} {what}: {', '.join(names[:3])}{' ...' if len(names) > 3 else ''}"
                 for what, names in (("missing", list(dict.fromkeys(missing))), ("unexpected", unexpected)) if names]  # fmt: skip
        raise UserError(f"{path} is not the {spec.family} model that its header says", "; ".join(parts), "download it again, or mend its config")
    for name, (source, transform) in places.items():
        wanted = families.stored_shape(transform, shapes[name])
        if stored[source] != wanted:
            raise UserError(f"{path}: `{source}` has shape {list(stored[source])}", f"the header's sizes make it {list(wanted)}", "download it again")


def _fitting(path: Path, spec: DecoderSpec, tokenizer: Tokenizer) -> Tokenizer:
    if tokenizer.vocab_size > spec.vocab:
        raise UserError(f"the tokenizer of {path} is another model's", f"it has {tokenizer.vocab_size:,} tokens, the embedding {spec.vocab:,} rows",
                        "copy the model's own tokenizer files there")
    return tokenizer


def _count(parts: Any) -> dict[str, int]:
    out: dict[str, int] = {}
    for dtype, size in parts:
        out[dtype] = out.get(dtype, 0) + size
    return out

