"""Paged attention against plain torch in float64, over random mixes of prompts and single tokens, every level and codec."""

from __future__ import annotations

import random

import pytest
import torch

from lilliput.base.errors import UserError
from lilliput.ops import native, paged
from lilliput.ops.paged import KvStore

pytestmark = pytest.mark.skipif(native.module() is None, reason=str(native.missing()))
LEVELS = native.levels()
ERROR = {"fp32": 2e-6, "fp16": 3e-3, "int8": 4e-2, "int4": 0.6}  # of values near 1: half a step of the codec, and what it does to scores


class Mix:
    """Sequences with random lengths and chunks over scattered blocks."""

    def __init__(self, seed: int, lengths: list[int], chunks: list[int], heads: int, kv_heads: int, dim: int, codec: str = "fp32") -> None:
        torch.manual_seed(seed)
        self.lengths, self.chunks, self.heads, self.kv_heads, self.dim = lengths, chunks, heads, kv_heads, dim
        blocks = [-(-n // 16) for n in lengths]
        order = torch.randperm(sum(blocks) + 3).tolist()
        self.store = KvStore(layers=2, blocks=sum(blocks) + 3, kv_heads=kv_heads, head_dim=dim, codec=codec)
        self.store.numbers.fill_(255)  # unwritten memory: NaN in fp32 and fp16
        self.tables = torch.zeros(len(lengths), max([*blocks, 1]), dtype=torch.int32)
        for row, count in enumerate(blocks):
            self.tables[row, :count] = torch.tensor([order.pop() for _ in range(count)], dtype=torch.int32)
        self.k = [torch.randn(n, kv_heads, dim) for n in lengths]
        self.v = [torch.randn(n, kv_heads, dim) for n in lengths]
        self.q = [torch.randn(n, heads, dim) for n in lengths]

    def batch(self, lengths: list[int], chunks: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.tensor([0, *torch.tensor(chunks).cumsum(0).tolist()], dtype=torch.int32), torch.tensor(lengths, dtype=torch.int32)

    def last(self, parts: list[torch.Tensor], lengths: list[int], chunks: list[int]) -> torch.Tensor:
        return torch.cat([part[n - c : n] for part, n, c in zip(parts, lengths, chunks)])

    def fill(self, layer: int = 1) -> None:
        cu_q, lengths = self.batch(self.lengths, self.lengths)
        paged.write(self.store, layer, torch.cat(self.k), torch.cat(self.v), cu_q, lengths, self.tables)

    def run(self, **options) -> torch.Tensor:
        cu_q, lengths = self.batch(self.lengths, self.chunks)
        return paged.attention(self.store, 1, self.last(self.q, self.lengths, self.chunks), cu_q, lengths, self.tables, **options)

    def reference(self, keys: list[torch.Tensor], values: list[torch.Tensor], **options):
        cu_q, _ = self.batch(self.lengths, self.chunks)
        if "rotate" in options:
            options["rotate"] = tuple(table.double() for table in options["rotate"])
        q = self.last(self.q, self.lengths, self.chunks).double()
        return paged.reference(q, [k.double() for k in keys], [v.double() for v in values], cu_q, **options)


def random_mix(seed: int, codec: str = "fp32") -> Mix:
    random.seed(seed)
    lengths = [random.choice([1, 2, 15, 16, 17, 63, 64, 65, random.randint(1, 700)]) for _ in range(random.randint(1, 5))]
    chunks = [random.choice([1, 1, n, random.randint(0, n)]) for n in lengths]
    heads, kv_heads = random.choice([(1, 1), (3, 1), (6, 2), (4, 4), (8, 1)])
    return Mix(seed, lengths, chunks, heads, kv_heads, random.choice([4, 10, 16, 64, 80]), codec)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("seed", range(12))
def test_equals_reference(seed: int, level: str) -> None:
    with native.using(level):
        mix = random_mix(seed)
        mix.fill()
        options: dict = [{}, {"window": 5}, {"window": 70, "sinks": 3}, {"scale": 0.3}][seed % 4]
        torch.testing.assert_close(mix.run(**options), mix.reference(mix.k, mix.v, **options)[0].float(), atol=ERROR["fp32"], rtol=1e-5)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("codec", ["fp16", "int8", "int4"])
def test_codecs_are_what_read_decodes(codec: str, level: str) -> None:
    with native.using(level):
        for seed in (3, 4, 5):
            mix = random_mix(seed, codec)
            mix.fill()
            decoded = [mix.store.read(1, mix.tables[s], n) for s, n in enumerate(mix.lengths)]
            for s in range(len(mix.lengths)):
                torch.testing.assert_close(decoded[s][0], mix.k[s], atol=ERROR[codec], rtol=0)
                torch.testing.assert_close(decoded[s][1], mix.v[s], atol=ERROR[codec], rtol=0)
            want = mix.reference([d[0] for d in decoded], [d[1] for d in decoded])[0]
            torch.testing.assert_close(mix.run(), want.float(), atol=3e-6, rtol=1e-5)


@pytest.mark.parametrize("level", LEVELS)
def test_int8_steps_are_half_a_step_off_at_most(level: str) -> None:
    with native.using(level):
        mix = Mix(0, [40], [40], 2, 2, 32, "int8")
        mix.fill()
        keys, _ = mix.store.read(1, mix.tables[0], 40)
        step = (mix.k[0].amax(-1) - mix.k[0].amin(-1)) / 255
        assert ((keys - mix.k[0]).abs() <= step[..., None] * 0.5 + 2e-3 * mix.k[0].abs().amax()).all()


@pytest.mark.parametrize("level", LEVELS)
def test_keys_before_rope(level: str) -> None:
    with native.using(level):
        mix = Mix(1, [70, 5], [3, 5], 4, 2, 16)
        mix.fill()
        angle = torch.arange(96)[:, None] * 10.0 ** -torch.arange(8)
        rotate = angle.cos().contiguous(), angle.sin().contiguous()
        want, _ = mix.reference(mix.k, mix.v, rotate=rotate)
        torch.testing.assert_close(mix.run(rotate=rotate), want.float(), atol=3e-6, rtol=1e-5)


@pytest.mark.parametrize("level", LEVELS)
def test_mass(level: str) -> None:
    with native.using(level):
        mix = Mix(2, [300, 17], [20, 1], 6, 2, 16)
        mix.fill()
        mass = torch.zeros(2, 2, 300)
        mix.run(mass=mass)
        _, want = mix.reference(mix.k, mix.v)
        for s, n in enumerate(mix.lengths):
            torch.testing.assert_close(mass[s, :, :n], want[s].float(), atol=1e-5, rtol=1e-5)
        assert mass[1, :, 17:].abs().sum() == 0
        torch.testing.assert_close(mass.sum((1, 2)), torch.tensor([20 * 6.0, 1 * 6.0]))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("codec", ["fp32", "int8"])
def test_bit_equal_in_any_batch_chunk_and_thread_count(codec: str, level: str) -> None:
    """The last row of a prompt, whole, in chunks, alone, in a crowd, on one thread."""
    with native.using(level):
        mix = Mix(3, [600, 33, 1, 257], [600, 33, 1, 257], 6, 2, 64, codec)
        mix.fill()
        whole = mix.run().split(mix.chunks)
        for s, n in enumerate(mix.lengths):
            for chunk in (1, min(n, 7), min(n, 40)):
                cu_q, lengths = mix.batch([n], [chunk])
                alone = paged.attention(mix.store, 1, mix.q[s][n - chunk :], cu_q, lengths, mix.tables[s : s + 1].contiguous())
                assert torch.equal(alone, whole[s][n - chunk :]), f"sequence of {n}, chunk of {chunk}"
        native.threads(1)
        try:
            assert all(torch.equal(a, b) for a, b in zip(mix.run().split(mix.chunks), whole))
        finally:
            native.threads(2)


def test_layers_are_apart_and_bytes_are_stated() -> None:
    mix = Mix(4, [20], [20], 2, 1, 8)
    before = mix.store.numbers[0].clone()
    mix.fill(1)
    assert torch.equal(mix.store.numbers[0], before)
    sizes = {codec: KvStore(layers=3, blocks=2, kv_heads=2, head_dim=64, codec=codec).bytes_per_token for codec in paged.CODECS}
    assert sizes == {"fp32": 3 * 2 * 2 * 256, "fp16": 3 * 2 * 2 * 128, "int8": 3 * 2 * 2 * (64 + 4), "int4": 3 * 2 * 2 * (32 + 4)}


def test_nothing_to_do() -> None:
    mix = Mix(5, [5], [0], 2, 1, 8)
    mix.fill()
    assert mix.run().shape == (0, 2, 8)


def test_unknown_codec() -> None:
    with pytest.raises(UserError, match="unknown cache codec `int3`"):
        KvStore(layers=1, blocks=1, kv_heads=1, head_dim=8, codec="int3")
