"""Headers of safetensors files: what the package writes is read, and no lie gets past."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from lilliput.base.errors import UserError
from lilliput.models import safetensor

TENSORS = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones((4,), np.float16), "empty": np.zeros((0, 5), np.float32), "n": np.array(7, np.int64)}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("st") / "x.safetensors"
    save_file(TENSORS, path, metadata={"format": "np"})
    return path.read_bytes()


def written(tmp_path: Path, header: Any, data: bytes = b"") -> Path:
    path = tmp_path / "bad.safetensors"
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + data)
    return path


def f32(*shape: int, at: tuple[int, int]) -> dict[str, Any]:
    return {"dtype": "F32", "shape": list(shape), "data_offsets": list(at)}


def test_what_the_package_writes_is_read(tmp_path: Path, whole: bytes) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(whole)
    header = safetensor.read_header(path)
    base = 8 + int.from_bytes(whole[:8], "little")
    assert set(header) == set(TENSORS)
    for name, entry in header.items():
        assert entry.shape == TENSORS[name].shape
        assert whole[base + entry.start : base + entry.end] == TENSORS[name].tobytes()
    assert safetensor.read(path, "a").tolist() == TENSORS["a"].tolist()
    assert safetensor.shards(path).keys() == TENSORS.keys()


@pytest.mark.parametrize(
    ("header", "data", "why"),
    [
        (b"[1, 2]", b"", "not a JSON object"),
        (b'{"a": ', b"", "not JSON"),
        (b'{"a": ' + b"[" * 100_000, b"", "not JSON"),
        (b'{"a": {"dtype":"F32","shape":[1],"data_offsets":[0,4]}, "a": {"dtype":"F32","shape":[1],"data_offsets":[4,8]}}', bytes(8), "`a` stands twice"),
        ({"a": {"dtype": "F32", "shape": [1]}}, bytes(4), "lacks dtype, shape or data_offsets"),
        ({"a": 3}, b"", "lacks dtype, shape or data_offsets"),
        ({"a": f32(2, at=(0, 4))}, bytes(4), "has 4 bytes; F32 of shape [2] needs 8"),
        ({"a": f32(2**40, 2**40, at=(0, 4))}, bytes(4), "needs"),
        ({"a": f32(-1, at=(0, 4))}, bytes(4), "not whole numbers"),
        ({"a": f32(1, at=(4, 0))}, bytes(4), "has -4 bytes"),
        ({"a": {"dtype": "F32", "shape": [True], "data_offsets": [0, 4]}}, bytes(4), "not whole numbers"),
        ({"a": f32(1, at=(0, 4)), "b": f32(1, at=(0, 4))}, bytes(8), "overlaps"),
        ({"a": f32(1, at=(0, 4)), "b": f32(1, at=(8, 12))}, bytes(12), "leaves a hole"),
        ({"a": f32(2, at=(0, 8))}, bytes(4), "need 8 bytes, the file has 4"),
        ({"a": f32(1, at=(0, 4))}, bytes(6), "goes on for 2 more"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_lying_header_is_refused(tmp_path: Path, header: Any, data: bytes, why: str) -> None:
    with pytest.raises(UserError) as caught:
        safetensor.read_header(written(tmp_path, header, data))
    assert why in caught.value.why
    assert caught.value.fix


@pytest.mark.parametrize(("raw", "why"), [(b"", "has 0 bytes"), (b"\0\0\0", "has 3 bytes"), ((1 << 60).to_bytes(8, "little"), "at most 100,000,000"),
                                          ((99).to_bytes(8, "little") + b"{}", "claims a header of 99 bytes, the file has 10")],
                         ids=lambda value: value if isinstance(value, str) else "")
def test_an_absurd_header_length_is_refused(tmp_path: Path, raw: bytes, why: str) -> None:
    path = tmp_path / "bad.safetensors"
    path.write_bytes(raw)
    with pytest.raises(UserError) as caught:
        safetensor.read_header(path)
    assert why in caught.value.why


def test_an_unknown_type_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="'F3'"):
        safetensor.read_header(written(tmp_path, {"a": {"dtype": "F3", "shape": [1], "data_offsets": [0, 4]}}, bytes(4)))


def sharded(folder: Path) -> dict[str, str]:
    weight_map = {"a": "model-1.safetensors", "b": "model-2.safetensors", "n": "model-2.safetensors"}
    for file in set(weight_map.values()):
        save_file({name: TENSORS[name] for name, place in weight_map.items() if place == file}, folder / file)
    (folder / safetensor.INDEX).write_text(json.dumps({"weight_map": weight_map}))
    return weight_map


def test_shards_are_found_through_the_index(tmp_path: Path) -> None:
    weight_map = sharded(tmp_path)
    found = safetensor.shards(tmp_path)
    assert {name: file.name for name, (file, _) in found.items()} == weight_map
    (tmp_path / "model-2.safetensors").unlink()
    with pytest.raises(UserError) as caught:
        safetensor.shards(tmp_path)
    assert "1 of 2 weight files are missing" in caught.value.what
    assert "model-2.safetensors" in caught.value.why


@pytest.mark.parametrize(("index", "why"), [("{", "not an index"), ("[]", "not an index"), ('{"weight_map": {}}', "names no file"),
                                            ('{"weight_map": {"a": "../secret"}}', "../secret"), ('{"weight_map": {"a": 3}}', "`3`")])
def test_a_broken_index_is_refused(tmp_path: Path, index: str, why: str) -> None:
    (tmp_path / safetensor.INDEX).write_text(index)
    with pytest.raises(UserError) as caught:
        safetensor.shards(tmp_path)
    assert why in caught.value.why


def test_a_tensor_missing_in_its_shard_is_named(tmp_path: Path) -> None:
    weight_map = sharded(tmp_path) | {"ghost": "model-1.safetensors"}
    (tmp_path / safetensor.INDEX).write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(UserError) as caught:
        safetensor.shards(tmp_path)
    assert "ghost (in model-1.safetensors)" in caught.value.why


@settings(deadline=None, max_examples=300)
@given(data=st.data())
def test_damage_is_a_user_error_and_costs_no_memory(tmp_path_factory: pytest.TempPathFactory, whole: bytes, data: st.DataObject) -> None:
    damaged = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 3), label="bytes changed")):
        damaged[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    damaged = damaged[: data.draw(st.integers(0, len(whole)), label="kept")] if data.draw(st.booleans(), label="cut") else damaged
    path = tmp_path_factory.getbasetemp() / "fuzz.safetensors"
    path.write_bytes(damaged)
    tracemalloc.start()
    try:
        safetensor.read_header(path)
    except UserError as error:
        assert error.why
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 1 << 20
