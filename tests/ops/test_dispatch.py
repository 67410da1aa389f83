"""Kernels as torch sees them: every op by torch.library.opcheck, in fake tensors and under torch.compile; the same numbers watched and unwatched."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from lilliput.ops import adamw, codecs, flash, float_codecs, fused, low_rank, native, packed, paged, sampling
from lilliput.ops.adamw import Rule
from lilliput.ops.paged import KvStore

pytestmark = pytest.mark.skipif(native.module() is None, reason=str(native.missing()))
RULE = Rule(lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, step=3)


class Watching(TorchDispatchMode):
    """Remembers the ops that the dispatcher saw."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(func.name())
        return func(*args, **(kwargs or {}))


def watched(run: Callable[[], Any], name: str) -> Any:
    """What `run` gives while a mode looks on; it saw the op `name`."""
    with Watching() as mode:
        found = run()
    assert f"lilliput::{name}" in mode.seen
    return found


class Cache:
    """Two sequences of 20 and 5 tokens, of which 3 and 1 are queried."""

    def __init__(self, codec: str) -> None:
        torch.manual_seed(0)
        self.store = KvStore(layers=1, blocks=4, kv_heads=2, head_dim=8, codec=codec)
        self.store.numbers.zero_()
        self.k, self.v, self.q = torch.randn(25, 2, 8), torch.randn(25, 2, 8), torch.randn(4, 4, 8)
        self.cu_k, self.cu_q, self.lengths = (torch.tensor(numbers, dtype=torch.int32) for numbers in ([0, 20, 25], [0, 3, 4], [20, 5]))
        self.tables = torch.tensor([[2, 0], [1, 3]], dtype=torch.int32)
        angles = torch.arange(32)[:, None] * 10.0 ** -torch.arange(4)
        self.angles = tuple(paged.tiled(table) for table in (angles.cos(), angles.sin()))

    def write(self) -> None:
        paged.write(self.store, 0, self.k, self.v, self.cu_k, self.lengths, self.tables)

    def attend(self, mass: torch.Tensor | None = None) -> torch.Tensor:
        return paged.attention(self.store, 0, self.q, self.cu_q, self.lengths, self.tables, mass=mass)


@pytest.mark.parametrize("codec", paged.CODECS)
def test_a_paged_cache_is_a_citizen(codec: str) -> None:
    cache = Cache(codec)
    torch.library.opcheck(paged.WRITE, (*cache.store.area(0), cache.k, cache.v, cache.cu_k, cache.lengths, cache.tables))
    cache.write()
    for mass, angles in ((None, (None, None)), (torch.zeros(2, 2, 20), cache.angles)):
        torch.library.opcheck(paged.ATTENTION, (cache.q, *cache.store.area(0), cache.cu_q, cache.lengths, cache.tables, 0.3, 0, 0, *angles, mass))
    other = Cache(codec)
    watched(other.write, "paged_write")
    assert torch.equal(other.store.numbers, cache.store.numbers)
    assert torch.equal(watched(cache.attend, "paged_attention"), cache.attend())


def test_a_paged_cache_compiles_in_one_graph_and_is_changed_by_it() -> None:
    plain, compiled = Cache("int8"), Cache("int8")
    plain.write()
    masses = torch.zeros(2, 2, 20), torch.zeros(2, 2, 20)
    want = plain.attend(masses[0]) * 2

    def step(cache: Cache, mass: torch.Tensor) -> torch.Tensor:
        cache.write()
        return cache.attend(mass) * 2

    torch.testing.assert_close(torch.compile(step, backend="aot_eager", fullgraph=True)(compiled, masses[1]), want)
    assert torch.equal(plain.store.numbers, compiled.store.numbers) and torch.equal(*masses) and masses[1].sum() > 0


def test_a_paged_cache_of_shapes_alone() -> None:
    with FakeTensorMode():
        cache = Cache("int4")
        cache.write()
        assert cache.attend(torch.zeros(2, 2, 20)).shape == (4, 4, 8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_updates_are_citizens(dtype: torch.dtype) -> None:
    def state() -> list[torch.Tensor]:
        torch.manual_seed(1)
        return [torch.randn(50).to(dtype), torch.randn(50).to(dtype), torch.randn(50) * 0.1, torch.rand(50)]

    numbers = adamw._numbers(RULE)
    torch.library.opcheck(adamw.UPDATE, (*state(), *numbers, -7))
    plain, seen, compiled, key = state(), state(), state(), (1 << 64) - 7
    adamw.update(*plain, RULE, key)
    watched(lambda: adamw.update(*seen, RULE, key), "adamw")
    torch.compile(lambda *given: adamw.update(*given, RULE, key), backend="aot_eager", fullgraph=True)(*compiled)
    for other in (seen, compiled):
        assert all(torch.equal(a, b) for a, b in zip(plain, other)), "the same key, the same rounding"
    other = state()
    adamw.update(*other, RULE, key - (1 << 63))
    assert not torch.equal(plain[0], state()[0]) and torch.equal(plain[0], other[0]) == (dtype == torch.float32), "every bit of a key counts"


def test_masters_are_citizens() -> None:
    torch.manual_seed(2)
    given = [torch.randn(50), torch.randn(50).bfloat16(), torch.randn(50) * 0.1, torch.rand(50), torch.zeros(50, dtype=torch.bfloat16)]
    torch.library.opcheck(adamw.UPDATE_MASTER, (*given, True, 0.5, *adamw._numbers(RULE)))
    copies = [t.clone() for t in given]
    adamw.update_master(*given, RULE, 0.5)
    watched(lambda: adamw.update_master(*copies, RULE, 0.5), "adamw_master")
    assert all(torch.equal(a, b) for a, b in zip(given, copies))


def test_a_parameter_that_nobody_differentiates_is_not_watched() -> None:
    weight = torch.nn.Parameter(torch.ones(4))
    with torch.no_grad():
        assert not native.watched(weight)
    assert native.watched(weight)


def test_the_sampler_is_a_citizen() -> None:
    random.seed(3)
    torch.manual_seed(3)
    logits = torch.randn(4, 70) * 2
    mask = torch.tensor([0x0FF0F0F1, -1, 3], dtype=torch.int32)
    draws = [sampling.GREEDY, sampling.Draw(0.7, 1.0, top_p=0.9, mask_W=mask), sampling.Draw(0.2, 2.0, repetition_penalty=1.3, seen={3: 0, 9: 2}),
             sampling.Draw(0.9, 1.0, top_k=5, bias={1: 2.5, 4: -1.0, 69: 3.0})]  # fmt: skip
    arguments = sampling.as_tensors(draws, 70)
    torch.library.opcheck(sampling.CHOOSE, (logits, *arguments, 3))
    for top in (0, 3):
        assert watched(lambda top=top: sampling.choose_rows(logits, draws, top), "choose_rows") == sampling.choose_rows(logits, draws, top)
    compiled = torch.compile(lambda x, *how: sampling.CHOOSE(x * 2, *how, 0)[0], backend="aot_eager", fullgraph=True)
    assert compiled(logits, *arguments).tolist() == [choice.token for choice in sampling.choose_rows(logits * 2, draws)]


@pytest.mark.parametrize("level", native.levels())
@pytest.mark.parametrize("seed", range(6))
def test_rows_in_8_bits(seed: int, level: str) -> None:
    """The numbers of the reference, bit for bit, whatever the shape; NaN in a group is a NaN for its scale alone."""
    torch.manual_seed(seed)
    random.seed(seed)
    group = random.choice([0, 32, 64])
    rows, width = random.choice([0, 1, 5, 70]), (group or 1) * random.randint(1, 9) if group else random.choice([1, 7, 33, 576])
    x = torch.randn(rows, width) * torch.logspace(-3, 3, max(rows, 1))[:rows, None]
    static = torch.rand(width // group if group else 1) * 0.1 if seed % 2 else None
    with native.using(level):
        q, scales = packed.rows8(x, group, static)
        assert rows == 0 or torch.equal(watched(lambda: packed.rows8(x, group, static), "quantize_rows")[0], q)
        if rows:
            x[0, 0] = float("nan")
            assert packed.rows8(x, group, static)[1].isnan().sum() == 1
    want_q, want_scales, _ = packed.quantize_rows(torch.nan_to_num(x, 0.0) if rows == 0 else x, group, static)
    torch.testing.assert_close(scales[1:], want_scales[1:], rtol=0, atol=0)
    assert torch.equal(q[1:], want_q[1:])


def test_rows_in_8_bits_are_a_citizen() -> None:
    for group, static in ((0, None), (32, None), (32, torch.rand(3))):
        torch.library.opcheck(packed.ROWS8, (torch.randn(3, 96), group, static))


@pytest.mark.parametrize("level", native.levels())
@pytest.mark.parametrize("seed", range(8))
def test_low_rank_rows(seed: int, level: str) -> None:
    """Against plain torch over random segments, ranks and widths; rows of no segment stay as they are."""
    random.seed(seed)
    torch.manual_seed(seed)
    width, outputs, dtype = random.choice([3, 16, 65, 576]), random.choice([1, 15, 16, 100]), random.choice([torch.float32, torch.float16])
    segments, at = [], 0
    for _ in range(random.randint(1, 4)):
        first = at + random.randint(0, 2)
        at = first + random.choice([0, 1, 3, 40])
        rank = random.choice([1, 7, 8, 17])
        segments.append((first, at, ((torch.randn(rank, width) / width**0.5).to(dtype), torch.randn(outputs, rank).to(dtype))))
    x, y = torch.randn(at + 1, width), torch.randn(at + 1, outputs)
    want = y.double() + low_rank.grouped(x.double(), [(a, b, (down.double(), up.double())) for a, b, (down, up) in segments], outputs)
    ours = [(a, b, (down, low_rank.panels_of(up))) for a, b, (down, up) in segments]
    with native.using(level):
        again = watched(lambda: low_rank.add_grouped(x, ours, y.clone()), "low_rank_add")
        got = low_rank.add_grouped(x, ours, y.clone())
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=2e-5)
    assert torch.equal(got, again) and torch.equal(got[at], y[at])


def test_low_rank_rows_are_a_citizen() -> None:
    a, b = torch.randn(4, 32), low_rank.panels_of(torch.randn(20, 4))
    torch.library.opcheck(low_rank.ADD, (torch.randn(5, 32), torch.randn(5, 20), [0, 2, 3, 5], [a, a.clone()], [b, b.clone()]))
    with pytest.raises(AssertionError, match="beside 32 -> 36"):
        low_rank.add_grouped(torch.randn(5, 32), [(0, 2, (a, b))], torch.zeros(5, 36))
    with pytest.raises(AssertionError, match="of 5 rows"):
        low_rank.add_grouped(torch.randn(5, 32), [(0, 6, (a, b))], torch.zeros(5, 20))


def test_our_ops_compile_into_one_graph_as_citizens() -> None:
    """Products in three storages, attention and a fused pass between plain torch; another number of rows is no other graph for what it holds."""
    torch.manual_seed(4)
    half, narrow, wide = float_codecs.encode(torch.randn(64, 64), "f16"), codecs.quantize_q4(torch.randn(20, 64), 32), codecs.quantize_w8(torch.randn(64, 20))

    def block(x: torch.Tensor) -> torch.Tensor:
        q = packed.linear(x * 2, half).view(1, -1, 4, 16).transpose(1, 2)
        x = x + flash.attention(q, q, q, causal=True).transpose(1, 2).reshape(-1, 64)
        return packed.linear(fused.bias_gelu(packed.linear(x, narrow), torch.ones(20)), wide) + x

    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        for rows in (5, 9):
            x = torch.randn(rows, 64)
            assert torch.equal(compiled(x), block(x))
