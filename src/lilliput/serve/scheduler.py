"""Scheduler: which tokens of which sequences run in the next step (continuous batching, chunked prefill, preemption).

There is no prefill phase and no decode phase: a sequence has tokens that are known and tokens that are computed, and a step
hands out one budget of tokens: first one (and its draft) to every sequence that answers, then to prompts in order, then to
admissions while blocks last. A long prompt is cut into what the others leave, so it never stops their answers; `pace` cuts it
further, so that it does not slow them down too much either.

Sequences of one request are a group: they share the prompt's blocks and are admitted, preempted and resumed together. Order
is arrival (FCFS), or priority and then arrival. When blocks run out, the last group in order loses all of its blocks: they
are copied to the swap space, or forgotten and computed again (`choose` says which). While a group is swapped out, none is
admitted. The first group can always go on, since a group that needs more than the pool is refused at the door.

Baselines: batching="static" admits only when nothing runs; reserve=N takes blocks for N tokens at admission (Orca's Max).

Plain integers, no tensors: fuzzed without a model. Kwon et al. 2023, sections 4.3-4.5; Yu et al. 2022 (Orca); Agrawal et
al. 2023, arXiv 2308.16369 (chunked prefill).
"""

from __future__ import annotations

from array import array
from bisect import insort
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, NamedTuple

from lilliput.serve.blocks import BLOCK, BlockPool, Pairs, Table, blocks_for

if TYPE_CHECKING:
    from lilliput.serve.adapters import Adapter

SCORED = 256  # rows of logits in one step for a prompt that is scored: 50 MB with a vocabulary of 49,152
Way = Literal["swap", "recompute"]


class Seq:
    """What the scheduler knows of a sequence. `tokens`: all ids that are known; `draft`: ids that are only guessed, to be tried with the next step;
    `parked`: it waits, without blocks, until the group's first sequence has computed the prompt that they share. `gone`: tokens that were
    computed and have left the cache again."""

    __slots__ = ("draft", "gone", "group", "id", "parked", "table", "tokens")

    def __init__(self, id: int, group: Group, tokens: list[int], table: Table) -> None:
        self.id, self.group, self.tokens, self.table = id, group, tokens, table
        self.draft: list[int] = []
        self.parked = False
        self.gone = 0

    @property
    def missing(self) -> int:
        """Known tokens that have not been computed."""
        return len(self.tokens) - self.gone - self.table.length


@dataclass
class Group:
    """The sequences of one request. `width`: how many there will be; `scores`: the logits of the whole prompt are wanted."""

    id: int
    prompt: int
    width: int
    most: int  # blocks it can need
    order: tuple[int, int]  # lower runs first
    scores: bool = False
    shares: bool = True  # may take the blocks of others and give its own
    seqs: list[Seq] = field(default_factory=list)
    reserve: int = 0  # tokens of cache that it takes at admission
    cached: int = 0  # tokens of the prompt that were found when it was first admitted
    admitted: bool = False
    adapter: Adapter | None = None  # whose weights it runs under; nothing here looks at it

    @property
    def tables(self) -> list[Table]:
        """Of its sequences."""
        return [seq.table for seq in self.seqs]


class Chunk(NamedTuple):
    """Places start..stop-1 of the cache of one sequence in one step. `samples`: its last known row gives the next token."""

    id: int
    start: int
    stop: int
    samples: bool
    table: array[int]
    wants: int  # logits of so many rows, the last ones
    ids: Sequence[int]  # of its tokens, the draft included
    prompt: int = 0  # rows of them that are of the prompt
    draft: int = 0  # rows of them that are guessed, the last ones
    gone: int = 0  # tokens before them that have left the cache: place + gone = position in the text
    adapter: Adapter | None = None


@dataclass
class Moves:
    """What the runner copies before a step runs, in this order."""

    out: Pairs = field(default_factory=list)  # block -> slot of the swap space
    copies: Pairs = field(default_factory=list)  # block -> block; all are read before any is written
    back: Pairs = field(default_factory=list)  # slot -> block

    def __bool__(self) -> bool:
        return bool(self.out or self.copies or self.back)


def recompute(group: Group) -> Way:
    """Always compute again."""
    return "recompute"


class Scheduler:
    """Waiting and running groups over one block pool."""

    def __init__(
        self,
        pool: BlockPool,
        max_batch_tokens: int,
        *,
        choose: Callable[[Group], Way] = recompute,
        pace: Callable[[int], int] | None = None,
        batching: Literal["continuous", "static"] = "continuous",
        reserve: int = 0,
        watermark: float = 0.01,
        window: int = 0,
    ) -> None:
        """`max_batch_tokens`: tokens of one step over all sequences, and sequences that run. `watermark`: share of the pool that admissions leave free.
        `pace`: tokens of prompts in a step that takes so many rows of answers, above 0 (None: what is left of the step's tokens).
        `window`: places that a sequence has at most; who commits so many must evict (0: no limit)."""
        self.window = window
        self.pool, self.max_batch_tokens, self.choose, self.pace = pool, max_batch_tokens, choose, pace
        self.batching, self.reserve, self.watermark = batching, reserve, int(watermark * pool.total)
        self.waiting: list[Group] = []  # all three in order, first first
        self.running: list[Group] = []
        self.swapped: list[Group] = []
        self.preempted: dict[Way, int] = {"swap": 0, "recompute": 0}
        self.hits = self.queries = 0  # tokens of prompts that were found, and looked for
        self.moves = Moves()  # to be executed, then replaced, before what schedule() has given runs
        self._seqs: dict[int, Seq] = {}
        self._arrivals = 0
        self._seats = 0  # sequences that run, or will when their group forks

    def most(self, prompt: int, tokens: int, width: int) -> int:
        """Blocks that a group can need: a prompt, and `tokens` of cache for each of `width` sequences, whose full prompt blocks are shared."""
        shared = prompt // BLOCK if width > 1 else 0
        return shared + width * (blocks_for(max(tokens, self.reserve)) - shared)

    def add(self, id: int, seq: int, tokens: list[int], most: int, *, width: int = 1, priority: int = 0, scores: bool = False, salt: bytes = b"",
            shares: bool = True, reserve: int | None = None, adapter: Adapter | None = None) -> Group:  # fmt: skip
        """Queue a group with its first sequence, whose tokens are the prompt. The list is the scheduler's from now on. reserve: None = as all."""
        assert most <= self.pool.total, f"group {id} can never fit: the engine refuses it before"
        assert width <= self.max_batch_tokens, f"group {id} has more sequences than a step has tokens: the engine refuses it before"
        group = Group(id, len(tokens), width, most, (priority, self._arrivals), scores, shares)
        group.reserve, group.adapter = self.reserve if reserve is None else reserve, adapter
        self._arrivals += 1
        group.seqs.append(Seq(seq, group, tokens, Table(salt)))
        self._seqs[seq] = group.seqs[0]
        insort(self.waiting, group, key=_order)
        return group

    def schedule(self) -> list[Chunk]:
        """The chunks of the next step, and its `moves`. Until `commit`, what a step writes does not count."""
        assert not self.moves, "the moves of the last step have not been executed"
        before = sum(self.preempted.values())
        self._make_way()
        shares, budget = self._shares()
        roomy = self._room(self.running, shares)
        if not roomy and self._drop_drafts():
            shares, budget = self._shares()
        chunks: list[Chunk] = []
        at = 0
        while at < len(self.running):
            group = self.running[at]
            while at < len(self.running) and not roomy and not self._room([group], shares):
                self._preempt(self.running[-1])  # never one that has grown in this step: those come before
            if at < len(self.running):
                self._grow(group, shares, chunks)
                at += 1
        if sum(self.preempted.values()) == before and not (self.batching == "static" and self.running):
            self._admit(budget, chunks)
        return chunks

    def commit(self, chunk: Chunk, new: Sequence[int] = ()) -> None:
        """The chunk is in the cache. `new`: the tokens that follow what was known: the accepted beginning of the draft, and one more."""
        seq = self._seqs[chunk.id]
        assert len(new) <= chunk.draft + 1, f"{len(new)} new tokens where {chunk.draft} were guessed"
        seq.tokens.extend(new)
        seq.draft = []
        length = chunk.stop - chunk.draft + max(0, len(new) - 1)
        if seq.group.shares:
            self.pool.commit(seq.table, seq.tokens, length)
        else:
            seq.table.length = length
        self._unpark(seq.group)

    def fork(self, seq: int, other: int, token: int) -> None:
        """Another sequence of the group: all that the first has in the cache, and one token more that is known."""
        parent = self._seqs[seq]
        child = Seq(other, parent.group, [*parent.tokens[: parent.table.length], token], self.pool.fork(parent.table))
        parent.group.seqs.append(child)
        self._seqs[other] = child

    def extend(self, seq: int, token: int) -> None:
        """One token more is known of a sequence that was committed without one."""
        self._seqs[seq].tokens.append(token)

    def finish(self, seq: int) -> None:
        """Forget a sequence, wherever it is; its blocks are free at once."""
        gone = self._seqs.pop(seq)
        group = gone.group
        group.seqs.remove(gone)
        self.pool.free(gone.table)
        if not group.seqs:
            if group in self.running:
                self._seats -= group.width
            for queue in (self.running, self.waiting, self.swapped):
                if group in queue:
                    queue.remove(group)
        elif all(other.parked for other in group.seqs):
            group.seqs[0].parked = False

    def find(self, seq: int) -> Seq:
        """A sequence by its id."""
        return self._seqs[seq]

    def _shares(self) -> tuple[dict[int, int], int]:
        """Tokens of each running sequence in the next step, and what is left: one each, then drafts, then prompts in order."""
        budget, shares = self.max_batch_tokens, {}
        guessed, prompts = [], []
        for group in self.running:
            for seq in group.seqs:
                missing = seq.missing
                if missing > 1:
                    prompts.append(seq)
                elif missing and not seq.parked:  # 0: a beam that waits for the others of its gang
                    shares[seq.id] = 1
                    budget -= 1
                    if seq.draft:
                        guessed.append(seq)
        for seq in guessed:
            extra = min(len(seq.draft), budget)
            shares[seq.id] += extra
            budget -= extra
        if shares and self.pace:  # somebody waits for this step
            budget = min(budget, self.pace(self.max_batch_tokens - budget))
        for seq in prompts:
            if not seq.parked and (count := self._part(seq, budget)):
                shares[seq.id] = count
                budget -= count
        return shares, budget

    def _room(self, groups: Sequence[Group], shares: dict[int, int]) -> bool:
        """Whether there are blocks for what these groups write."""
        writes = [(seq.table, self._goal(seq, shares[seq.id])) for group in groups for seq in group.seqs if seq.id in shares]
        return self.pool.needs(writes) <= self.pool.free_count

    def _drop_drafts(self) -> bool:
        """Give up all guesses, since blocks are short: nobody is preempted for them. Whether there were any."""
        guessed = [seq for group in self.running for seq in group.seqs if seq.draft]
        for seq in guessed:
            seq.draft = []
        return bool(guessed)

    def _part(self, seq: Seq, budget: int) -> int:
        """Tokens of a prompt in one step."""
        asked = seq.group.scores and seq.gone + seq.table.length < seq.group.prompt
        return min(seq.missing, budget, SCORED if asked else budget, self.window - seq.table.length if self.window else budget)

    def _goal(self, seq: Seq, count: int) -> int:
        """Tokens for which a sequence must have blocks when it runs `count` more."""
        goal = max(seq.table.length + count, seq.group.reserve)
        return min(goal, self.window) if self.window else goal

    def _grow(self, group: Group, shares: dict[int, int], chunks: list[Chunk]) -> int:
        """Blocks and chunks of a group that runs; the tokens it takes."""
        taken = 0
        for seq in group.seqs:
            count = shares.get(seq.id)
            if not count:
                continue
            table, start, gone = seq.table, seq.table.length, seq.gone
            stop, known = start + count, len(seq.tokens) - gone
            self.moves.copies += self.pool.grow(table, self._goal(seq, count))
            draft, samples = max(0, stop - known), stop >= known
            ids = seq.tokens[start + gone : stop + gone] + seq.draft[:draft] if draft else seq.tokens[start + gone : stop + gone]
            asked = group.scores and start + gone < group.prompt
            prompt = max(0, min(stop, group.prompt - gone) - start)
            wants = count if asked else samples * (1 + draft)
            chunks.append(Chunk(seq.id, start, stop, samples, table.blocks, wants, ids, prompt, draft, gone, group.adapter))
            taken += count
        return taken

    def _admit(self, budget: int, chunks: list[Chunk]) -> None:
        """Groups that were swapped out and those that wait, in order, until one does not fit."""
        while budget > 0 and (head := self._head()) is not None and self._fits(head):
            self._seats += head.width
            insort(self.running, head, key=_order)
            if self.swapped and head is self.swapped[0]:
                self.moves.back += self.pool.swap_in(self.swapped.pop(0).tables)  # it goes on in the next step, as one that runs
                continue
            self.waiting.pop(0)
            seq = self._first(head)
            found = self.pool.find(self._keys(seq))
            self.pool.adopt(seq.table, found)
            if not head.admitted:
                head.admitted, head.cached = True, len(found) * BLOCK
                self.hits += head.cached
                self.queries += head.prompt
            self._unpark(head)
            budget -= self._grow(head, {seq.id: self._part(seq, budget)}, chunks)

    def _head(self) -> Group | None:
        heads = [queue[0] for queue in (self.swapped, self.waiting) if queue]
        return min(heads, key=_order) if heads else None

    def _fits(self, group: Group) -> bool:
        """Whether a group that has no blocks in the pool can have them now."""
        if self._seats + group.width > self.max_batch_tokens:
            return False
        free = self.pool.free_count - (self.watermark if self.running else 0)
        if self.swapped and group is self.swapped[0]:
            return not self.running or len(self.pool.committed(group.tables)) + len(group.seqs) <= free
        seq = self._first(group)
        found = self.pool.find(self._keys(seq))
        return blocks_for(self._goal(seq, seq.missing)) - len(found) + self.pool.unheld(found) <= free

    def _keys(self, seq: Seq) -> list[bytes]:
        """Digests of the blocks that may be found: all but the last token, whose logits are needed. None where all logits are."""
        group = seq.group
        if not self.pool.sharing or not group.shares or group.scores:
            return []
        return self.pool.keys(seq.table, seq.tokens, (len(seq.tokens) - 1) // BLOCK)

    def _make_way(self) -> None:
        """Groups of a lower class (a higher number) give way to one that waits and does not fit."""
        while self.running and (head := self._head()) and self.running[-1].order[0] > head.order[0] and not self._fits(head):
            self._preempt(self.running[-1])

    def _preempt(self, group: Group) -> None:
        """Take all blocks of a running group. Its sequences go on later from where they were."""
        self.running.remove(group)
        self._seats -= group.width
        blocks = len(self.pool.committed(group.tables))
        way = self.choose(group) if blocks else "recompute"
        if way == "swap" and blocks > self.pool.swap_free:
            way = "recompute"
        self.preempted[way] += 1
        for seq in group.seqs:
            seq.draft = []
        if way == "swap":
            self.moves.out += self.pool.swap_out(group.tables)
            insort(self.swapped, group, key=_order)
            return
        for seq in group.seqs:
            self.pool.free(seq.table)
            seq.parked, seq.gone = seq is not group.seqs[0], 0
        insort(self.waiting, group, key=_order)

    def _first(self, group: Group) -> Seq:
        return next(seq for seq in group.seqs if not seq.parked)

    def _unpark(self, group: Group) -> None:
        """Sequences that wait for the shared prompt go on from it as soon as it is in the cache."""
        if len(group.seqs) == 1 or not any(seq.parked for seq in group.seqs):
            return
        shared, first = group.prompt // BLOCK * BLOCK, self._first(group)
        if first.table.length >= shared:
            for seq in group.seqs:
                if seq.parked:
                    seq.table, seq.parked = self.pool.fork(first.table, shared), False


def _order(group: Group) -> tuple[int, int]:
    return group.order
