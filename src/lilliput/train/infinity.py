"""ZeRO-Infinity: parameters, gradients and optimizer state rest in the host's memory or on disk, and visit the device around their use.

    parameters = "host"     or "disk"; a matrix is on the device only while a product needs it, the next ones are read ahead
    optimizer = "host"      or "disk": gradients and both moments; the update goes over them in tiles of 1 MiB, on the CPU
    folder = "scratch"      where the files of a disk tier lie, made in their full size before training
    tiles = 4               each matrix of the blocks in so many pieces of its rows, which come and go one by one

Under lora and qlora only the frozen weights rest elsewhere; the adapter and its moments stay, checkpoints are the adapter's.
The model is built without ever being there: one parameter at a time is made, stored and let go. Losses, gradients and weights are
bitwise those of the plain run (with tiles, gradients of inputs are summed in another order: 1e-6). Checkpoints of what is on disk cost
nothing: the files hold two generations (28 bytes a parameter, one set of gradients among them), and a killed run goes on from the last one.
Cost: matrices come twice a micro-batch (three times under remat). With all on disk a step reads 23 bytes a parameter and writes 16, and is
bound by that: about 39 ns a parameter at 1 GB/s. On a CPU the host is the device's own memory: only the disk frees some.
Skip it when the job fits: offload and remat move less.

Rajbhandari et al. 2021, arXiv 2104.07857. Published: a trillion parameters on one DGX-2, 32 trillion on 512 V100.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
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

TILINGS = (1, 8)  # that are tried where a budget of bytes is given
VISITORS = 3  # of the largest parameter: bytes of the device for those that visit
TILE, AHEAD = 1 << 18, 4  # numbers of a tile of the update, and tiles in memory: two read, one computed, one written
LEARN_BESIDE = ("lora", "qlora")  # rooms under which the weights are frozen and what learns is small


class Infinity(Section):
    """Fields are the knobs; see the module's lesson."""

    needs: ClassVar[tuple[str, ...]] = ()
    after: ClassVar[tuple[str, ...]] = LEARN_BESIDE  # which weights learn and how they are stored

    parameters: Literal["host", "disk"] = Field("host", description="where parameters rest")
    optimizer: Literal["host", "disk"] = Field("host", description="where gradients and both moments rest")
    folder: str = Field("", description="folder for the files of a disk tier; one run at a time")
    tiles: int = Field(1, ge=1, description="pieces of each matrix of the blocks, by rows; 1 = whole")

    @classmethod
    def within(cls, device: int, folder: str) -> list[Infinity]:
        """Settings for a budget of bytes and a folder that may be filled, the quickest first (lilliput.plan.choose)."""
        places = [("host", "host"), *([("host", "disk"), ("disk", "host"), ("disk", "disk")] if folder else [])]
        where = [{"parameters": p, "optimizer": o} | ({"folder": folder} if "disk" in (p, o) else {}) for p, o in places]
        return [cls.model_validate(place | ({"tiles": tiles} if tiles > 1 else {})) for tiles in TILINGS for place in where]

    def acts(self) -> Mapping[Phase, Callable[[Rig], Rig]]:
        """Cuts matrices into tiles and says where things will be; makes the tiers; then gradients leave and the update is in tiles."""
        return {Phase.SWAP: self.divide, Phase.STORE: self.store, Phase.STEP: self.watch}

    def refuses(self, others: Mapping[str, Any], facts: Facts) -> str | None:
        """Refuses rooms that place the same things, a disk without a folder, and tiles that do not divide the rows."""
        adapter = next((name for name in LEARN_BESIDE if name in others), None)
        if "offload" in others:
            return "offload does not go with it: it has the gradients and the moments already"
        if "paged" in others and not adapter:
            return "paged does not go with it: its moments lie on the device"
        if adapter and self.optimizer == "disk":
            return f"under {adapter} the moments are the adapter's and stay on the device: leave infinity.optimizer out"
        if "fp8" in others and self.tiles > 1:
            return "fp8 has one scale for all rows of a matrix, a tile would have its own: infinity.tiles=1"
        if "disk" in (self.parameters, self.optimizer) and not self.folder:
            return "a disk tier needs infinity.folder=FOLDER for its files"
        span = max((getattr(room, "span", 1) for room in others.values()), default=1)
        for path, (rows, columns) in self.cut(facts).items():
            if rows % self.tiles:
                return f"infinity.tiles={self.tiles} does not divide the {rows} rows of {path}"
            if rows // self.tiles * columns % span:
                return f"infinity.tiles={self.tiles} cuts {path} into {rows // self.tiles * columns} weights, no multiple of the {span} that share scales"
        return None

    @property
    def files(self) -> str:
        """The folder of its files, if it has some."""
        return self.folder if "disk" in (self.parameters, self.optimizer) else ""

    def cut(self, facts: Facts) -> dict[str, tuple[int, ...]]:
        """Path -> shape of the weight of every Linear that is cut into tiles."""
        if self.tiles == 1:
            return {}
        return {name.rpartition(".")[0]: shape for name, shape in facts.shapes.items() if name in facts.matrices}

    def cost(self, ledger: Ledger, facts: Facts, site: Site) -> Ledger:
        """Closed forms: what rests elsewhere, what visits, the gradients on their way (two that follow each other), the tiles of the update.

        Where the weights do not all learn, what learns is an adapter's, and only the weights rest elsewhere."""
        parameters, gradients = ledger.terms["parameters"], ledger.terms["gradients"]
        learn = gradients.size == facts.parameters * site.element
        adapter = 0 if learn else gradients.size
        linears = sum(count for name, count in facts.counts.items() if name in facts.matrices)
        each = (parameters.size - adapter - site.element * (facts.parameters - linears)) / max(1, linears)  # bytes of a weight of theirs, as it is stored
        cut = self.cut(facts)
        count = lambda name: self.tiles if name.rpartition(".")[0] in cut else 1
        numbers = [n for name in facts.shapes for n in [facts.counts[name] // count(name)] * count(name)]
        stored = lambda name: facts.counts[name] * (each if name in facts.matrices else site.element)
        matrices = [stored(name) / count(name) for name, shape in facts.shapes.items() if len(shape) > 1]
        vectors = site.element * sum(math.prod(shape) for shape in facts.shapes.values() if len(shape) == 1)
        weights = parameters.size - adapter
        disk = {"parameters": self.parameters == "disk", "optimizer": learn and self.optimizer == "disk"}
        moved = {"link": 0.0, "disk": 0.0}
        moved["disk" if disk["parameters"] else "link"] += 2.0 * weights
        moved["disk" if disk["optimizer"] else "link"] += 1.0 * weights * learn
        if "transient.one matrix decoded" in ledger.terms:
            ledger = ledger.scale("transient.one matrix decoded", 1 / self.tiles)
        ledger = ledger.put(
            parameters=replace(parameters, size=weights, tier=self.parameters),
            **{
                "visiting parameters": Term(round(min(weights - vectors, VISITORS * max(matrices))) + vectors, moments=("forward", "backward")),
                "link": Term(traffic=moved["link"], lane="link"),
                "disk": Term(traffic=moved["disk"], written=1.0 * weights * disk["optimizer"], lane="disk"),
            },
        )
        if not learn:
            return ledger.put(adapter=Term(adapter))
        tile = min(TILE, max(numbers)) if site.element == 4 else max(numbers)
        staged = AHEAD * tile * (site.element * disk["parameters"] + (site.element + 8) * disk["optimizer"])
        update = (2.0 * weights * disk["parameters"] + (weights + 16.0 * facts.parameters) * disk["optimizer"]) / site.micro_batches
        wrote = (weights * disk["parameters"] + 8.0 * facts.parameters * disk["optimizer"]) / site.micro_batches
        moments = ledger.terms["optimizer"]
        return ledger.put(
            gradients=replace(gradients, tier=self.optimizer, moments=MOMENTS),
            optimizer=replace(moments, tier=self.optimizer, moments=MOMENTS),
            disk=replace(ledger.terms["disk"], traffic=moved["disk"] + update, written=weights * disk["optimizer"] + wrote),
            **{
                "gradients leaving": Term(site.element * (largest_two(numbers) + len(numbers)), moments=("backward",)),  # and their norms
                "tiles of the update": Term(staged, tier="host"),
                "second generations": Term(weights * disk["parameters"] + moments.bytes * disk["optimizer"], tier="disk"),
            },
        )

    def divide(self, rig: Rig) -> Rig:
        """Matrices of the blocks get their tiles; homes say where everything will rest, so that plans do not count it."""
        import torch

        from lilliput.parallel.resident import Residents, stays

        def part(name: str, shape: tuple[int, ...], seed: int) -> Tensor:
            path, _, rest = name.partition(".tiles.")
            number, _, leaf = rest.partition(".")
            whole, linear = f"{path}.{leaf}", rig.model.get_submodule(path)
            value = rig.source(whole)(whole, rig.facts.shapes[whole], seed)
            coded = linear.codec is not None and leaf == "weight"
            return linear.codec.part(value, int(number), self.tiles) if coded else value.chunk(self.tiles)[int(number)]

        with torch.device("meta"):
            for path in self.cut(rig.facts):
                rig.model.get_submodule(path).split(self.tiles)
        away = lambda home: replace(home, tier=self.parameters, states=self.optimizer)
        homes = [(pattern, home if ".deltas." in pattern else away(home)) for pattern, home in rig.homes]
        homes += [(f"{pattern.removesuffix('weight')}tiles.*.weight", home) for pattern, home in homes if pattern.endswith(".weight")]
        rig = replace(rig, homes=tuple(homes), init=(*rig.init, ("*.tiles.*", part)) if self.tiles > 1 else rig.init)
        visiting = {name: p for name, p in rig.model.named_parameters() if rig.home(name).tier != "device"}
        sizes = {name: p.numel() * rig.stored(name).itemsize for name, p in visiting.items()}
        matrices = [size for name, size in sizes.items() if not stays(visiting[name])]
        residents = Residents(min(sum(matrices), VISITORS * max(matrices)))
        norms = sum(rig.stored(name).itemsize for name, p in visiting.items() if p.requires_grad)  # one of each gradient that leaves
        visits = residents.capacity + sum(sizes.values()) - sum(matrices) + norms
        return replace(rig, summon=residents.summon, visits=visits, keeper=residents)

    def store(self, rig: Rig) -> Rig:
        """Make the tiers, every file in its full size; a parameter's first value goes straight there."""
        import torch

        from lilliput.dist.arena import layout, require
        from lilliput.dist.engine import Engine
        from lilliput.dist.tiers import DiskTier, HostTier
        from lilliput.parallel.streamed import KINDS, StreamedAdamW

        residents: Residents = rig.keeper
        visiting = {name: p for name, p in rig.model.named_parameters() if rig.home(name).tier != "device"}
        learn = {name: p for name, p in visiting.items() if p.requires_grad}
        kinds = KINDS if learn else KINDS[:1]
        wide = {n: (p.numel(), torch.float32) for n, p in learn.items()}
        shapes = {
            "parameters": {n: (p.numel(), rig.stored(n)) for n, p in visiting.items()}, "first": wide, "second": wide,
            "gradients": {n: (p.numel(), rig.stored(n)) for n, p in learn.items()},
        }  # fmt: skip
        places = {kind: self.parameters if kind == "parameters" else self.optimizer for kind in kinds}
        copies = {kind: 2 if learn and kind != "gradients" else 1 for kind in kinds}  # what is frozen is read again from where it came from
        disk = [kind for kind in kinds if places[kind] == "disk"]
        if disk:
            sizes = {kind: {n: count * dtype.itemsize for n, (count, dtype) in shapes[kind].items()} for kind in disk}
            require(Path(self.folder), {Path(self.folder) / f"{kind}.bin": layout(sizes[kind], copies[kind])[2] for kind in disk})
        engine = Engine(device=rig.device) if disk else None
        tiers: dict[str, HostTier | DiskTier] = {
            kind: DiskTier(shapes[kind], engine, Path(self.folder) / f"{kind}.bin", copies[kind]) if engine and kind in disk
            else HostTier(shapes[kind], rig.device) for kind in kinds
        }  # fmt: skip
        residents.tier = tiers["parameters"]
        inner = rig

        def taken(name: str, shape: tuple[int, ...], seed: int) -> Tensor:
            if name not in visiting:
                return inner.source(name)(name, shape, seed)

            def make() -> Tensor:
                value = inner.source(name)(name, shape, seed).to(device=rig.device, dtype=inner.stored(name)).contiguous()
                return value if value.untyped_storage().nbytes() == value.nbytes else value.clone()

            return residents.take(name, make)

        def optimizing(rig: Rig, **knobs: Any) -> Any:
            residents.settle({name: p for name, p in rig.model.named_parameters() if name in visiting}, tiers["parameters"])
            if not learn:
                return inner.optimizing(rig, **knobs)
            return StreamedAdamW(rig.trainable(), tiers, residents, seed=rig.seed, tile=TILE, ahead=AHEAD, **knobs)

        return replace(rig, init=(*rig.init, ("*", taken)), optimizing=optimizing)

    def watch(self, rig: Rig) -> Rig:
        """Parameters come by when they are used; gradients leave; the update clips by their norm and goes over the tiles."""
        residents, inner, objective = rig.keeper, rig.weight, rig.objective
        residents.watch(rig.model, rig.facts.tied)

        def value(rig: Rig, name: str) -> Tensor:
            with residents.present(name.rpartition(".")[0]):
                return inner(rig, name).clone()

        if not rig.leaving():
            return replace(rig, weight=value, keeper=None, close=lambda rig: residents.close())

        def drained(model: Any, micro: Any) -> tuple[Tensor, int]:
            rig.optimizer.drain()
            return objective(model, micro)

        rig.optimizer.watch()
        return replace(rig, objective=drained, update=update, weight=value, keeper=rig.optimizer, close=lambda rig: rig.optimizer.close())


def update(rig: Rig, learning_rate: float) -> float:
    """Clip as parallel.rig.clip_and_step does, by the norms that were taken on the way, and update tile by tile."""
    import torch

    norm = rig.optimizer.norm()
    if math.isfinite(float(norm)):
        scale = torch.clamp((rig.clip or float("inf")) / (norm + 1e-6), max=1.0)
        rig.optimizer.step(learning_rate, scale)
    rig.optimizer.zero_grad()
    return float(norm)
