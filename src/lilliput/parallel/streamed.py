"""AdamW whose weights, gradients and moments rest in the host's memory or on disk and come by in tiles.

    backward   a gradient that is complete leaves at once, its norm taken on the way; a second micro-batch's is added to it
    update     tile by tile over all tensors: the next tile is read and the last one written while one is computed, on the CPU

Disk tiers go through a few buffers of fixed size; the host's own memory is updated where it lies. Every number's update depends on
itself alone, so tiles change no bit; norms are those of whole tensors in the parameters' order. bf16 weights come as whole
tensors: the random bits of their rounding are counted from the tensor's beginning.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from pathlib import Path

import torch

from lilliput.base.seeds import key
from lilliput.dist.engine import whole_pages
from lilliput.dist.tiers import DiskTier, HostTier, close
from lilliput.ops.adamw import Rule, update
from lilliput.parallel.leaving import when_complete
from lilliput.parallel.resident import Residents

KINDS = ("parameters", "gradients", "first", "second")
SAVED = ("parameters", "first", "second")


class StreamedAdamW:
    """Stands where parallel.optimizer.AdamW stands. tiers: kind -> where it rests. residents: the parameters that are on the device now.

    tile: numbers of one tile of an fp32 tensor. ahead: tiles in memory, of which one is written, one computed and the others read.
    """

    def __init__(self, parameters: Mapping[str, torch.nn.Parameter], tiers: Mapping[str, HostTier | DiskTier], residents: Residents, *,
                 betas: tuple[float, float], eps: float, weight_decay: float, seed: int, tile: int, ahead: int) -> None:  # fmt: skip
        self.parameters, self.tiers, self.residents = dict(parameters), tiers, residents
        self.betas, self.eps, self.weight_decay, self.seed = betas, eps, weight_decay, seed
        self.numbers, self.ahead = tile, ahead
        self.steps = 0
        self.norms = {n: torch.zeros((), dtype=p.dtype, device=p.device) for n, p in self.parameters.items()}  # of gradients, written in place
        self.came: set[str] = set()  # gradients of this step
        self.leaving: tuple[torch.Tensor, Future[None]] | None = None
        largest = max(self.tile(name) for name in self.parameters)
        dtype = next(iter(self.parameters.values())).dtype
        kinds = {"parameters": dtype, "gradients": dtype, "first": torch.float32, "second": torch.float32}
        held = lambda kind: largest if isinstance(tiers[kind], DiskTier) else 0
        room = lambda count, dtype: whole_pages(count * dtype.itemsize).view(dtype)[:count] if count else torch.empty(0, dtype=dtype)
        self.buffers = [{kind: room(held(kind), dtype) for kind, dtype in kinds.items()} for _ in range(ahead)]

    def tile(self, name: str) -> int:
        """Numbers of a parameter's tiles."""
        p = self.parameters[name]
        return min(self.numbers, p.numel()) if p.dtype == torch.float32 else p.numel()

    # ---- gradients

    def watch(self) -> None:
        """From now on each gradient leaves the device when the backward pass has completed it."""
        when_complete(self.parameters, self._leave)

    @torch.no_grad()
    def _leave(self, name: str, gradient: torch.Tensor) -> None:
        gradient = gradient.contiguous()
        self.drain()
        if name in self.came:
            before = torch.empty_like(gradient)
            self.tiers["gradients"].read(name, before.view(-1)).result()
            gradient = before.add_(gradient)
        self.came.add(name)
        torch.linalg.vector_norm(gradient, out=self.norms[name])
        self.leaving = gradient, self.tiers["gradients"].write(name, gradient.view(-1))
        self.tiers["gradients"].turn(name)

    def drain(self) -> None:
        """Wait for the gradient that is on its way; its bytes on the device are free after that, and not before, however quick the disk was."""
        if self.leaving is not None:
            self.leaving[1].result()
            self.leaving = None

    def norm(self) -> torch.Tensor:
        """Norm of all gradients of this step, as torch.nn.utils.clip_grad_norm_ takes it."""
        self.drain()
        return torch.linalg.vector_norm(torch.stack([self.norms[n] for n in self.parameters if n in self.came]))

    def zero_grad(self) -> None:
        """Forget this step's gradients."""
        self.came.clear()

    # ---- the update

    def tiles(self) -> Iterator[tuple[str, int, int]]:
        """(parameter, first number, numbers) of every tile, in the parameters' order."""
        for name in self.parameters:
            if name in self.came:
                count, tile = self.parameters[name].numel(), self.tile(name)
                yield from ((name, start, min(tile, count - start)) for start in range(0, count, tile))

    @torch.no_grad()
    def step(self, lr: float, scale: torch.Tensor) -> None:
        """One update by the gradients of this step, each times `scale`."""
        self.steps += 1
        self.residents.clear()
        work = list(self.tiles())
        windows: list[dict[str, tuple[torch.Tensor, Future[None]]]] = []
        backs: list[list[Future[None]]] = []

        def fetch(number: int) -> None:
            name, start, count = work[number]
            if number >= self.ahead:
                for written in backs[number - self.ahead]:
                    written.result()
            buffers = self.buffers[number % self.ahead]
            windows.append({kind: self.tiers[kind].window(name, start, count, buffers[kind]) for kind in KINDS})

        for number, (name, start, count) in enumerate(work):
            for coming in range(len(windows), min(number + self.ahead - 1, len(work))):
                fetch(coming)
            pieces = {kind: self._ready(window) for kind, window in windows[number].items()}
            parameter = self.parameters[name]
            rule = Rule(lr, self.betas, self.eps, self.weight_decay if parameter.dim() >= 2 else 0.0, self.steps)
            pieces["gradients"].mul_(scale.to(pieces["gradients"].device))
            update(pieces["parameters"], pieces["gradients"], pieces["first"], pieces["second"], rule, key(self.seed, self.steps, name))
            backs.append([self.tiers[kind].back(name, start, pieces[kind]) for kind in SAVED])
            if start + count == parameter.numel():
                for kind in SAVED:
                    self.tiers[kind].turn(name)
        for written in (future for futures in backs[-self.ahead:] for future in futures):
            written.result()

    @staticmethod
    def _ready(window: tuple[torch.Tensor, Future[None]]) -> torch.Tensor:
        window[1].result()
        return window[0]

    # ---- what is saved

    def state(self) -> dict[str, torch.Tensor]:
        """Moments by `first.<name>` and `second.<name>`, those that are in the host's memory."""
        return {f"{kind}.{name}": t for kind in ("first", "second") for name, t in self._held(kind).items() if name in self.parameters}

    def held(self) -> list[torch.Tensor]:
        """Everything that lies in the host's memory."""
        return [*(t for kind in KINDS for t in self._held(kind).values()), *(t for buffers in self.buffers for t in buffers.values())]

    def _held(self, kind: str) -> dict[str, torch.Tensor]:
        tier = self.tiers[kind]
        return tier.tensors if isinstance(tier, HostTier) else {}

    def save(self, folder: Path, tag: str) -> None:
        """What is in the host's memory as safetensors files; what is on disk stays where it is, as a generation of this tag."""
        from safetensors.torch import save_file

        for kind in SAVED:
            tier = self.tiers[kind]
            if isinstance(tier, DiskTier):
                tier.arena.commit(tag)
            else:
                tier.down.finish()
                save_file(tier.tensors, folder / f"{kind}.safetensors")

    def restore(self, folder: Path, tag: str, steps: int) -> None:
        """Go back to what `save` left. UserError when a file on disk does not hold the generation any more."""
        from safetensors.torch import load_file

        self.residents.clear()
        self.residents.first.clear()
        for kind in SAVED:
            tier = self.tiers[kind]
            if isinstance(tier, DiskTier):
                tier.arena.back(tag)
                continue
            for name, tensor in load_file(folder / f"{kind}.safetensors").items():
                tier.tensors[name].copy_(tensor)
        self.steps = steps

    def close(self) -> None:
        """Finish what is under way, end the threads and let go of the files."""
        self.drain()
        self.residents.clear()
        close(self.tiers.values())
