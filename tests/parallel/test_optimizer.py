import pytest
import torch

from lilliput.ops.adamw import round_stochastic
from lilliput.parallel.optimizer import AdamW

KNOBS = {"betas": (0.9, 0.95), "eps": 1e-8}


def parameters(dtype: torch.dtype) -> dict[str, torch.nn.Parameter]:
    torch.manual_seed(3)
    return {n: torch.nn.Parameter(torch.randn(*s).to(dtype)) for n, s in {"matrix": (33, 65), "norm": (65,), "big": (128, 130)}.items()}


def test_fp32_is_torchs_adamw() -> None:
    ours, theirs = parameters(torch.float32), parameters(torch.float32)
    optimizer = AdamW(ours, weight_decay=0.1, seed=0, **KNOBS)
    groups = [{"params": [theirs["matrix"], theirs["big"]], "weight_decay": 0.1}, {"params": [theirs["norm"]], "weight_decay": 0.0}]
    reference = torch.optim.AdamW(groups, lr=1e-2, fused=True, **KNOBS)
    for step in range(5):
        torch.manual_seed(step)
        for name in ours:
            gradient = torch.randn_like(ours[name])
            ours[name].grad, theirs[name].grad = gradient.clone(), gradient.clone()
        optimizer.step(1e-2)
        reference.step()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-6, atol=1e-7)


def test_norms_are_not_decayed() -> None:
    ours = parameters(torch.float32)
    before = {n: p.detach().clone() for n, p in ours.items()}
    optimizer = AdamW(ours, weight_decay=0.5, seed=0, **KNOBS)
    for p in ours.values():
        p.grad = torch.zeros_like(p)
    optimizer.step(0.1)
    assert torch.equal(ours["norm"], before["norm"])
    torch.testing.assert_close(ours["matrix"].detach(), before["matrix"] * (1 - 0.1 * 0.5))


def test_bf16_state_is_fp32_and_small_updates_are_not_lost() -> None:
    weight = torch.nn.Parameter(torch.ones(4096).to(torch.bfloat16))
    optimizer = AdamW({"w": weight}, weight_decay=0.0, seed=1, **KNOBS)
    for _ in range(100):
        weight.grad = torch.ones_like(weight)
        optimizer.step(1e-4)  # each update is 1e-4, a 40th of the bf16 step below 1
    assert {t.dtype for t in optimizer.state().values()} == {torch.float32}
    mean = weight.detach().float().mean().item()
    assert mean == pytest.approx(1 - 100 * 1e-4, abs=2e-3), "rounding to nearest would leave 1.0"


def test_stochastic_rounding_is_unbiased_exact_where_it_can_be_and_reproducible() -> None:
    wide = torch.full((200_000,), 1.0 + 2**-7 * 0.25)
    rounded = round_stochastic(wide, 5)
    assert set(rounded.float().unique().tolist()) == {1.0, 1.0 + 2**-7}
    assert rounded.double().mean().item() == pytest.approx(wide[0].item(), abs=3e-5)
    assert torch.equal(rounded, round_stochastic(wide, 5)) and not torch.equal(rounded, round_stochastic(wide, 6))
    kept = torch.tensor([0.0, -1.5, float("inf"), -float("inf")])
    assert torch.equal(round_stochastic(kept, 0).float(), kept)
    assert round_stochastic(torch.tensor([float("nan")]), 0).isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_restored_state_continues_bitwise(dtype: torch.dtype) -> None:
    def run(interrupt: bool) -> dict[str, torch.Tensor]:
        weights = parameters(dtype)
        optimizer = AdamW(weights, weight_decay=0.1, seed=7, **KNOBS)
        for step in range(6):
            if interrupt and step == 3:
                state, steps = {n: t.clone() for n, t in optimizer.state().items()}, optimizer.steps
                optimizer = AdamW(weights, weight_decay=0.1, seed=7, **KNOBS)
                optimizer.restore(state, steps)
            torch.manual_seed(step)
            for p in weights.values():
                p.grad = torch.randn(p.shape).to(dtype)
            optimizer.step(1e-3)
        return {n: p.detach() for n, p in weights.items()}

    plain, resumed = run(False), run(True)
    assert all(torch.equal(plain[n], resumed[n]) for n in plain)
