"""Simulate: what a plan does, byte by byte and second by second, without doing it. The one judge of what is legal. No torch.

Bytes: every storage is alive while Python, the executor or a running backward operation holds it, exactly as in the eager
run; the peak is the largest sum after any operation. Time: operations and recomputation fill the compute lane; copies fill
one lane a tier and overlap it (what is encoded on the device is computed there); whoever needs a copy waits. Energy: seconds of each lane times its watts.
What is not counted: memory inside one operation (workspaces), and what was there before the step.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from lilliput.base.errors import UserError
from lilliput.memory.lower import Replay, Schedule
from lilliput.memory.plan import stored_bytes
from lilliput.memory.trace import DONE, FREE, OP, PACK, RELEASE, UNPACK


@dataclass(frozen=True)
class Link:
    """The way between the device tier and another one: bytes/s in each direction, seconds to begin, watts while it moves."""

    write: float = float("inf")
    read: float = float("inf")
    latency: float = 0.0
    watts: float = 0.0


@dataclass(frozen=True)
class Rates:
    """Lanes of the machine: a link a tier, and the watts of computing."""

    links: Mapping[str, Link] = field(default_factory=dict)
    watts: float = 0.0

    def link(self, tier: str) -> Link:
        """The link to a tier; one without a figure costs nothing."""
        return self.links.get(tier, Link())


@dataclass
class Simulation:
    """What a plan comes to. `timeline`: (event, device bytes) after each change, when it was asked for."""

    peak: dict[str, int]
    at: int = 0  # event of the device peak
    seconds: float = 0.0
    again: float = 0.0  # seconds of operations that ran again
    replayed: dict[int, int] = field(default_factory=dict)  # operation -> times it ran again
    moved: dict[str, int] = field(default_factory=dict)  # bytes written to a tier (and read back)
    joules: float = 0.0
    timeline: list[tuple[int, int]] = field(default_factory=list)


class _Run:
    """One simulated step."""

    def __init__(self, schedule: Schedule, rates: Rates, timeline: bool) -> None:
        self.schedule, self.trace, self.rates = schedule, schedule.trace, rates
        self.live: dict[str, int] = {"device": 0}
        self.result = Simulation({"device": 0})
        self.keep_line = timeline
        self.refs: dict[int, int] = {}  # instance -> holders
        self.bytes: dict[int, int] = {}
        self.here: dict[int, int] = {}  # storage -> instance that the executor holds in the device tier
        self.stored: dict[int, tuple[str, int]] = {}  # storage -> (tier, bytes) of its copy elsewhere or encoded
        self.leaving: dict[int, float] = {}  # storage -> when its copy is written
        self.coming: dict[int, float] = {}
        self.uses: dict[int, int] = {}
        self.pending = {s.index: len(s.packs) for s in self.trace.saved()}
        self.busy: dict[str, float] = {}
        self.next = len(self.trace.storages)
        self.event = 0

    def make(self, storage: int, fresh: bool) -> int:
        instance = storage
        if fresh:
            instance, self.next = self.next, self.next + 1
        self.refs[instance], self.bytes[instance] = 1, self.trace.storages[storage].bytes
        self.add("device", self.bytes[instance])
        return instance

    def add(self, tier: str, count: int) -> None:
        self.live[tier] = self.live.get(tier, 0) + count
        if self.live[tier] > self.result.peak.get(tier, 0):
            self.result.peak[tier] = self.live[tier]
            if tier == "device":
                self.result.at = self.event
        if self.keep_line and tier == "device":
            self.result.timeline.append((self.event, self.live["device"]))

    def let_go(self, instance: int) -> None:
        self.refs[instance] -= 1
        if self.refs[instance] == 0:
            self.add("device", -self.bytes[instance])

    def drop(self, storage: int) -> None:
        if storage in self.here:
            self.let_go(self.here.pop(storage))

    def hold(self, storage: int) -> None:
        if storage not in self.here:
            self.here[storage] = storage
            self.refs[storage] += 1

    def copy(self, tier: str, count: int, write: bool) -> float:
        """Book a transfer; when it is done."""
        link = self.rates.link(tier)
        took = link.latency + count / (link.write if write else link.read)
        if tier == "device":  # encoded where it is: the device's own work
            self.compute(took)
            return self.result.seconds
        self.busy[tier] = max(self.busy.get(tier, 0.0), self.result.seconds) + took
        self.result.joules += took * link.watts
        if write:
            self.result.moved[tier] = self.result.moved.get(tier, 0) + count
        return self.busy[tier]

    def pack(self, k: int) -> None:
        storage = self.schedule.first.get(k)
        if storage is not None:
            self.hold(storage)
            if self.schedule.of(storage).away:
                self.send(storage)
        for leaving in self.schedule.leave.get(k, ()):
            self.left(leaving)

    def send(self, storage: int) -> None:
        self.hold(storage)
        decision = self.schedule.of(storage)
        count = stored_bytes(decision.codec, self.bytes[storage])
        self.add(decision.tier, count)
        self.stored[storage] = (decision.tier, count)
        self.leaving[storage] = self.copy(decision.tier, count, True)
        if decision.out is None:
            self.left(storage)

    def left(self, storage: int) -> None:
        """Wait until its copy is written, then give the device's up."""
        if storage in self.leaving:
            self.result.seconds = max(self.result.seconds, self.leaving.pop(storage))
            self.drop(storage)

    def unpack(self, k: int) -> None:
        storage = self.trace.packs[k]
        actions = self.schedule.before.get(k)
        for late in list(self.leaving):
            self.left(late)
        if actions is not None:
            for s in actions.drop:
                self.drop(s)
            for s in actions.fetch:
                tier, count = self.stored[s]
                self.coming[s] = self.copy(tier, count, False)
                self.here[s] = self.make(s, True)
            for s in actions.wait:
                self.result.seconds = max(self.result.seconds, self.coming.pop(s))
                self.settle(s)
            if actions.replay is not None:
                self.replay(actions.replay)
            for s in actions.release:
                self.drop(s)
        if storage not in self.here:
            lost = self.trace.storages[storage].name
            raise UserError(f"the plan loses {lost}", f"the backward pass asks for saved tensor {k}", "keep it, or say how it comes back")
        self.uses[k] = self.here[storage]
        self.refs[self.here[storage]] += 1

    def settle(self, storage: int) -> None:
        """A copy is back for good when nothing sends it away again."""
        if len(self.schedule.of(storage).spans) <= 1:
            tier, count = self.stored.pop(storage)
            self.add(tier, -count)

    def replay(self, replay: Replay) -> None:
        made: dict[int, int] = {}
        for number, last in zip(replay.ops, replay.last, strict=True):
            op = self.trace.ops[number]
            for s in op.news:
                made[s] = self.make(s, True)
            self.compute(op.seconds)
            self.result.again += op.seconds
            self.result.replayed[number] = self.result.replayed.get(number, 0) + 1
            for s in last:
                self.let_go(made.pop(s))
        self.here |= made

    def compute(self, seconds: float) -> None:
        self.result.seconds += seconds
        self.result.joules += seconds * self.rates.watts

    def release(self, k: int) -> None:
        storage = self.trace.packs[k]
        self.pending[storage] -= 1
        if self.pending[storage] == 0:
            if storage not in self.schedule.until:
                self.drop(storage)
            if storage in self.stored:
                tier, count = self.stored.pop(storage)
                self.add(tier, -count)

    def run(self) -> Simulation:
        for event, (kind, i) in enumerate(self.trace.events):
            self.event = event
            if kind == OP:
                for s in self.trace.ops[i].news:
                    self.make(s, False)
                self.compute(self.trace.ops[i].seconds)
                for s in (*self.trace.ops[i].news, *self.trace.ops[i].writes):
                    if s in self.schedule.hold and self.trace.storages[s].writers[-1] == i:
                        self.hold(s)
                for s in self.schedule.late.get(i, ()):
                    self.send(s)
            elif kind == FREE:
                self.let_go(i)
            elif kind == PACK:
                self.pack(i)
            elif kind == UNPACK:
                self.unpack(i)
            elif kind == DONE:
                self.let_go(self.uses.pop(i))
            elif kind == RELEASE:
                self.release(i)
        return self.result


def simulate(schedule: Schedule, rates: Rates = Rates(), timeline: bool = False) -> Simulation:
    """Peak bytes by tier, seconds and joules of a schedule. UserError when it loses a tensor that is asked for."""
    return _Run(schedule, rates, timeline).run()
