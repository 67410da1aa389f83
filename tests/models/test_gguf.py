"""GGUF: our header reader and layout against the gguf package, in every type; every lie about counts and offsets is refused."""

from __future__ import annotations

import math
import struct
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import gguf as package
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from served import held

from lilliput.base.errors import UserError
from lilliput.models import gguf
from lilliput.models.checkpoints import open_checkpoint
from lilliput.models.native import NativeDecoder
from lilliput.models.spec import Rope
from lilliput.models.stored import native_bytes
from lilliput.ops import native

NAMES = {number: name for number, (name, _, _) in gguf.TYPES.items()}
WRITABLE = ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")  # the package quantises to these; K-quants it only reads


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)


def blocks(kind: int, rows: int, columns: int) -> np.ndarray:
    """Rows of quantised bytes: by the package where it can, else random blocks with a finite scale."""
    name, block, size = gguf.TYPES[kind]
    if name in WRITABLE:
        return package.quants.quantize(random(rows, columns), package.GGMLQuantizationType(kind))
    raw = np.random.default_rng(kind).integers(0, 255, (rows, columns // block, size), dtype=np.uint8)
    halves = {"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}[name]
    for at in halves:
        raw[:, :, at : at + 2] = np.frombuffer(np.float16(0.01).tobytes(), np.uint8)
    return raw.reshape(rows, -1)


def write(path: Path, tensors: dict[str, Any], metadata: dict[str, Any], architecture: str = "llama") -> Path:
    """tensors: name -> fp32 array, or (bytes, type number). metadata: key after the architecture -> value; `/key` is a whole key."""
    writer = package.GGUFWriter(path, architecture)
    for key, value in metadata.items():
        full = key[1:] if key.startswith("/") else f"{architecture}.{key}"
        add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string, list: writer.add_array}[type(value)]
        add(full, value)
    for name, value in tensors.items():
        array, kind = value if isinstance(value, tuple) else (value, None)
        writer.add_tensor(name, array, raw_dtype=None if kind is None else package.GGMLQuantizationType(kind))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


LLAMA = {"block_count": 1, "context_length": 64, "embedding_length": 32, "feed_forward_length": 64, "attention.head_count": 4, "attention.head_count_kv": 2,
         "attention.layer_norm_rms_epsilon": 1e-5}  # fmt: skip


def llama(dim: int = 32, ffn: int = 64, kv: int = 16, vocab: int = 48, layers: int = 1) -> dict[str, np.ndarray]:
    shapes = {"attn_norm": (dim,), "attn_q": (dim, dim), "attn_k": (kv, dim), "attn_v": (kv, dim), "attn_output": (dim, dim), "ffn_norm": (dim,),
              "ffn_gate": (ffn, dim), "ffn_up": (ffn, dim), "ffn_down": (dim, ffn)}  # fmt: skip
    tensors = {"token_embd.weight": random(vocab, dim, seed=1), "output_norm.weight": random(dim, seed=2)}
    return tensors | {f"blk.{layer}.{name}.weight": random(*shape, seed=3 + layer) for layer in range(layers) for name, shape in shapes.items()}


@pytest.mark.parametrize("kind", gguf.TYPES, ids=NAMES.get)
def test_every_type_is_bit_equal_to_the_package(tmp_path: Path, kind: int) -> None:
    raw = blocks(kind, 6, 512)
    path = write(tmp_path / "x.gguf", {"a": (raw, kind), "b": random(5), "cube": random(2, 3, 4)}, {})
    header = gguf.read_header(path)
    assert header.tensors["a"].dtype == NAMES[kind]
    assert header.tensors["a"].shape == (6, 512)
    oracle = {tensor.name: tensor for tensor in package.GGUFReader(path).tensors}
    expected = package.quants.dequantize(oracle["a"].data, oracle["a"].tensor_type)
    assert np.isfinite(expected).all()
    assert gguf.read(header, "a").tobytes() == expected.astype(np.float32).tobytes()
    assert np.array_equal(gguf.read(header, "b"), random(5))
    assert np.array_equal(gguf.read(header, "cube"), random(2, 3, 4))


def test_metadata_equals_the_packages(tmp_path: Path) -> None:
    values: dict[str, Any] = {"/a": 7, "/f": 0.5, "/t": "grüß\n", "/yes": True, "/ints": [1, 2, 3], "/words": ["a", "", "ß"], "/floats": [0.5, 1.5]}
    header = gguf.read_header(write(tmp_path / "x.gguf", {"a": random(3)}, values))
    assert header.metadata == {"general.architecture": "llama", **{key[1:]: value for key, value in values.items()}}


def test_a_model_reads_as_it_was_before_the_permutation(tmp_path: Path) -> None:
    """q and k go in permuted as llama.cpp's converter does it (its own formula) and come out as they were; v untouched."""

    def permute(weights: np.ndarray, heads: int) -> np.ndarray:
        return weights.reshape(heads, 2, weights.shape[0] // heads // 2, *weights.shape[1:]).swapaxes(1, 2).reshape(weights.shape)

    plain = llama()
    stored = plain | {"blk.0.attn_q.weight": permute(plain["blk.0.attn_q.weight"], 4), "blk.0.attn_k.weight": permute(plain["blk.0.attn_k.weight"], 2)}
    checkpoint = open_checkpoint(write(tmp_path / "x.gguf", stored, LLAMA | {"/tokenizer.ggml.eos_token_id": 2}))
    assert (checkpoint.format, checkpoint.spec.tied, checkpoint.spec.eos_ids, checkpoint.spec.norm_eps) == ("gguf", True, (2,), 1e-5)
    assert checkpoint.dtypes == {"F32": checkpoint.bytes}
    for ours, theirs in {"attn.q_proj": "attn_q", "attn.k_proj": "attn_k", "attn.v_proj": "attn_v", "mlp.down_proj": "ffn_down"}.items():
        assert np.array_equal(checkpoint.read(f"layers.0.{ours}.weight").numpy(), plain[f"blk.0.{theirs}.weight"]), ours
    assert not np.array_equal(stored["blk.0.attn_q.weight"], plain["blk.0.attn_q.weight"])


@pytest.mark.skipif(native.module() is None, reason=str(native.missing()))
@pytest.mark.parametrize("name", WRITABLE)
def test_resident_bytes_of_every_type(name: str, tmp_path: Path) -> None:
    """What a plan counts is what the native runner holds: files in F16 and 4 and 8 bits as they are, the others decoded, whatever the file's size."""
    kind = next(number for number, found in NAMES.items() if found == name)
    quantise = lambda value: (package.quants.quantize(value, package.GGMLQuantizationType(kind)), kind)
    tensors = {key: quantise(value) if value.ndim == 2 and name != "F32" else value for key, value in llama().items()}
    checkpoint = open_checkpoint(write(tmp_path / "x.gguf", tensors, LLAMA | {"/tokenizer.ggml.eos_token_id": 2}))
    model = NativeDecoder(checkpoint.spec, checkpoint.read, checkpoint.layout, checkpoint.packed)
    found = native_bytes(checkpoint.spec, "file", checkpoint.layout)
    assert found.bytes == held(model) and set(found.formats) == {{"F16": "f16", "Q4_0": "q4", "Q4_1": "q4", "Q8_0": "w8"}.get(name, "f32")}


@pytest.mark.parametrize("architecture", ["qwen2", "qwen3"])
def test_qwen_rows_are_not_permuted(tmp_path: Path, architecture: str) -> None:
    tensors = llama() | {"output.weight": random(48, 32)}
    if architecture == "qwen2":
        tensors |= {f"blk.0.attn_{part}.bias": random(rows) for part, rows in (("q", 32), ("k", 16), ("v", 16))}
    else:
        tensors |= {f"blk.0.attn_{part}_norm.weight": random(8) for part in "qk"}
    checkpoint = open_checkpoint(write(tmp_path / "x.gguf", tensors, LLAMA | {"attention.key_length": 8, "attention.value_length": 8}, architecture))
    spec = checkpoint.spec
    assert (spec.family, spec.qkv_bias, spec.qk_norm, spec.tied, spec.head_dim) == (architecture, architecture == "qwen2", architecture == "qwen3", False, 8)
    assert np.array_equal(checkpoint.read("layers.0.attn.q_proj.weight").numpy(), tensors["blk.0.attn_q.weight"])
    assert np.array_equal(checkpoint.read("head.weight").numpy(), tensors["output.weight"])


@pytest.mark.parametrize("head", ["none", "repeated", "own"])
def test_gpt2_is_cut_from_its_fused_matrix(tmp_path: Path, head: str) -> None:
    dim = 32
    tensors = {"token_embd.weight": random(48, dim), "position_embd.weight": random(16, dim)}
    for name, shape in {"attn_qkv": (3 * dim, dim), "attn_output": (dim, dim), "ffn_up": (4 * dim, dim), "ffn_down": (dim, 4 * dim)}.items():
        tensors |= {f"blk.0.{name}.weight": random(*shape), f"blk.0.{name}.bias": random(shape[0])}
    for name in ("blk.0.attn_norm", "blk.0.ffn_norm", "output_norm"):
        tensors |= {f"{name}.weight": random(dim), f"{name}.bias": random(dim, seed=9)}
    if head != "none":
        tensors["output.weight"] = tensors["token_embd.weight"] if head == "repeated" else random(48, dim, seed=5)
    keys = {"block_count": 1, "context_length": 16, "embedding_length": dim, "feed_forward_length": 4 * dim, "attention.head_count": 4,
            "attention.layer_norm_epsilon": 1e-5}  # fmt: skip
    checkpoint = open_checkpoint(write(tmp_path / "x.gguf", tensors, keys, "gpt2"))
    assert (checkpoint.spec.family, checkpoint.spec.norm, checkpoint.spec.activation, checkpoint.spec.tied) == ("gpt2", "layer", "gelu_tanh", head != "own")
    parts = [checkpoint.read(f"layers.0.attn.{part}_proj.weight").numpy() for part in "qkv"]
    assert np.array_equal(np.concatenate(parts), tensors["blk.0.attn_qkv.weight"])
    assert np.array_equal(checkpoint.read("layers.0.attn.k_proj.bias").numpy(), tensors["blk.0.attn_qkv.bias"][dim : 2 * dim])


# ---- RoPE scaling


def rope_of(tmp_path: Path, keys: dict[str, Any], divisors: np.ndarray | None = None) -> Rope:
    extra = {} if divisors is None else {"rope_freqs.weight": divisors}
    return open_checkpoint(write(tmp_path / "x.gguf", llama() | extra, LLAMA | keys)).spec.rope


def llama3_divisors(factor: float, theta: float, dim: int = 8, low: float = 1.0, high: float = 4.0, original: int = 8192) -> np.ndarray:
    """As convert_hf_to_gguf.py makes them (LlamaModel.generate_extra_tensors), by wavelength."""
    out = []
    for frequency in 1.0 / (theta ** (np.arange(0, dim, 2) / dim)):
        wavelength = 2 * math.pi / frequency
        smooth = (original / wavelength - low) / (high - low)
        out.append(1.0 if wavelength < original / high else factor if wavelength > original / low else 1 / ((1 - smooth) / factor + smooth))
    return np.array(out, np.float32)


def test_rope_scaling_is_read(tmp_path: Path) -> None:
    assert rope_of(tmp_path, {"rope.freq_base": 100000.0}) == Rope(100000.0)
    assert rope_of(tmp_path, {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}) == Rope(10000.0, "linear", 4.0)
    yarn = rope_of(tmp_path, {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 16})
    assert yarn == Rope(10000.0, "yarn", 4.0, 16, attention_factor=0.1 * math.log(4) + 1)
    found = rope_of(tmp_path, {"rope.freq_base": 500000.0}, llama3_divisors(32.0, 500000.0))
    assert found == Rope(500000.0, "llama3", 32.0, 8192, 1.0, 4.0)


@pytest.mark.parametrize(("keys", "what"), [({"rope.scaling.type": "longrope"}, "longrope"), ({"rope.dimension_count": 4}, "rope.dimension_count=4"),
                                            ({"expert_count": 8}, "expert_count=8"), ({"attention.value_length": 16}, "value_length=16"),
                                            ({"attention.clamp_kqv": 8.0}, "clamp_kqv=8.0")])
def test_options_that_change_the_numbers_are_refused_by_name(tmp_path: Path, keys: dict[str, Any], what: str) -> None:
    with pytest.raises(UserError) as caught:
        rope_of(tmp_path, keys)
    assert what in caught.value.what


def test_divisors_of_another_rule_are_refused(tmp_path: Path) -> None:
    for divisors in (np.array([1, 2, 3, 4], np.float32), llama3_divisors(8.0, 10000.0, dim=16), np.zeros(4, np.float32)):
        with pytest.raises(UserError, match="RoPE scaling"):
            rope_of(tmp_path, {}, divisors)


# ---- bad files


def test_other_architectures_and_types_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="`mamba`"):
        open_checkpoint(write(tmp_path / "x.gguf", llama(), {}, "mamba"))
    path = write(tmp_path / "iq.gguf", {"a": (np.zeros((1, 66), np.uint8), 16)}, {})
    with pytest.raises(UserError, match="stored as IQ2_XXS"):
        gguf.read_header(path)


@pytest.mark.parametrize(("change", "why"), [
    ({"block_count": 1_000_000_000}, "cannot hold 1,000,000,000 layers"),
    ({"block_count": 2}, "missing: blk.1.attn_norm.weight"),
    ({"block_count": 0}, "it is '0'"),
    ({"embedding_length": 40}, "sizes make it"),
    ({"attention.head_count": "four"}, "it is 'four'"),
    ({"attention.layer_norm_rms_epsilon": float("nan")}, "it is 'nan'"),
    ({"/tokenizer.ggml.eos_token_id": "two"}, "eos = 'two'"),
])  # fmt: skip
def test_contradictions_are_refused(tmp_path: Path, change: dict[str, Any], why: str) -> None:
    with pytest.raises(UserError) as caught:
        open_checkpoint(write(tmp_path / "x.gguf", llama(), LLAMA | change))
    assert why in caught.value.why, caught.value


def test_missing_and_unexpected_tensors_are_named(tmp_path: Path) -> None:
    tensors = llama() | {"blk.0.ffn_exps.weight": random(3)}
    del tensors["blk.0.attn_v.weight"]
    with pytest.raises(UserError) as caught:
        open_checkpoint(write(tmp_path / "x.gguf", tensors, LLAMA))
    assert caught.value.why == "1 missing: blk.0.attn_v.weight; 1 unexpected: blk.0.ffn_exps.weight"


def raw(version: int = 3, tensors: int = 0, pairs: int = 0, body: bytes = b"", magic: bytes = b"GGUF") -> bytes:
    return magic + struct.pack("<IQQ", version, tensors, pairs) + body


def text(value: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(value) if length is None else length) + value


def row(name: bytes = b"a", dims: tuple[int, ...] = (8,), kind: int = 0, offset: int = 0, count: int | None = None) -> bytes:
    return text(name) + struct.pack("<I", len(dims) if count is None else count) + struct.pack(f"<{len(dims)}QIQ", *dims, kind, offset)


HUGE = 1 << 62
ALIGN = text(b"general.alignment") + struct.pack("<I", 4)


@pytest.mark.parametrize(("content", "why"), [
    (b"GGUF", "has 4 bytes"),
    (raw(magic=b"GGML"), "starts with b'GGML'"),
    (raw(version=1), "version is 1"),
    (raw(version=3 << 24), "big-endian"),
    (raw(tensors=HUGE), f"{HUGE:,} tensors would need"),
    (raw(pairs=HUGE), f"{HUGE:,} metadata pairs would need"),
    (raw(pairs=1, body=text(b"", HUGE) + bytes(16)), f"a text of {HUGE:,} bytes would need"),
    (raw(pairs=1, body=text(b"k") + struct.pack("<I", 99)), "unknown type 99"),
    (raw(pairs=1, body=text(b"k") + struct.pack("<IIQ", 9, 4, HUGE)), f"claims {HUGE:,} numbers"),
    (raw(pairs=1, body=text(b"k") + struct.pack("<IIQ", 9, 4, 1000)), "1,000 values of `k` would need"),
    (raw(pairs=1, body=text(b"k") + struct.pack("<IIQ", 9, 8, HUGE)), f"{HUGE:,} texts of `k` would need"),
    (raw(pairs=1, body=text(b"k") + struct.pack("<IIQ", 9, 9, 1)), "nested type"),
    (raw(pairs=2, body=2 * (text(b"k") + struct.pack("<II", 4, 7))), "the key `k` stands twice"),
    (raw(pairs=1, body=text(b"\xff\xfe") + struct.pack("<II", 4, 7)), "not UTF-8"),
    (raw(pairs=1, body=ALIGN + struct.pack("<I", 0)), "alignment is 0"),
    (raw(pairs=1, body=ALIGN + struct.pack("<I", 48)), "alignment is 48"),
    (raw(tensors=1, body=row(count=9)), "9 dimensions"),
    (raw(tensors=1, body=row(count=0) + bytes(64)), "0 dimensions"),
    (raw(tensors=2, body=row() + row() + bytes(64)), "`a` stands twice"),
    (raw(tensors=1, body=row(dims=(HUGE, HUGE)) + bytes(64)), "ends at byte"),
    (raw(tensors=1, body=row(dims=(0,)) + bytes(64)), "shape [0]"),
    (raw(tensors=1, body=row(dims=(33,), kind=2) + bytes(64)), "multiple of 32"),
    (raw(tensors=1, body=row(offset=HUGE) + bytes(64)), "ends at byte"),
    (raw(tensors=1, body=row(offset=7) + bytes(640)), "no multiple of the alignment 32"),
    (raw(tensors=1, body=row(dims=(64,)) + bytes(64)), "the file has"),
    (raw(tensors=2, body=row() + row(name=b"b") + bytes(640)), "overlap"),
], ids=lambda value: value if isinstance(value, str) else "")  # fmt: skip
def test_a_lying_header_is_refused(tmp_path: Path, content: bytes, why: str) -> None:
    path = tmp_path / "bad.gguf"
    path.write_bytes(content)
    tracemalloc.start()
    try:
        with pytest.raises(UserError) as caught:
            gguf.read_header(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert why in caught.value.why
    assert caught.value.fix
    assert peak < 1 << 20


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    tokens = {"/tokenizer.ggml.tokens": ["a", "b", "c"], "/tokenizer.ggml.token_type": [1, 1, 3], "/tokenizer.ggml.eos_token_id": 2}
    tensors = llama() | {"rope_freqs.weight": llama3_divisors(8.0, 10000.0)}
    return write(tmp_path_factory.mktemp("gguf") / "x.gguf", tensors, LLAMA | tokens).read_bytes()


@settings(deadline=None, max_examples=400)
@given(data=st.data())
def test_damage_is_a_user_error_and_costs_no_memory(tmp_path_factory: pytest.TempPathFactory, small: bytes, data: st.DataObject) -> None:
    damaged = bytearray(small)
    header = 1400  # bytes of metadata and table; the rest is weights, where any value is a number
    for _ in range(data.draw(st.integers(1, 4), label="places")):
        at = data.draw(st.integers(0, header))
        what = data.draw(st.binary(min_size=1, max_size=8))
        damaged[at : at + len(what)] = what
    if data.draw(st.booleans(), label="cut"):
        damaged = damaged[: data.draw(st.integers(0, len(small)))]
    path = tmp_path_factory.getbasetemp() / "fuzz.gguf"
    path.write_bytes(damaged)
    tracemalloc.start()
    try:
        open_checkpoint(path)
    except UserError as error:
        assert error.why
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 4 << 20


def test_headers_are_read_without_torch(tmp_path: Path) -> None:
    path = write(tmp_path / "x.gguf", llama(), LLAMA)
    code = f"import sys; from lilliput.models.checkpoints import open_checkpoint as o; o({str(path)!r}); assert not {{'torch', 'gguf'}} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_default_model(smollm2: Path) -> None:
    checkpoint = open_checkpoint(smollm2)
    spec = checkpoint.spec
    assert (spec.vocab, spec.dim, spec.layers, spec.heads, spec.kv_heads, spec.ffn, spec.context) == (49152, 576, 30, 9, 3, 1536, 8192)
    assert checkpoint.dtypes == {"Q8_0": 30_081_024, "Q4_1": 66_355_200, "F32": 140_544}
    raw_k = gguf.read(gguf.read_header(smollm2), "blk.7.attn_k.weight")
    k = checkpoint.read("layers.7.attn.k_proj.weight").numpy()
    assert np.array_equal(k[[0, 1, 32, 33]], raw_k[[0, 2, 1, 3]])  # first head: pairs (2d, 2d + 1) became (d, d + 32)
