import torch

from lilliput.memory.meter import Meter, storage_bytes


def test_counts_live_and_peak_exactly() -> None:
    with Meter() as meter:
        a = torch.zeros(1000)  # 4,000 bytes
        b = a + 1
        assert (meter.live, meter.peak) == (8000, 8000)
        del a
        assert (meter.live, meter.peak) == (4000, 8000)
        assert meter.mark() == 4000
        c = b.view(10, 100).t()  # a view: no new storage
        assert meter.live == 4000
        del b
        assert meter.live == 4000, "the view keeps its storage alive"
        del c
    assert (meter.live, meter.peak) == (0, 4000)
    assert meter.calls["add"] == 1


def test_sees_the_backward_pass_and_leaves_known_tensors_out() -> None:
    weight = torch.randn(64, 64, requires_grad=True)
    x = torch.randn(32, 64)
    with Meter(known=[weight, x]) as meter:
        loss = (x @ weight).tanh().sum()
        assert meter.live == 32 * 64 * 4 + 4, "tanh keeps its output; the sum is four bytes"
        loss.backward()
        assert meter.live == 64 * 64 * 4 + 4, "the weight's gradient and the loss stay"
        assert meter.peak == 32 * 64 * 4 + 64 * 64 * 4 + 2 * 4, "tanh's gradient beside the weight's; loss and its gradient"


def test_storage_bytes_counts_shared_storage_once() -> None:
    a = torch.zeros(10)
    assert storage_bytes([a, a.view(2, 5), a[3:]]) == 40
    assert storage_bytes([a, torch.zeros(10)]) == 80
