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


def random_case(seed: int):
    random.seed(seed)
    torch.manual_seed(seed)
    heads, kv_heads = random.choice([(1, 1), (3, 1), (4, 2), (2, 2)])
    queries = random.choice([1, 2, 17, 63, 64, 65, 130, 200])
    keys = queries + random.choice([0, 0, 1, 40, 64])
    dim = random.choice([4, 8, 15, 32, 64, 80])
    q, k, v = inputs(random.choice([1, 2, 3]), heads, kv_heads, queries, keys, dim, random.choice([dim, dim, 20]), random.random() < 0.5)
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


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("seed", range(16))
def test_equals_reference(seed: int, level: str) -> None:
    q, k, v, how = random_case(seed)
    d_o = torch.randn(*q.shape[:3], v.shape[3])
    want, want_gradients = gradients(lambda q, k, v: flash.reference(q, k, v, **how)[0], q.double(), k.double(), v.double(), d_o.double())
    with native.using(level):
        ours, our_gradients = gradients(lambda q, k, v: flash.attention(q, k, v, **how), q, k, v, d_o)
    assert ours.shape == want.shape and ours.transpose(1, 2).is_contiguous()
    torch.testing.assert_close(ours.double(), want, atol=1e-5, rtol=1e-5)
    for a, b in zip(our_gradients, want_gradients):
        torch.testing.assert_close(a.double(), b, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("level", LEVELS)
def test_log_sum_exp(level: str) -> None:
    q, k, v = inputs(2, 4, 2, 100, 130, 32, 32, True)
    with native.using(level):
        _, logsum = flash.FORWARD(q, k, v, None, None, True, 0, 0, 0.25, None)
    torch.testing.assert_close(logsum, flash.reference(q.double(), k.double(), v.double(), causal=True, scale=0.25)[1].float(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("causal", [True, False])
def test_packed_sequences(causal: bool, level: str) -> None:
    """Each packed sequence answers as it does alone, lengths of zero and one included."""
    torch.manual_seed(1)
    rows_q, rows_k = [5, 0, 1, 70, 64], [5, 3, 1, 90, 64]
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
def test_the_same_bits_for_any_number_of_threads(level: str) -> None:
    """Four heads over one, two and eight threads: the last takes the way with a pass of its own for dQ."""
    torch.manual_seed(2)
    q, k, v = inputs(1, 4, 4, 200, 200, 64, 64, False)
    d_o = torch.randn_like(q)
    results = []
    with native.using(level):
        for threads in (1, 2, 8):
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
    torch.library.opcheck(flash.FORWARD, (q, k, v, None, None, True, 0, 0, 0.3, None))
    compiled = torch.compile(lambda q, k, v: flash.attention(q, k, v, causal=True).sum(), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(q, k, v), flash.attention(q, k, v, causal=True).sum())


@pytest.mark.parametrize("what", ["double", "wide", "meta"])
def test_refusals(what: str) -> None:
    dtype = torch.float64 if what == "double" else torch.float32
    q = torch.randn(1, 1, 2, 300 if what == "wide" else 8, dtype=dtype, device="meta" if what == "meta" else "cpu")
    assert flash.supports(q, q, q) is not None
