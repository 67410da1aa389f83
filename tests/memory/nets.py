"""Small nets of four kinds for the memory tests: each gives (model, step, inputs); step(model, *inputs) is a scalar loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from rigs import make_rig, random_batch
from torch import nn

from lilliput.data.batch import MicroBatch
from lilliput.memory.capture import capture
from lilliput.memory.execute import Executor
from lilliput.memory.lower import Schedule
from lilliput.memory.meter import Meter
from lilliput.memory.simulate import Simulation, simulate
from lilliput.models.encoder import Encoder, EncoderSpec
from lilliput.models.spec import DecoderSpec
from lilliput.parallel.rig import next_token

Net = tuple[nn.Module, Callable[..., torch.Tensor], list[torch.Tensor]]


class Residual(nn.Module):
    def __init__(self, dim: int, p: float) -> None:
        super().__init__()
        self.linear, self.dropout = nn.Linear(dim, dim), nn.Dropout(p)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.tanh(self.dropout(self.linear(x)))


class Unrolled(nn.Module):
    """Layers of LSTM cells, the same ones at every step of the sequence."""

    def __init__(self, layers: int, dim: int) -> None:
        super().__init__()
        self.cells = nn.ModuleList(nn.LSTMCell(dim, dim) for _ in range(layers))

    def forward(self, x_TBC: torch.Tensor) -> torch.Tensor:
        states = [(torch.zeros_like(x_TBC[0]), torch.zeros_like(x_TBC[0])) for _ in self.cells]
        for x in x_TBC.unbind():
            for layer, cell in enumerate(self.cells):
                states[layer] = cell(x, states[layer])
                x = states[layer][0]
        return x


class Basic(nn.Module):
    """ResNet's basic block."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first, self.norm1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs)
        self.second, self.norm2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.short = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.short = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.relu(self.norm2(self.second(self.relu(self.norm1(self.first(x))))) + self.short(x))


def resnet18(width: int, classes: int = 10) -> nn.Sequential:
    """ResNet-18 for 32 x 32 pictures: a 3 x 3 stem without pooling, then 2 blocks of each of four widths."""
    layers: list[nn.Module] = [nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
    for stage, outputs in enumerate((width, 2 * width, 4 * width, 8 * width)):
        layers += [Basic(width if stage == 0 else outputs // 2, outputs, 1 if stage == 0 else 2), Basic(outputs, outputs, 1)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8 * width, classes))


class Shared(nn.Module):
    """One linear used three times and a tied output."""

    def __init__(self, vocab: int, dim: int) -> None:
        super().__init__()
        self.embed, self.mix, self.norm, self.dropout = nn.Embedding(vocab, dim), nn.Linear(dim, dim), nn.LayerNorm(dim), nn.Dropout(0.2)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        for _ in range(3):
            x = x + self.dropout(torch.nn.functional.gelu(self.mix(self.norm(x))))
        return x @ self.embed.weight.t()


def mlp(layers: int = 16, dim: int = 32, p: float = 0.1, rows: int = 16) -> Net:
    return nn.Sequential(*(Residual(dim, p) for _ in range(layers))), lambda m, x: m(x).square().mean(), [torch.randn(rows, dim)]


def gpt(layers: int = 4, dropout: float = 0.1, dim: int = 32, tokens: int = 32) -> Net:
    spec = DecoderSpec("llama", vocab=64, dim=dim, layers=layers, heads=2, kv_heads=1, head_dim=dim // 2, ffn=2 * dim, context=256)
    rig, batch = make_rig({}, spec, dropout=dropout), random_batch(64, micros=1, sequences=2, tokens=tokens)[0]
    return rig.model, lambda m, t, y: next_token(m, MicroBatch(t, y, 64))[0] / 64, [batch.tokens_BT, batch.targets_BT]


def lstm(layers: int = 2, dim: int = 16, steps: int = 16, batch: int = 4) -> Net:
    return Unrolled(layers, dim), lambda m, x: m(x).square().mean(), [torch.randn(steps, batch, dim)]


def conv(width: int = 8, batch: int = 4) -> Net:
    targets = torch.arange(batch) % 10
    return resnet18(width), lambda m, x, y: nn.functional.cross_entropy(m(x), y), [torch.randn(batch, 3, 32, 32), targets]


def shared() -> Net:
    tokens = torch.arange(24).view(2, 12)
    return Shared(32, 16), lambda m, x, y: nn.functional.cross_entropy(m(x).flatten(0, 1), y.flatten()), [tokens, tokens.flip(1)]


def bert(layers: int = 2, dim: int = 32, tokens: int = 24) -> Net:
    """A BERT encoder with a classifier on its pooler; the second text is padded."""
    model = Encoder(EncoderSpec(vocab=64, dim=dim, layers=layers, heads=2, ffn=4 * dim, context=tokens)).init_weights()
    classify = nn.Linear(dim, 3)
    ids, mask = torch.arange(2 * tokens).view(2, tokens) % 64, torch.ones(2, tokens, dtype=torch.int64)
    mask[1, tokens // 2 :] = 0
    step = lambda m, t, k, y: nn.functional.cross_entropy(m[1](m[0].pooled(m[0].padded(t, k))), y)
    return nn.ModuleList([model, classify]), step, [ids, mask, torch.tensor([0, 2])]


NETS: dict[str, Callable[[], Net]] = {"mlp": mlp, "gpt": gpt, "lstm": lstm, "resnet18": conv, "shared": shared, "bert": bert}


def run(net: Net, executor: Executor | None = None, meter: Meter | None = None, seed: int = 1) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss and gradients of one step, from a fixed generator state; gradients are taken off."""
    model, step, inputs = net
    torch.manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = None
    with meter or Meter():
        if executor is None:
            loss = step(model, *inputs)
        else:
            with executor.forward():
                loss = step(model, *inputs)
        loss.backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    for parameter in model.parameters():
        parameter.grad = None
    return loss.detach(), gradients


def metered(net: Net, schedule: Schedule, funcs: list[Any], stores: Any = None, budget: dict[str, int] | None = None) -> tuple[Simulation, Meter, Any]:
    """(simulated, measured, (loss, gradients)) of one planned step."""
    model, _, inputs = net
    meter = Meter(known=[*model.parameters(), *model.buffers(), *inputs], budget=budget)
    outcome = run(net, Executor(schedule, funcs, stores, meter), meter)
    return simulate(schedule), meter, outcome


def traced(net: Net) -> Any:
    return capture(net[0], net[1], net[2])


def same(one: Any, two: Any) -> bool:
    """Bitwise equal loss and gradients."""
    return torch.equal(one[0], two[0]) and one[1].keys() == two[1].keys() and all(torch.equal(one[1][n], two[1][n]) for n in one[1])
