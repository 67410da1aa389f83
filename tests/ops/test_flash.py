"""FlashAttention-2 against plain torch in float64: outputs, L and gradients over random shapes, masks and strides, at every level."""

from __future__ import annotations

import random

import pytest
import torch

from lilliput.ops import flash, native

pytestmark = pytest.mark.skipif(native.module() is None, reason=str(native.missing()))
LEVELS = native.levels()


def inputs(batch: int, heads: int, kv_heads: int, queries: int, keys: int, dim: int, value_dim: int, strided: bool):
    """q, k, v as a decoder hands them over: views of [B, T, H, D], sometimes of one wider matrix."""
    if strided:
        wide = torch.randn(batch, keys, heads + 2 * kv_heads, max(dim, value_dim) + 3)
        q, k, v = wide[:, keys - queries :, :heads, :dim], wide[:, :, heads : heads + kv_heads, :dim], wide[:, :, heads + kv_heads :, :value_dim]
        return tuple(x.transpose(1, 2) for x in (q, k, v))
    return torch.randn(batch, heads, queries, dim), torch.randn(batch, kv_heads, keys, dim), torch.randn(batch, kv_heads, keys, value_dim)


def random_case(seed: int, batches: tuple[int, ...] = (1, 2, 3), lengths: tuple[int, ...] = (1, 2, 17, 63, 64, 65, 130, 200)):
    """(q, k, v, the named arguments of flash.attention)."""
    random.seed(seed)
    torch.manual_seed(seed)
    heads, kv_heads = random.choice([(1, 1), (3, 1), (4, 2), (2, 2)])
    queries = random.choice(lengths)
    keys = queries + random.choice([0, 0, 1, 40, 64])
    dim = random.choice([4, 8, 15, 32, 64, 80])
    q, k, v = inputs(random.choice(batches), heads, kv_heads, queries, keys, dim, random.choice([dim, dim, 20]), random.random() < 0.5)
    causal = random.random() < 0.7
    how = {"causal": causal, "scale": random.choice([None, 0.2])}
    if causal and random.random() < 0.4:
        how |= {"window": random.choice([1, 5, 64, 100]), "sinks": random.choice([0, 0, 3, 70])}
    if random.random() < 0.3:
        how["slopes_H"] = torch.rand(heads) * 0.1
    return q, k, v, how


def gradients(run, q, k, v, d_o):
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    o = run(*leaves)
    return o, torch.autograd.grad(o, leaves, d_o)


def check(q, k, v, how, level: str) -> None:
    """Outputs within 1e-5 and gradients within 1e-4 of plain torch in float64."""
    d_o = torch.randn(*q.shape[:3], v.shape[3])
    want, want_gradients = gradients(lambda q, k, v: flash.reference(q, k, v, **how)[0], q.double(), k.double(), v.double(), d_o.double())
    for form in flash.FORMS:
        with native.using(level):
            ours, our_gradients = gradients(lambda q, k, v, form=form: flash.attention(q, k, v, form=form, **how), q, k, v, d_o)
        assert ours.shape == want.shape and ours.transpose(1, 2).is_contiguous()
        torch.testing.assert_close(ours.double(), want, atol=1e-5, rtol=1e-5)
        for a, b in zip(our_gradients, want_gradients):
            torch.testing.assert_close(a.double(), b, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("seed", range(16))
def test_equals_reference(seed: int, level: str) -> None:
    q, k, v, how = random_case(seed)
    check(q, k, v, how, level)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("seed", range(16, 22))
def test_log_sum_exp(seed: int, level: str) -> None:
    q, k, v, how = random_case(seed)
    want = flash.reference(q.double(), k.double(), v.double(), **how)[1]
    scale = how["scale"] or q.shape[3] ** -0.5
    for form in flash.FORMS.values():
        with native.using(level):
            _, logsum = flash.FORWARD(q, k, v, None, None, how["causal"], how.get("window", 0), how.get("sinks", 0), scale, *form, how.get("slopes_H"))
        torch.testing.assert_close(logsum.double(), want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dim", [96, 128, 192, 250, 256])
def test_wide_heads(dim: int, level: str) -> None:
    torch.manual_seed(dim)
    q, k, v = inputs(1, 2, 1, 70, 130, dim, dim, True)
    check(q, k, v, {"causal": True}, level)


def test_the_reference_differentiates_right() -> None:
    """Finite differences in float64: what every kernel is held against."""
    q, k, v = (x.double().requires_grad_() for x in inputs(1, 2, 1, 3, 5, 4, 3, False))
    how = {"causal": True, "window": 2, "sinks": 1, "slopes_H": torch.tensor([0.1, 0.2])}
    assert torch.autograd.gradcheck(lambda q, k, v: flash.reference(q, k, v, **how)[0], (q, k, v))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("queries, keys", [(0, 0), (0, 5), (4, 0), (1, 1)])
def test_nothing_and_one(queries: int, keys: int, level: str) -> None:
    q, k, v = inputs(2, 2, 1, queries, keys, 8, 8, False)
    with native.using(level):
        o, found = gradients(lambda q, k, v: flash.attention(q, k, v, causal=True), q, k, v, torch.ones_like(q))
    want = v[:, :, :queries].expand_as(q) if keys else torch.zeros_like(q)  # one key is the answer, none are nothing
    assert torch.equal(o, want) and all(a.shape == b.shape and bool(a.isfinite().all()) for a, b in zip(found, (q, k, v)))
    assert bool((found[0].abs() < 1e-6).all())  # a softmax of one number has no slope


def tiles_read(size: int, **how) -> list[tuple[int, int]]:
    """(block of queries, tile of keys) that are read: the values of one tile are NaN, which no weight of 0 hides."""
    q, k, v = inputs(1, 1, 1, size, size, 8, 8, False)
    read = []
    for tile in range(size // 64):
        spoilt = v.clone()
        spoilt[:, :, 64 * tile : 64 * (tile + 1)] = torch.nan
        o = flash.attention(q, k, spoilt, **how)
        read += [(block, tile) for block in range(size // 64) if bool(o[:, :, 64 * block : 64 * (block + 1)].isnan().any())]
    return sorted(read)


def test_hidden_tiles_are_skipped() -> None:
    blocks = range(6)
    assert tiles_read(384, causal=False) == [(i, j) for i in blocks for j in blocks]
    assert tiles_read(384, causal=True) == [(i, j) for i in blocks for j in blocks if j <= i]
    assert tiles_read(384, causal=True, window=65, sinks=4) == [(i, j) for i in blocks for j in blocks if i - 1 <= j <= i or (j == 0 and i)]


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("form", flash.FORMS)
def test_softmax_is_of_base_e(form: str, level: str) -> None:
    """Logits 0 1 2 3 weigh .0321 .0871 .2369 .6439. (E.T.'s published code answers with powers of 2: .0667 .1333 .2666 .5332.)"""
    q, k, v = torch.ones(1, 1, 2, 1), torch.arange(4.0).view(1, 1, 4, 1), torch.eye(4).view(1, 1, 4, 4)
    with native.using(level):
        weights = flash.attention(q, k, v, causal=False, scale=1.0, form=form)[0, 0, 1]
    torch.testing.assert_close(weights, torch.tensor([0.0321, 0.0871, 0.2369, 0.6439]), atol=5e-5, rtol=0)


@pytest.mark.parametrize("form", flash.FORMS)
@pytest.mark.parametrize("what", ["nan", "hidden nan"])
def test_nan_stays_visible_and_hidden_keys_harmless(what: str, form: str) -> None:
    q, k, v = inputs(1, 1, 1, 130, 130, 8, 8, False)
    k[0, 0, 60] = torch.nan
    o, logsum = flash.FORWARD(q, k, v, None, None, True, 0, 0, 1.0, *flash.FORMS[form], None)
    rows = slice(60, None) if what == "nan" else slice(0, 60)
    assert bool((o[0, 0, rows].isnan() == (what == "nan")).all()) and bool((logsum[0, 0, rows].isnan() == (what == "nan")).all())


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("causal", [True, False])
def test_packed_sequences(causal: bool, level: str) -> None:
    """Each packed sequence answers as it does alone, lengths of zero and one included."""
    torch.manual_seed(1)
    rows_q, rows_k = [5, 0, 1, 70, 64, 2], [5, 3, 1, 90, 64, 520]  # the last one by tiles, the others in strips
    cu_q, cu_k = (torch.tensor([0, *torch.tensor(rows).cumsum(0).tolist()], dtype=torch.int32) for rows in (rows_q, rows_k))
    q, k, v = torch.randn(sum(rows_q), 4, 16), torch.randn(sum(rows_k), 2, 16), torch.randn(sum(rows_k), 2, 16)
    d_o = torch.randn_like(q)
    with native.using(level):
        o, found = gradients(lambda q, k, v: flash.attention_varlen(q, k, v, cu_q, cu_k, causal=causal), q, k, v, d_o)
        for s in range(len(rows_q)):
            at, of = slice(cu_q[s], cu_q[s + 1]), slice(cu_k[s], cu_k[s + 1])
            alone = [x.transpose(0, 1)[None] for x in (q[at], k[of], v[of], d_o[at])]
            want, wanted = gradients(lambda q, k, v: flash.attention(q, k, v, causal=causal), *alone)
            assert torch.equal(o[at], want[0].transpose(0, 1))
            for mine, theirs, rows in zip(found, wanted, (at, of, of)):
                assert torch.equal(mine[rows], theirs[0].transpose(0, 1))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("kv_heads", [6, 2, 1])
def test_the_same_bits_for_any_number_of_threads(kv_heads: int, level: str) -> None:
    """Six heads over one, two and sixteen threads: the last takes the way with a pass of its own for dQ."""
    torch.manual_seed(2)
    q, k, v = inputs(1, 6, kv_heads, 200, 200, 64, 64, False)
    d_o = torch.randn_like(q)
    results = []
    with native.using(level):
        for threads in (1, 2, 16):
            native.module().set_threads(threads)
            results.append(gradients(lambda q, k, v: flash.attention(q, k, v, causal=True), q, k, v, d_o))
    native.module().set_threads(2)
    for o, found in results[1:]:
        assert torch.equal(o, results[0][0]) and all(torch.equal(a, b) for a, b in zip(found, results[0][1]))


def test_a_batch_answers_as_its_parts() -> None:
    q, k, v = inputs(3, 2, 1, 90, 90, 32, 32, True)
    whole = flash.attention(q, k, v, causal=True)
    assert all(torch.equal(whole[b : b + 1], flash.attention(q[b : b + 1], k[b : b + 1], v[b : b + 1], causal=True)) for b in range(3))


def test_worked_example() -> None:
    """Two tiles by hand (section 3.1): scores 0..3 give .0321, .0871, .2369, .6439."""
    q, k, v = torch.ones(1, 1, 1, 1), torch.arange(4.0).view(1, 1, 4, 1), torch.eye(4).view(1, 1, 4, 4)
    o = flash.attention(q, k, v, causal=False, scale=1.0)
    torch.testing.assert_close(o.flatten(), torch.tensor([0.0321, 0.0871, 0.2369, 0.6439]), atol=5e-5, rtol=0)


def test_a_query_that_sees_nothing_answers_zero() -> None:
    q, k, v = torch.randn(1, 1, 3, 8), torch.randn(1, 1, 2, 8), torch.randn(1, 1, 2, 8)
    o, (dq, _, _) = gradients(lambda q, k, v: flash.attention(q, k, v, causal=True), q, k, v, torch.ones(1, 1, 3, 8))
    assert torch.equal(o[0, 0, 0], torch.zeros(8)) and torch.equal(dq[0, 0, 0], torch.zeros(8)) and bool((o[0, 0, 1:] != 0).all())


def test_memory_is_inputs_output_and_one_number_a_query() -> None:
    q, k, v = (x.requires_grad_() for x in inputs(1, 3, 1, 300, 300, 16, 16, False))
    saved: dict[int, int] = {}

    def note(x):
        saved[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        o = flash.attention(q, k, v, causal=True)
    assert sum(saved.values()) == 4 * (q.numel() + k.numel() + v.numel() + o.numel() + 3 * 300)


def test_the_op_is_a_good_torch_citizen() -> None:
    q, k, v = (x.requires_grad_() for x in inputs(2, 2, 1, 20, 20, 8, 8, False))
    torch.library.opcheck(flash.FORWARD, (q, k, v, None, None, True, 0, 0, 0.3, 64, False, None))
    compiled = torch.compile(lambda q, k, v: flash.attention(q, k, v, causal=True).sum(), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(q, k, v), flash.attention(q, k, v, causal=True).sum())


@pytest.mark.parametrize("borders", [[0, 5], [0, 6, 5], [1, 5, 5], [0, 9, 9], [0, 5, 5, 5]])
def test_wrong_borders_are_refused(borders: list[int]) -> None:
    """The kernel trusts them: rows beyond the tensor would be read."""
    q, cu = torch.randn(5, 2, 8), torch.tensor([0, 5, 5], dtype=torch.int32)
    with pytest.raises(AssertionError, match="cu_q" if len(borders) == 3 else "borders"):
        flash.attention_varlen(q, q, q, torch.tensor(borders, dtype=torch.int32), cu, causal=True)


def test_heads_that_do_not_divide_are_refused() -> None:
    with pytest.raises(AssertionError, match="3 query heads cannot share 2"):
        flash.attention(torch.randn(1, 3, 4, 8), torch.randn(1, 2, 4, 8), torch.randn(1, 2, 4, 8), causal=True)


@pytest.mark.parametrize("what", ["double", "wide", "meta"])
def test_refusals(what: str) -> None:
    dtype = torch.float64 if what == "double" else torch.float32
    q = torch.randn(1, 1, 2, 300 if what == "wide" else 8, dtype=dtype, device="meta" if what == "meta" else "cpu")
    assert flash.supports(q, q, q) is not None
