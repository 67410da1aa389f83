"""ZeRO-Infinity: parameters, gradients and optimizer state rest in the host's memory or on disk, and visit the device around their use.

    parameters = "host"     or "disk"; a matrix is on the device only while a product needs it, the next ones are read ahead
    optimizer = "host"      or "disk": gradients and both moments; the update goes over them in tiles of 1 MiB, on the CPU
    folder = "scratch"      where the files of a disk tier lie, made in their full size before training
    tiles = 4               each matrix of the blocks in so many pieces of its rows, which come and go one by one

The model is built without ever being there: one parameter at a time is made, stored and let go. Losses, gradients and weights are
bitwise those of the plain run (with tiles, gradients of inputs are summed in another order: 1e-6). Checkpoints of what is on disk cost
nothing: the files hold two generations (28 bytes a parameter and one set of gradients), and a killed run goes on from the last one.
Cost: matrices come twice a micro-batch (three times under remat), and 24 bytes a parameter pass the disk a step. An optimizer on disk is
bound by it: about 25 ns a parameter at 1 GB/s. On a CPU the host is the device's own memory: only the disk frees some.
Skip it when the job fits: offload and remat move less.

Rajbhandari et al. 2021, arXiv 2104.07857. Published: a trillion parameters on one DGX-2, 32 trillion on 512 V100.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from lilliput.base.config import Section
from lilliput.base.facts import Facts
from lilliput.base.ledger import MOMENTS, Ledger, Term, largest_two
from lilliput.base.protocols import Phase, Site

if TYPE_CHECKING:
    from torch import Tensor

    from lilliput.parallel.resident import Residents
    from lilliput.parallel.rig import Rig

VISITORS = 3  # of the largest parameter: bytes of the device for those that visit
TILE, AHEAD = 1 << 18, 3  # numbers of a tile of the update, and tiles in memory: one read, one computed, one written
ALONE = {"lora": "only an adapter learns", "qlora": "only an adapter learns", "offload": "it has the gradients and the moments already",
         "fp8": "an 8-bit copy of every matrix stays on the device", "paged": "its moments lie on the device"}  # fmt: skip


class Infinity(Section):
    """Fields are the knobs; see the module's lesson."""

    needs: ClassVar[tuple[str, ...]] = ()

    parameters: Literal["host", "disk"] = Field("host", description="where parameters rest")
    optimizer: Literal["host", "disk"] = Field("host", description="where gradients and both moments rest")
    folder: str = Field("", description="folder for the files of a disk tier; one run at a time")
    tiles: int = Field(1, ge=1, description="pieces of each matrix of the blocks, by rows; 1 = whole")

    def acts(self) -> Mapping[Phase, Callable[[Rig], Rig]]:
        """Cuts matrices into tiles and says where things will be; makes the tiers; then gradients leave and the update is in tiles."""
        return {Phase.SWAP: self.divide, Phase.STORE: self.store, Phase.STEP: self.watch}

    def refuses(self, others: Mapping[str, Any], facts: Facts) -> str | None:
        """Refuses rooms that place the same things, a disk without a folder, and tiles that do not divide the rows."""
        other = next((name for name in ALONE if name in others), None)
        if other is not None:
            return f"{other} does not go with it: {ALONE[other]}"
        if "disk" in (self.parameters, self.optimizer) and not self.folder:
            return "a disk tier needs infinity.folder=FOLDER for its files"
        odd = next((path for path, shape in self.cut(facts).items() if shape[0] % self.tiles), None)
        if odd is not None:
            return f"infinity.tiles={self.tiles} does not divide the {self.cut(facts)[odd][0]} rows of {odd}"
        return None

    def cut(self, facts: Facts) -> dict[str, tuple[int, ...]]:
        """Path -> shape of the weight of every Linear that is cut into tiles."""
        if self.tiles == 1:
            return {}
        paths = {name.rpartition(".")[0]: shape for name, shape in facts.shapes.items() if name.endswith(".weight")}
        return {path: shape for path, shape in paths.items() if any(fnmatchcase(path, pattern) for pattern in facts.linears)}

    def pieces(self, facts: Facts) -> list[tuple[int, ...]]:
        """Shapes of what comes and goes as one, in execution order."""
        cut = self.cut(facts)
        divided = lambda name, shape: name.rpartition(".")[0] in cut
        return [
            piece
            for name, shape in facts.shapes.items()
            for piece in ([(shape[0] // self.tiles, *shape[1:])] * self.tiles if divided(name, shape) else [shape])
        ]

    def room(self, facts: Facts, element: int) -> int:
        """Bytes of matrices on the device at a time."""
        matrices = [math.prod(shape) for shape in self.pieces(facts) if len(shape) > 1]
        return element * min(sum(matrices), VISITORS * max(matrices))

    def cost(self, ledger: Ledger, facts: Facts, site: Site) -> Ledger:
        """Closed forms: what rests elsewhere, what visits, the gradients on their way (two that follow each other), the tiles of the update."""
        sizes = [math.prod(shape) for shape in self.pieces(facts)]
        vectors = sum(math.prod(shape) for shape in facts.shapes.values() if len(shape) == 1)
        leaving = site.element * largest_two(sizes)
        tile = min(TILE, max(sizes)) if site.element == 4 else max(sizes)
        disk = {kind: where == "disk" for kind, where in (("parameters", self.parameters), ("optimizer", self.optimizer))}
        staged = AHEAD * tile * (site.element * disk["parameters"] + (site.element + 8) * disk["optimizer"])
        weights = site.element * facts.parameters
        moved = {"link": 0.0, "disk": 0.0}
        moved["disk" if disk["parameters"] else "link"] += 2.0 * weights
        moved["disk" if disk["optimizer"] else "link"] += 1.0 * weights
        update = (2.0 * weights * disk["parameters"] + (weights + 16.0 * facts.parameters) * disk["optimizer"]) / site.micro_batches
        return ledger.put(
            parameters=replace(ledger.terms["parameters"], tier=self.parameters),
            gradients=replace(ledger.terms["gradients"], tier=self.optimizer, moments=MOMENTS),
            optimizer=replace(ledger.terms["optimizer"], tier=self.optimizer, moments=MOMENTS),
            **{
                "visiting parameters": Term(self.room(facts, site.element) + site.element * vectors, moments=("forward", "backward")),
                "gradients leaving": Term(leaving, moments=("backward",)),
                "tiles of the update": Term(staged, tier="host"),
                "link": Term(traffic=moved["link"], lane="link"),
                "disk": Term(traffic=moved["disk"] + update, lane="disk"),
            },
        )

    def divide(self, rig: Rig) -> Rig:
        """Matrices of the blocks get their tiles; homes say where everything will rest, so that plans do not count it."""
        import torch

        from lilliput.parallel.resident import Residents

        def part(name: str, shape: tuple[int, ...], seed: int) -> Tensor:
            path, _, rest = name.partition(".tiles.")
            number, _, leaf = rest.partition(".")
            whole = f"{path}.{leaf}"
            return rig.source(whole)(whole, (shape[0] * self.tiles, *shape[1:]), seed)[int(number) * shape[0] : (int(number) + 1) * shape[0]]

        with torch.device("meta"):
            for path in self.cut(rig.facts):
                rig.model.get_submodule(path).split(self.tiles)
        home = replace(rig.homes[0][1], tier=self.parameters, states=self.optimizer)
        init = (*rig.init, ("*.tiles.*", part)) if self.tiles > 1 else rig.init
        residents = Residents(self.room(rig.facts, rig.site.element))
        vectors = sum(p.numel() for p in rig.model.parameters() if p.dim() == 1)
        visits = residents.capacity + rig.site.element * vectors
        return replace(rig, homes=(*rig.homes, ("*", home)), init=init, summon=residents.summon, visits=visits, keeper=residents)

    def store(self, rig: Rig) -> Rig:
        """Make the tiers, every file in its full size; a parameter's first value goes straight there."""
        import torch

        from lilliput.dist.arena import layout, require
        from lilliput.dist.engine import Engine
        from lilliput.dist.tiers import DiskTier, HostTier
        from lilliput.models.checkpoints import STORED
        from lilliput.parallel.streamed import KINDS, StreamedAdamW

        residents: Residents = rig.keeper
        stored = lambda name: getattr(torch, STORED[rig.home(name).codec][0])
        every, learn = dict(rig.model.named_parameters()), rig.trainable()
        wide = {n: (p.numel(), torch.float32) for n, p in learn.items()}
        shapes = {
            "parameters": {n: (p.numel(), stored(n)) for n, p in every.items()}, "first": wide, "second": wide,
            "gradients": {n: (p.numel(), stored(n)) for n, p in learn.items()},
        }  # fmt: skip
        places = {kind: self.parameters if kind == "parameters" else self.optimizer for kind in KINDS}
        copies = {kind: 1 if kind == "gradients" else 2 for kind in KINDS}
        disk = [kind for kind in KINDS if places[kind] == "disk"]
        if disk:
            sizes = {kind: {n: count * dtype.itemsize for n, (count, dtype) in shapes[kind].items()} for kind in disk}
            require(Path(self.folder), {Path(self.folder) / f"{kind}.bin": layout(sizes[kind], copies[kind])[2] for kind in disk})
        engine = Engine(device=rig.device) if disk else None
        tiers: dict[str, HostTier | DiskTier] = {
            kind: DiskTier(shapes[kind], engine, Path(self.folder) / f"{kind}.bin", copies[kind]) if engine and kind in disk
            else HostTier(shapes[kind], rig.device) for kind in KINDS
        }  # fmt: skip
        residents.tier = tiers["parameters"]
        inner = rig

        def taken(name: str, shape: tuple[int, ...], seed: int) -> Tensor:
            def make() -> Tensor:
                value = inner.source(name)(name, shape, seed).to(device=rig.device, dtype=stored(name)).contiguous()
                return value if value.untyped_storage().nbytes() == value.nbytes else value.clone()

            return residents.take(name, make)

        def optimizing(rig: Rig, **knobs: Any) -> StreamedAdamW:
            residents.settle(dict(rig.model.named_parameters()), tiers["parameters"])
            return StreamedAdamW(rig.trainable(), tiers, residents, seed=rig.seed, tile=TILE, ahead=AHEAD, **knobs)

        return replace(rig, init=(*rig.init, ("*", taken)), optimizing=optimizing)

    def watch(self, rig: Rig) -> Rig:
        """Parameters come by when they are used; gradients leave; the update clips by their norm and goes over the tiles."""
        residents: Residents = rig.keeper
        residents.watch(rig.model, rig.facts.tied)
        rig.optimizer.watch()

        def value(rig: Rig, name: str) -> Tensor:
            import torch

            path, _, leaf = name.rpartition(".")
            tiles = [f"{path}.tiles.{number}.{leaf}" for number in range(self.tiles)]
            return torch.cat([residents.value(n) for n in tiles]) if tiles[0] in residents.parameters else residents.value(name)

        return replace(rig, update=update, weight=value, keeper=rig.optimizer, close=lambda rig: rig.optimizer.close())


def update(rig: Rig, learning_rate: float) -> float:
    """Clip as parallel.rig.clip_and_step does, by the norms that were taken on the way, and update tile by tile."""
    import torch

    norm = rig.optimizer.norm()
    if math.isfinite(float(norm)):
        scale = torch.clamp((rig.clip or float("inf")) / (norm + 1e-6), max=1.0)
        rig.optimizer.step(learning_rate, scale)
    rig.optimizer.zero_grad()
    return float(norm)
