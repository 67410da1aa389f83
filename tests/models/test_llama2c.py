"""llama2.c's legacy files: the documented text of stories260K, and every lie about sizes."""

from __future__ import annotations

import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lilliput.base.errors import UserError
from lilliput.models import gguf_spec, llama2c
from lilliput.models.checkpoints import open_checkpoint
from lilliput.models.load import load_model

DIM, FFN, LAYERS, HEADS, KV, VOCAB, CONTEXT = 16, 24, 2, 4, 2, 260, 8


def export(path: Path, tied: bool, seed: int = 0) -> dict[str, np.ndarray]:
    """A file as llama2.c's legacy_export writes it; returns the tensors in the file's row order."""
    source = np.random.default_rng(seed)
    kv = KV * DIM // HEADS
    shapes = {"input_norm": (DIM,), "attn.q_proj": (DIM, DIM), "attn.k_proj": (kv, DIM), "attn.v_proj": (kv, DIM), "attn.o_proj": (DIM, DIM),
              "mlp_norm": (DIM,), "mlp.gate_proj": (FFN, DIM), "mlp.down_proj": (DIM, FFN), "mlp.up_proj": (FFN, DIM)}  # fmt: skip
    tensors = {"embed.weight": source.standard_normal((VOCAB, DIM), np.float32)}
    for name, shape in shapes.items():
        tensors |= {f"layers.{layer}.{name}.weight": source.standard_normal(shape, np.float32) for layer in range(LAYERS)}
    tensors["norm.weight"] = source.standard_normal(DIM, np.float32)
    tables = np.full(CONTEXT * DIM // HEADS, 7, np.float32)
    head = {} if tied else {"head.weight": source.standard_normal((VOCAB, DIM), np.float32)}
    header = struct.pack("<7i", DIM, FFN, LAYERS, HEADS, KV, VOCAB if tied else -VOCAB, CONTEXT)
    path.write_bytes(header + b"".join(t.tobytes() for t in [*tensors.values(), tables, *head.values()]))
    return tensors | head


@pytest.mark.parametrize("tied", [True, False])
def test_every_tensor_comes_from_its_place(tmp_path: Path, tied: bool) -> None:
    tensors = export(tmp_path / "m.bin", tied)
    checkpoint = open_checkpoint(tmp_path / "m.bin")
    assert (checkpoint.format, checkpoint.spec.tied, checkpoint.spec.context) == ("llama2c", tied, CONTEXT)
    assert set(checkpoint.spec.shapes()) == set(tensors)
    for name, expected in tensors.items():
        assert checkpoint.read(name).data_ptr() % 64 == 0, "aligned as torch's own memory: kernels round by alignment"
        heads = gguf_spec.permuted_heads(checkpoint.spec, name)
        assert np.array_equal(checkpoint.read(name).numpy(), expected if heads is None else gguf_spec.unpermute(expected, heads)), name


def test_wrong_lengths_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.bin"
    export(path, tied=True)
    whole = path.read_bytes()
    for content, why in [
        (whole[:-4], f"the file has {len(whole) - 4:,}"),
        (whole + b"\0", f"makes {len(whole):,} bytes"),
        (whole[:20], "the header alone has 28"),
        (b"\xff" * 28, "its header says"),
        (struct.pack("<7i", *[2**31 - 2] * 7), "its header says"),
    ]:
        path.write_bytes(content)
        with pytest.raises(UserError) as caught:
            open_checkpoint(path)
        assert why in caught.value.why
    path.write_bytes(b"24ka" + whole[4:])
    with pytest.raises(UserError) as caught:
        open_checkpoint(path)
    assert "--version 0" in caught.value.fix


@settings(deadline=None, max_examples=200)
@given(values=st.lists(st.integers(-(2**31), 2**31 - 1) | st.integers(-3, 64), min_size=7, max_size=7), tail=st.integers(0, 500))
def test_any_header_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory, values: list[int], tail: int) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzz.bin"
    path.write_bytes(struct.pack("<7i", *values) + bytes(tail))
    try:
        header = llama2c.read_header(path)
    except UserError:
        return
    assert all(llama2c.read(header, name).shape == shape for name, (shape, _) in header.tensors.items())


@pytest.mark.shared
def test_the_documented_greedy_text_comes_out(shared_data: Path) -> None:
    folder = shared_data / "stories260K"
    model, tokenizer, _ = load_model(folder / "stories260K.bin", device="cpu")
    assert tokenizer.bos_id is not None
    ids = [tokenizer.bos_id]
    with torch.inference_mode():
        for _ in range(256):
            ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    assert tokenizer.decode(ids) == (folder / "greedy.expected.txt").read_text()


@pytest.mark.shared
def test_a_missing_tokenizer_is_a_user_error(shared_data: Path, tmp_path: Path) -> None:
    path = tmp_path / "stories260K.bin"
    shutil.copy(shared_data / "stories260K" / path.name, path)
    with pytest.raises(UserError, match="has no tokenizer") as caught:
        load_model(path)
    assert "tok*.bin" in caught.value.why
