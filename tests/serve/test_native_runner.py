"""The native runner under the engine: the eager runner's tokens, bit-equal answers alone and in a crowd."""

from __future__ import annotations

from array import array

import pytest
import torch

from lilliput.models.decoder import Decoder
from lilliput.models.native import NativeDecoder
from lilliput.models.spec import DecoderSpec
from lilliput.ops import native
from lilliput.serve.blocks import BlockPool, Table
from lilliput.serve.runners.eager import Eager
from lilliput.serve.runners.native import Native
from lilliput.serve.scheduler import Chunk

pytestmark = pytest.mark.skipif(native.module() is None, reason=str(native.missing()))
SPEC = DecoderSpec("llama", vocab=97, dim=64, layers=2, heads=4, kv_heads=2, head_dim=16, ffn=96, context=512)


@pytest.fixture(scope="module")
def model() -> Decoder:
    made = Decoder(SPEC).eval()
    made.init_weights(3)
    return made


def lowered(model: Decoder, weights: str = "fp32") -> NativeDecoder:
    return NativeDecoder(SPEC, lambda name: model.get_parameter(name).detach(), weights=weights)  # type: ignore[arg-type]


def chunk(id: int, start: int, stop: int, table: array, prompt: list[int]) -> Chunk:
    samples = stop == len(prompt)
    return Chunk(id, start, stop, samples, table, int(samples), prompt[start:stop])


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, 97, (n,), generator=generator).tolist() for n in (40, 1, 17, 300)]


def tables(pool: BlockPool) -> list[array]:
    made = [Table() for _ in prompts()]
    for table, prompt in zip(made, prompts()):
        pool.grow(table, len(prompt) + 16)
    return [table.blocks for table in made]


def test_chunks_and_single_tokens_as_the_eager_runner(model: Decoder) -> None:
    pool = BlockPool(40)
    places = tables(pool)
    runners = Eager(model, pool.total), Native(lowered(model), pool.total)
    steps = [[(0, 0, 30), (1, 0, 1)], [(0, 30, 40), (2, 0, 17), (3, 0, 100)], [(3, 100, 300)]]
    for step in steps:
        batch = [chunk(i, a, b, places[i], prompts()[i]) for i, a, b in step]
        eager, ours = (runner.forward(batch) for runner in runners)
        torch.testing.assert_close(ours, eager, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize(("weights", "kv"), [("fp32", "fp32"), ("q4", "int8"), ("w8", "fp16"), ("nf4", "int4")])
def test_bit_equal_alone_in_a_crowd_and_in_chunks(model: Decoder, weights: str, kv: str) -> None:
    pool = BlockPool(40)
    places, texts = tables(pool), prompts()
    runner = Native(lowered(model, weights), pool.total, kv)
    crowd = runner.forward([chunk(i, 0, len(p), places[i], p) for i, p in enumerate(texts)]).clone()
    for i, p in enumerate(texts):
        for cut in {len(p), min(len(p), 13), max(1, len(p) - 1)}:
            for start in range(0, len(p), cut):
                stop = min(start + cut, len(p))
                alone = runner.forward([chunk(i, start, stop, places[i], p)])
            assert torch.equal(alone[0], crowd[i]), f"prompt of {len(p)} in chunks of {cut}"


def test_a_step_without_samples_gives_no_logits(model: Decoder) -> None:
    runner = Native(lowered(model), 8)
    assert runner.forward([Chunk(0, 0, 5, False, array("i", [0]), 0, [1, 2, 3, 4, 5])]).shape == (0, 97)
