"""The Triton twin of FlashAttention-2 against float64, by Triton's interpreter: the vectors of test_flash.py, on the CPU.

Triton decides when it is imported whether it interprets: one child process runs all cases, the tests read its answers.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_flash import gradients, random_case

from lilliput.base import env
from lilliput.ops import flash

SEEDS = range(8)
LENGTHS = ([5, 0, 1, 70], [5, 3, 1, 90])  # packed: queries and keys of each sequence
NAMES = ("o", "logsum", "dq", "dk", "dv")


def dense_case(seed: int):
    """(q, k, v, d_o, how) of a small random case; the last three are a window with sinks, wide heads and half precision."""
    q, k, v, how = random_case(seed, batches=(1,), lengths=(1, 17, 63, 65, 100))
    if seed == SEEDS[-3]:  # tiles before the window hidden, those with sinks not
        q, k, v = torch.randn(1, 2, 150, 16), torch.randn(1, 1, 260, 16), torch.randn(1, 1, 260, 16)
        how = {"causal": True, "scale": None, "window": 50, "sinks": 3}
    if seed == SEEDS[-2]:
        q, k, v = torch.randn(1, 2, 20, 200), torch.randn(1, 1, 40, 200), torch.randn(1, 1, 40, 200)
        how = {"causal": True, "scale": None}
    if seed == SEEDS[-1]:
        q, k, v, how = q.half(), k.half(), v.half(), how | {"causal": True}
    return q, k, v, torch.randn(*q.shape[:3], v.shape[3]).to(q.dtype), how


def packed_case():
    """(q, k, v, d_o, cu_q, cu_k) [1, heads, rows, 16]."""
    torch.manual_seed(9)
    cu_q, cu_k = (torch.tensor([0, *torch.tensor(rows).cumsum(0).tolist()], dtype=torch.int32) for rows in LENGTHS)
    q, k, v = torch.randn(1, 4, sum(LENGTHS[0]), 16), torch.randn(1, 2, sum(LENGTHS[1]), 16), torch.randn(1, 2, sum(LENGTHS[1]), 16)
    return q, k, v, torch.randn_like(q), cu_q, cu_k


def answers(q, k, v, d_o, cu_q=None, cu_k=None, *, causal, scale=None, window=None, sinks=0, slopes_H=None) -> dict[str, torch.Tensor]:
    from lilliput.ops.triton import flash as twin

    assert twin.supports(q, k, v) is None
    how = (cu_q, cu_k, causal, window or 0, sinks, scale or q.shape[3] ** -0.5, slopes_H)
    o, logsum, dq, dk, dv = (torch.full_like(x, 7.0) for x in (d_o, d_o[..., 0].float().contiguous(), q, k, v))
    twin.forward(q, k, v, *how, o, logsum)
    twin.backward(d_o, q, k, v, o, logsum, *how, dq, dk, dv)
    return dict(zip(NAMES, (o, logsum, dq, dk, dv)))


def main(path: str) -> None:
    found = {f"packed.{name}": x for name, x in answers(*packed_case(), causal=True).items()}
    for seed in SEEDS:
        *tensors, how = dense_case(seed)
        found |= {f"{seed}.{name}": x.contiguous() for name, x in answers(*tensors, **how).items()}
    save_file(found, path)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed: pip install 'lilliput[triton]'")
    path = tmp_path_factory.mktemp("twin") / "answers.safetensors"
    done = subprocess.run([sys.executable, str(Path(__file__)), str(path)], env=env.child(TRITON_INTERPRET="1"), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return load_file(path)


def compare(found: dict[str, torch.Tensor], want: tuple[torch.Tensor, ...], half: bool) -> None:
    for name, wanted in zip(NAMES, want):
        near = 1e-2 if half and name != "logsum" else 1e-5 if name in ("o", "logsum") else 1e-4
        torch.testing.assert_close(found[name].double(), wanted, atol=near, rtol=near, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("seed", SEEDS)
def test_equals_reference(seed: int, found: dict[str, torch.Tensor]) -> None:
    q, k, v, d_o, how = dense_case(seed)
    logsum = flash.reference(q.double(), k.double(), v.double(), **how)[1]
    o, wanted = gradients(lambda q, k, v: flash.reference(q, k, v, **how)[0], q.double(), k.double(), v.double(), d_o.double())
    compare({name: found[f"{seed}.{name}"] for name in NAMES}, (o, logsum, *wanted), q.dtype == torch.float16)


def test_packed_sequences(found: dict[str, torch.Tensor]) -> None:
    q, k, v, d_o, cu_q, cu_k = (x.double() if x.is_floating_point() else x for x in packed_case())
    for s in range(len(cu_q) - 1):
        at, of = slice(cu_q[s], cu_q[s + 1]), slice(cu_k[s], cu_k[s + 1])
        logsum = flash.reference(q[:, :, at], k[:, :, of], v[:, :, of], causal=True)[1]
        o, wanted = gradients(lambda q, k, v: flash.reference(q, k, v, causal=True)[0], q[:, :, at], k[:, :, of], v[:, :, of], d_o[:, :, at])
        mine = {name: found[f"packed.{name}"][:, :, of if name in ("dk", "dv") else at] for name in NAMES}
        compare(mine, (o, logsum, *wanted), half=False)


@pytest.mark.skipif(not flash.TRITON, reason="triton is not installed")
@pytest.mark.parametrize("op", ["flash_forward", "flash_backward"])
def test_the_dispatcher_has_it_for_cuda(op: str) -> None:
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"lilliput::{op}", "CUDA")


@pytest.mark.skipif(not flash.TRITON, reason="triton is not installed")
def test_refuses_double() -> None:
    from lilliput.ops.triton import flash as twin

    q = torch.randn(1, 1, 2, 8, dtype=torch.float64)
    assert "float64" in (twin.supports(q, q, q) or "")


if __name__ == "__main__":
    main(sys.argv[1])
