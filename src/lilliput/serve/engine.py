"""Engine: the one loop that turns requests into tokens. A step is schedule, forward, sample, commit.

    scheduler   which tokens run (plain integers)          runner    logits of the sampled rows
    blocks      where keys and values lie                  policy    how many tokens of cache a request needs
    request     what is asked, and the text that comes out

Requests join and leave at every step (continuous batching). A step that is broken off before its commit leaves nothing
half-done: what it wrote lies beyond the committed tokens and is written again.

Greedy answers equal the model's own forward. The same seed gives the same tokens in any batch: on the native runner bit
for bit, on the eager one up to the rounding of its matrix products (about 1e-5 of a logit). Not thread-safe: one owner.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from lilliput.base import registry
from lilliput.base.errors import UserError
from lilliput.base.protocols import KVPolicy, Runner
from lilliput.data.tokenizer import Tokenizer
from lilliput.ops import sampling as ops
from lilliput.serve.adapters import Adapter, Adapters, names, together
from lilliput.serve.admission import Door, affordable, context_of
from lilliput.serve.answer import Answer, Request, bad_word_ids, score_prompt, spoken
from lilliput.serve.beams import Beam, Search
from lilliput.serve.blocks import BLOCK, BlockPool, blocks_for
from lilliput.serve.callers import Callers
from lilliput.serve.costs import Costs
from lilliput.serve.request import Completion, Delta, FinishReason, Sampling
from lilliput.serve.retention import Retention
from lilliput.serve.runners import runner_of
from lilliput.serve.runners.mover import Swap
from lilliput.serve.scheduler import Chunk, Moves, Scheduler, Seq
from lilliput.serve.speculative import Place, Speculation, matched
from lilliput.serve.stats import Counts, Stats

if TYPE_CHECKING:
    from torch import Tensor

    from lilliput.models.decoder import Decoder
    from lilliput.models.native import NativeDecoder


class Engine:
    """One model, its cache, and the requests that share them."""

    def __init__(
        self,
        model: Decoder | NativeDecoder,
        tokenizer: Tokenizer,
        *,
        context: int = 0,
        kv_tokens: int | None = None,
        max_batch_tokens: int = 512,
        policy: str = registry.names("kv_policy")[0],
        kv: str = "fp32",
        sharing: bool = True,
        preemption: Literal["auto", "swap", "recompute"] = "auto",
        swap_tokens: int = 0,
        swap_file_tokens: int = 0,
        swap_folder: str = "",
        scheduling: Literal["fcfs", "priority"] = "fcfs",
        batching: Literal["continuous", "static"] = "continuous",
        reserve: int = 0,
        draft: str | Decoder | NativeDecoder = "",
        guesses: int = 8,
        max_adapters: int = 16,
        step_ms: float = 0.0,
    ) -> None:
        """`context`: tokens of one request (0: the model's context). `kv_tokens`: tokens of cache over all requests (None: four full
        contexts, or what a quarter of the free memory holds).
        `max_batch_tokens`: tokens of one step, and sequences that run at once. `policy`: a registered cache policy. `kv`: how a native
        model's cache is stored. `sharing`: prompts with the same beginning compute it once. `preemption`, `swap_tokens` (0 = none, so that
        preempted answers are computed again), `swap_file_tokens` more in a file in `swap_folder`, `batching`, `reserve`: serve/scheduler.py.
        `draft`: a drafter ("name:argument", "" = none) or a model that guesses, at most `guesses` tokens a step: serve/speculative.py.
        `max_adapters`: loaded at once, serve/adapters.py. `step_ms`: so long a step with answers should take at most (0: any time)."""
        self.model, self.tokenizer = model, tokenizer
        self.context, self.priorities = context_of(context, model.facts.context), scheduling == "priority"
        wanted = affordable(model, self.context) if kv_tokens is None else kv_tokens
        for name, value in (("kv_tokens", wanted), ("max_batch_tokens", max_batch_tokens)):
            if value < 1:
                raise UserError(f"{name}={value} leaves no room for a token", fix=f"{name}=512")
        swap = Swap(swap_tokens // BLOCK, swap_file_tokens // BLOCK, swap_folder)
        if preemption == "swap" and not swap.total:
            raise UserError("preemption=swap has no swap space", f"swap_tokens={swap_tokens}, a block holds {BLOCK}", f"swap_tokens={wanted}")
        self.policy: KVPolicy = registry.made("kv_policy", policy)
        if self.policy.evicts and draft:
            raise UserError(f"policy={policy} and draft={draft} cannot stand together", "what was guessed wrongly would count as attention", "draft=")
        self.pool = BlockPool(blocks_for(wanted), sharing=sharing and not self.policy.evicts, swap=swap.total)
        blocks = self.pool.total
        self.runner: Runner = runner_of(model, blocks, kv, swap)
        self.adapters = Adapters(model.spec, self.runner.lower, max_adapters)
        self.guesses = Speculation(draft, guesses, Place(model, self.runner, blocks, kv, self.context)) if draft else None
        self.costs = Costs(self.pool, self.runner, preemption, swap.host, step_ms / 1000)
        self.scheduler = Scheduler(self.pool, max_batch_tokens, choose=self.costs.choose, pace=self.costs.pace if step_ms else None,
                                   batching=batching, reserve=reserve, window=self.policy.size)  # fmt: skip
        self.retention = Retention(self.policy, self.runner, self.pool) if self.policy.evicts else None
        self.door = Door(model.facts.vocab, self.context, self.policy, self.scheduler)
        self.counts = Counts()
        self._eos = frozenset((*tokenizer.eos_ids, *model.spec.eos_ids))
        self._requests: dict[int, Request] = {}
        self._answers: dict[int, Answer] = {}  # by sequence
        self._ids, self._sequences = itertools.count(), itertools.count()
        self._notes: list[Delta] = []  # deltas for the next step() to give
        self._callers = Callers(self)

    @property
    def kv_tokens(self) -> int:
        """Tokens of cache over all requests."""
        return self.pool.total * BLOCK

    @property
    def busy(self) -> bool:
        """Whether step() has something to do or to say."""
        return bool(self._requests or self._notes)

    def request(self, prompt_ids: Sequence[int], sampling: Sampling | Beam | None = None) -> Request:
        """A request that `submit` takes. UserError and DoesNotFit for one that can never run. Changes nothing, so any thread may call it."""
        prompt, how = list(prompt_ids), sampling.sampling if isinstance(sampling, Beam) else sampling or Sampling()
        limit = self.door.limit(prompt, how)
        bad = bad_word_ids(how.bad_words, self.tokenizer)
        adapter = self.adapters.find(how.adapter)
        made = Request(next(self._ids), prompt, how, limit, self._eos, lambda: self.tokenizer.stream(prompt, how.skip_special), bad, adapter=adapter)
        made.search = Search(sampling, limit, made.ends, self.door.vocab) if isinstance(sampling, Beam) else None
        return made

    def submit(self, request: Request) -> int:
        """Queue a request; its id."""
        how, prompt = request.sampling, request.prompt
        self._requests[request.id] = request
        request.answers = [Answer(next(self._sequences), request, index) for index in range(1 if request.search else how.width)]
        self._answers |= {answer.id: answer for answer in request.answers}
        request.unborn = request.answers[1:]
        if request.search is not None:
            request.search.begin(request.answers[0].id)
        most = self.door.most(len(prompt), request.limit, how.width)
        self.scheduler.add(request.id, request.answers[0].id, list(prompt), most, width=how.width, priority=how.priority if self.priorities else 0,
                           scores=request.scored is not None, shares=not self.policy.evicts,
                           salt=request.adapter.salt if request.adapter else b"", adapter=request.adapter)  # fmt: skip
        return request.id

    def add(self, prompt_ids: Sequence[int], sampling: Sampling | Beam | None = None) -> int:
        """request() and submit()."""
        return self.submit(self.request(prompt_ids, sampling))

    def load(self, adapter: Adapter, replace: bool = False) -> None:
        """Serve an adapter that `adapters.read` has made. `replace`: one of its name makes way, and requests that run under it end with it."""
        self._forget(self.adapters.put(adapter, replace))

    def unload(self, name: str) -> None:
        """Take no more requests for an adapter. UserError where it is not loaded."""
        self._forget(self.adapters.remove(name))

    def cancel(self, id: int) -> bool:
        """Stop a request; its blocks are free at once, and the next step gives its last deltas. False when it had ended before."""
        return self._break(id, "cancelled", "")

    def step(self) -> list[Delta]:
        """Schedule, forward, sample, commit; what became known, except for requests that stream() or generate() drives."""
        start = time.perf_counter()
        self._move()  # what a step that broke off has left
        if self.guesses:
            self.guesses.plan(self.scheduler.running, bool(self.scheduler.waiting), self._room)
        chunks = together(self.scheduler.schedule())
        self._move()
        deltas: list[Delta] = []
        if chunks:
            if self.guesses:
                self.guesses.fill(chunks, lambda id, position: self._answers[id].draw(position, self.model.facts.vocab))
            self._begin(chunks, start)
            mass = self.retention.room(chunks) if self.retention else None
            logits_NV = self.runner.forward(chunks, mass)
            choices = self._sample(chunks, logits_NV)
            new = [self._commit(chunk, choices, deltas) for chunk in chunks]
            seconds = time.perf_counter() - start
            self.counts.step(chunks, new, seconds)
            if self.retention:
                self.retention.ended(chunks, mass, [self.scheduler.find(chunk.id) if chunk.id in self._answers else None for chunk in chunks])
            rows = sum([chunk.stop - chunk.start for chunk in chunks])
            if self.guesses:
                self.guesses.took(chunks, new, rows, seconds)
            self.costs.step(rows, seconds)
        deltas, self._notes = self._notes + deltas, []
        return deltas

    def stats(self) -> Stats:
        """What the engine holds and has done, now."""
        scheduler, pool = self.scheduler, self.pool
        waits = [group for queue in (scheduler.waiting, scheduler.swapped) for group in queue]
        running, waiting = (sum(len(group.seqs) for group in groups) for groups in (scheduler.running, waits))
        counts = replace(self.counts, prefix_queries=scheduler.queries, prefix_hits=scheduler.hits, preempted_swap=scheduler.preempted["swap"],
                         preempted_recompute=scheduler.preempted["recompute"])  # fmt: skip
        return counts.snapshot(running, waiting, pool.total - pool.free_count, pool.total, (names(scheduler.running), names(waits)))

    def fail(self, message: str) -> None:
        """End every running request with an error: the step they shared broke off. All requests, when none runs."""
        for id in [group.id for group in self.scheduler.running] or list(self._requests):
            self._break(id, "error", message)

    def stream(self, prompt_ids: Sequence[int], sampling: Sampling | Beam | None = None) -> Iterator[Delta]:
        """Give the deltas of one request as they come; closing the iterator stops the request. Others run in the same steps.
        UserError when an answer ends with an error."""
        return self._callers.stream(prompt_ids, sampling)

    def generate(self, prompts: Sequence[str | Sequence[int]], sampling: Sampling | Beam | None = None) -> list[Completion]:
        """Answer several prompts (ids, or text to go on from) in one batch: `n` completions for each, in their order; of a beam the best first."""
        return self._callers.generate(prompts, sampling)

    def holds(self, id: int) -> bool:
        """Whether a request has not ended."""
        return id in self._requests

    def drop(self, id: int) -> None:
        """Forget a request without a word; nothing where it has ended."""
        for answer in list(self._requests[id].answers) if id in self._requests else ():
            self._finish(answer)
        self._requests.pop(id, None)

    def later(self, deltas: list[Delta]) -> None:
        """Deltas that the next step() gives first."""
        self._notes = deltas + self._notes

    def _forget(self, adapter: Adapter | None) -> None:
        if adapter is not None:
            self.pool.forget(adapter.salt)

    def _move(self) -> None:
        if self.scheduler.moves:
            self.runner.move(self.scheduler.moves)
            self.scheduler.moves = Moves()

    def _begin(self, chunks: list[Chunk], now: float) -> None:
        """Requests of which nothing had been computed wait no longer."""
        for chunk in chunks:
            request = self._answers[chunk.id].request
            request.begun = request.begun or now

    def _room(self, seq: Seq) -> int:
        """Tokens that a sequence may have after its next; 0 where it is not to be guessed for."""
        answer = self._answers[seq.id]
        request = answer.request
        return 0 if request.looks_back or request.search is not None else request.limit - len(answer.tokens) - 1

    def _sample(self, chunks: list[Chunk], logits_NV: Tensor) -> dict[int, list[ops.Choice | str]]:
        """Sequence -> what was chosen, or why nothing could be: one token, and one more after each guess. Prompt tokens are scored where asked for."""
        rows: list[int] = []
        draws, drawn, row, vocab, top = [], [], 0, logits_NV.shape[1], 0
        choices: dict[int, list[ops.Choice | str]] = {}
        for chunk in chunks:
            first = self._answers[chunk.id]
            request = first.request
            if chunk.wants > chunk.samples + chunk.draft:
                score_prompt(request, chunk.start + chunk.gone, logits_NV[row : row + chunk.wants])
            row += chunk.wants
            if chunk.draft and self.guesses:
                how = [first.draw(chunk.stop - chunk.draft + i, vocab) for i in range(chunk.draft + 1)]
                judged = self.guesses.judge(chunk, how, logits_NV[row - chunk.draft - 1 : row])
                if judged is not None:
                    choices[chunk.id] = list(judged)
                    continue
                draws += how[:-1]
                rows += range(row - chunk.draft - 1, row - 1)
                drawn += [chunk.id] * chunk.draft
            for answer in (first, *request.unborn) if chunk.samples else ():
                try:
                    draws.append(answer.draw(chunk.stop + chunk.gone, vocab))
                except Exception as fault:  # the guide's own
                    choices[answer.id] = [f"the guide failed: {fault}"]
                    continue
                rows.append(row - 1)
                drawn.append(answer.id)
                top = max(top, request.sampling.logprobs or 0 if request.search is None else request.search.candidates)
        picked = logits_NV if len(rows) == row else logits_NV[rows]
        for id, choice in zip(drawn, ops.choose_rows(picked, draws, min(top, vocab)) if draws else ()):
            found = choices.setdefault(id, [])
            if choice.token >= 0:
                found.append(choice)
            elif math.isfinite(choice.total):
                found.append("no token may come next: guide, biases and bad words forbid all")
            else:
                found.append(f"the model answers with numbers that are not finite: its logits sum to {choice.total}")
        return choices

    def _commit(self, chunk: Chunk, choices: dict[int, list[ops.Choice | str]], deltas: list[Delta]) -> int:
        """The chunk is in the cache. What was chosen goes to its answer: the guesses that it agrees with, and one token more; after the prompt
        to all answers of the request. How many tokens the sequence has got."""
        first, found = self._answers.get(chunk.id), choices.get(chunk.id)
        if first is None:  # its request ended in this step: another of its beams broke
            return 0
        request = first.request
        if found is None or request.search is not None:
            self.scheduler.commit(chunk)
            return 0 if found is None or request.search is None else self._widen(request, request.search, chunk.id, found[0], deltas)
        if not first.tokens:
            request.cached = self.scheduler.find(chunk.id).group.cached
        guesses = chunk.ids[len(chunk.ids) - chunk.draft :] if chunk.draft else ()
        right = matched(guesses, [choice.token if isinstance(choice, ops.Choice) else -1 for choice in found]) if guesses else 0
        said: list[Delta] = []
        for choice in found[: right + 1]:
            said.append(self._append(first, choice))
            if said[-1].finish_reason:
                break
        self.scheduler.commit(chunk, [delta.token for delta in said if delta.token is not None])
        born, request.unborn = request.unborn, []
        for answer in born:
            other = choices[answer.id][0]
            self.scheduler.fork(chunk.id, answer.id, other.token if isinstance(other, ops.Choice) else 0)
        for answer, ones in ((first, said), *((answer, [self._append(answer, choices[answer.id][0])]) for answer in born)):
            if ones[-1].finish_reason:
                self._finish(answer)
            self._give(request, [one for delta in ones for one in request.held(delta)], deltas)
        return len(said)

    def _widen(self, request: Request, search: Search, seq: int, choice: ops.Choice | str, deltas: list[Delta]) -> int:
        """A beam has its likeliest continuations; when all have theirs, the search takes a step. How many tokens were chosen for the beam."""
        if isinstance(choice, str):
            self._break(request.id, "error", choice, deltas)
            return 0
        if not search.offer(seq, choice.top[: search.candidates]):
            return 1
        request.cached = self.scheduler.find(seq).group.cached
        step, born = search.step(), []
        for parent, token in step.fork:
            answer = Answer(next(self._sequences), request, 0)
            request.answers.append(answer)
            self._answers[answer.id] = answer
            self.scheduler.fork(parent, answer.id, token)
            born.append(answer.id)
        search.born(born)
        for parent, token in step.extend:
            self.scheduler.extend(parent, token)
        for old in step.finish:
            self._finish(self._answers[old])
        self.counts.generated += len(search.live) or request.sampling.n
        if search.done:
            self._give(request, spoken(request, search.finished), deltas)
        return 1

    def _append(self, answer: Answer, choice: ops.Choice | str) -> Delta:
        if isinstance(choice, str):
            return answer.broken("error", choice)
        self.counts.generated += 1
        try:
            return answer.append(choice.token, choice.logprob, choice.top[: answer.request.sampling.logprobs or 0])
        except Exception as fault:
            return answer.broken("error", f"the guide failed: {fault}")

    def _give(self, request: Request, deltas: list[Delta], others: list[Delta]) -> None:
        """Hand deltas to whoever reads the request, and forget it when it has ended."""
        self._callers.inboxes.get(request.id, others).extend(deltas)
        if not request.answers:
            del self._requests[request.id]

    def _finish(self, answer: Answer) -> None:
        request = answer.request
        if answer in request.unborn:
            request.unborn.remove(answer)
        else:
            self.scheduler.finish(answer.id)
            for part in (self.guesses, self.retention):
                if part:
                    part.forget(answer.id)
        del self._answers[answer.id]
        request.answers.remove(answer)

    def _break(self, id: int, reason: FinishReason, message: str, others: list[Delta] | None = None) -> bool:
        request = self._requests.get(id)
        if request is None:
            return False
        broken: list[Delta] = []
        for answer in list(request.answers):
            self._finish(answer)
            broken += request.held(answer.broken(reason, message))
        if request.search is not None:
            broken = [replace(broken[0], index=index) for index in range(request.sampling.n)]
        self._give(request, broken, self._notes if others is None else others)
        return True
