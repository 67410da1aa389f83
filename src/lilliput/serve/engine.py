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
from collections import deque
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from lilliput.base import hardware, registry
from lilliput.base.errors import DoesNotFit, UserError
from lilliput.base.protocols import Runner
from lilliput.data.tokenizer import Tokenizer
from lilliput.models.native import NativeDecoder
from lilliput.ops import sampling as ops
from lilliput.serve.answer import Answer, Request, bad_word_ids, score_prompt
from lilliput.serve.blocks import BLOCK, BlockPool, blocks_for
from lilliput.serve.request import Completion, Delta, FinishReason, Sampling, collect
from lilliput.serve.runners.eager import Eager
from lilliput.serve.runners.native import Native
from lilliput.serve.scheduler import Chunk, Scheduler
from lilliput.serve.stats import Counts, Stats

if TYPE_CHECKING:
    from torch import Tensor

    from lilliput.models.decoder import Decoder


class Engine:
    """One model, its cache, and the requests that share them."""

    def __init__(
        self,
        model: Decoder | NativeDecoder,
        tokenizer: Tokenizer,
        *,
        kv_tokens: int | None = None,
        max_batch_tokens: int = 512,
        policy: str = registry.names("kv_policy")[0],
        kv: str = "fp32",
    ) -> None:
        """`kv_tokens`: tokens of cache over all requests (None: four full contexts, or what a quarter of the free memory holds).
        `max_batch_tokens`: tokens of one step. `policy`: a registered cache policy. `kv`: how a native model's cache is stored."""
        self.model, self.tokenizer = model, tokenizer
        self.context = model.facts.context
        wanted = _affordable(model) if kv_tokens is None else kv_tokens
        for name, value in (("kv_tokens", wanted), ("max_batch_tokens", max_batch_tokens)):
            if value < 1:
                raise UserError(f"{name}={value} leaves no room for a token", fix=f"{name}=512")
        self.policy = registry.find("kv_policy", policy)()
        self.pool = BlockPool(blocks_for(wanted))
        self.scheduler = Scheduler(self.pool, max_batch_tokens)
        self.runner: Runner = Native(model, self.pool.total, kv) if isinstance(model, NativeDecoder) else Eager(model, self.pool.total)
        self.counts = Counts()
        self._eos = frozenset((*tokenizer.eos_ids, *model.spec.eos_ids))
        self._requests: dict[int, Request] = {}
        self._answers: dict[int, Answer] = {}  # by sequence
        self._ids, self._sequences = itertools.count(), itertools.count()
        self._notes: list[Delta] = []  # deltas for the next step() to give
        self._inboxes: dict[int, deque[Delta]] = {}  # of requests that stream() or generate() drives

    @property
    def kv_tokens(self) -> int:
        """Tokens of cache over all requests."""
        return self.pool.total * BLOCK

    @property
    def busy(self) -> bool:
        """Whether step() has something to do or to say."""
        return bool(self._requests or self._notes)

    def request(self, prompt_ids: Sequence[int], sampling: Sampling | None = None) -> Request:
        """A request that `submit` takes. UserError for a prompt that is empty, beyond the context or beyond the cache, and for ids beyond the
        vocabulary. Changes nothing, so any thread may call it."""
        prompt, how = list(prompt_ids), sampling or Sampling()
        if not prompt:
            raise UserError("the prompt has no tokens", why="the model needs at least one to go on from", fix="give some text")
        vocab = self.model.facts.vocab
        for ids in (prompt, how.logit_bias, how.stop_ids):
            if ids and not 0 <= min(ids) <= max(ids) < vocab:
                stranger = min(ids) if min(ids) < 0 else max(ids)
                raise UserError(f"token id {stranger} is not in the vocabulary", f"ids go from 0 to {vocab - 1}", "use the model's own tokenizer")
        if len(prompt) >= self.context:
            why = f"{len(prompt):,} tokens of prompt, {self.context:,} tokens of context, and the answer needs at least one"
            raise UserError("the prompt is longer than the model's context", why, f"shorten the prompt by {len(prompt) - self.context + 1:,} tokens or more")
        limit = min(how.max_tokens, self.context - len(prompt))
        reserve = self.policy.budget(len(prompt), limit)
        if blocks_for(reserve) > self.pool.total:
            why = f"{len(prompt):,} tokens of prompt and {limit:,} of answer need {reserve:,} tokens of cache, it has {self.kv_tokens:,}"
            room = self.kv_tokens - len(prompt)
            fix = f"kv_tokens={blocks_for(reserve) * BLOCK}" + (f" or max_tokens={room}" if room > 0 else "")
            raise DoesNotFit("the request does not fit into the cache", why, fix)
        bad = bad_word_ids(how.bad_words, self.tokenizer)
        return Request(next(self._ids), prompt, how, limit, self._eos, lambda: self.tokenizer.stream(prompt), bad)

    def submit(self, request: Request) -> int:
        """Queue a request; its id."""
        self._requests[request.id] = request
        for index in range(request.sampling.width):
            answer = Answer(next(self._sequences), request, index)
            request.answers.append(answer)
            self._answers[answer.id] = answer
            reserve = self.policy.budget(len(request.prompt), request.limit)
            self.scheduler.add(answer.id, len(request.prompt), reserve, scores=request.scored is not None)
        return request.id

    def add(self, prompt_ids: Sequence[int], sampling: Sampling | None = None) -> int:
        """request() and submit()."""
        return self.submit(self.request(prompt_ids, sampling))

    def cancel(self, id: int) -> bool:
        """Stop a request; its blocks are free at once, and the next step gives its last deltas. False when it had ended before."""
        return self._break(id, "cancelled", "")

    def step(self) -> list[Delta]:
        """Schedule, forward, sample, commit; what became known, except for requests that stream() or generate() drives."""
        chunks = self.scheduler.schedule()
        deltas: list[Delta] = []
        if chunks:
            start = time.perf_counter()
            logits_NV = self.runner.forward([(chunk, self._answers[chunk.id].known(chunk.start, chunk.stop)) for chunk in chunks])
            choices = self._sample(chunks, logits_NV)
            for chunk in chunks:
                self._commit(chunk, choices.get(chunk.id), deltas)
            self.counts.step(chunks, time.perf_counter() - start)
        deltas, self._notes = self._notes + deltas, []
        return deltas

    def stats(self) -> Stats:
        """What the engine holds and has done, now."""
        scheduler, pool = self.scheduler, self.pool
        return self.counts.snapshot(len(scheduler.running), len(scheduler.waiting), pool.total - pool.free_count, pool.total)

    def fail(self, message: str) -> None:
        """End every running request with an error: the step they shared broke off. All requests, when none runs."""
        for id in {self._answers[seq.id].request.id for seq in self.scheduler.running} or list(self._requests):
            self._break(id, "error", message)

    def stream(self, prompt_ids: Sequence[int], sampling: Sampling | None = None) -> Iterator[Delta]:
        """Give the deltas of one request as they come; closing the iterator stops the request. Others run in the same steps.
        UserError when an answer ends with an error."""
        id = self._open(prompt_ids, sampling)
        try:
            for delta in self._drive(id):
                if delta.finish_reason == "error":
                    raise UserError("the answer broke off", delta.message, "see the reason")
                yield delta
        finally:
            self._close(id)

    def generate(self, prompts: Sequence[str | Sequence[int]], sampling: Sampling | None = None) -> list[Completion]:
        """Answer several prompts (ids, or text to go on from) in one batch: `n` completions for each, in their order."""
        ids: list[int] = []
        done: list[Completion] = []
        count = 1 if sampling is None else sampling.n
        try:
            for prompt in prompts:
                ids.append(self._open(self.tokenizer.encode(prompt, special=True) if isinstance(prompt, str) else prompt, sampling))
            for id in ids:
                deltas = list(self._drive(id))
                done += [collect([delta for delta in deltas if delta.index == index]) for index in range(count)]
            return done
        finally:
            for id in ids:
                self._close(id)

    def _sample(self, chunks: list[Chunk], logits_NV: Tensor) -> dict[int, ops.Choice | str]:
        """Sequence -> what was chosen, or why nothing could be. Prompt tokens are scored where that is asked for."""
        rows, draws, sampled, row, vocab, top = [], [], [], 0, logits_NV.shape[1], 0
        choices: dict[int, ops.Choice | str] = {}
        for chunk in chunks:
            answer = self._answers[chunk.id]
            if chunk.wants > 1 or (chunk.wants and not chunk.samples):
                score_prompt(answer.request, chunk.start, logits_NV[row : row + chunk.wants])
            row += chunk.wants
            if not chunk.samples:
                continue
            try:
                draws.append(answer.draw(chunk.stop, vocab))
            except Exception as fault:
                choices[chunk.id] = f"the guide failed: {fault}"
                continue
            rows.append(row - 1)
            sampled.append(chunk)
            top = max(top, answer.request.sampling.logprobs or 0)
        picked = logits_NV if len(rows) == len(logits_NV) else logits_NV[rows]
        for chunk, choice in zip(sampled, ops.choose_rows(picked, draws, min(top, vocab)) if draws else ()):
            if choice.token >= 0:
                choices[chunk.id] = choice
            elif math.isfinite(choice.total):
                choices[chunk.id] = "no token may come next: guide, biases and bad words forbid all"
            else:
                choices[chunk.id] = f"the model answers with numbers that are not finite: the logits of token {chunk.stop} sum to {choice.total}"
        return choices

    def _commit(self, chunk: Chunk, choice: ops.Choice | str | None, deltas: list[Delta]) -> None:
        self.scheduler.commit(chunk, sampled=isinstance(choice, ops.Choice))
        if choice is None:
            return
        answer = self._answers[chunk.id]
        if isinstance(choice, str):
            delta = answer.broken("error", choice)
        else:
            try:
                delta = answer.append(choice.token, choice.logprob, choice.top[: answer.request.sampling.logprobs or 0])
            except Exception as fault:
                delta = answer.broken("error", f"the guide failed: {fault}")
        if delta.finish_reason:
            self._finish(answer)
        self._give(delta, deltas)

    def _give(self, delta: Delta, others: list[Delta]) -> None:
        """Hand a delta to whoever reads the request; with best_of, only when all answers have ended, and of the likeliest alone."""
        request = self._requests[delta.id]
        ready = request.held(delta)
        inbox = self._inboxes.get(delta.id, others)
        inbox.extend(ready)
        if delta.finish_reason and not request.answers:
            self._requests.pop(delta.id, None)

    def _finish(self, answer: Answer) -> None:
        self.scheduler.finish(answer.id)
        del self._answers[answer.id]
        answer.request.answers.remove(answer)

    def _break(self, id: int, reason: FinishReason, message: str) -> bool:
        request = self._requests.get(id)
        if request is None:
            return False
        for answer in list(request.answers):
            self._finish(answer)
            self._give(answer.broken(reason, message), self._notes)
        return True

    def _open(self, prompt_ids: Sequence[int], sampling: Sampling | None) -> int:
        request = self.request(prompt_ids, sampling)
        self._inboxes[request.id] = deque()
        return self.submit(request)

    def _drive(self, id: int) -> Iterator[Delta]:
        """Step until the request has ended; what steps give for requests of others is kept for the next step()."""
        inbox = self._inboxes[id]
        while inbox or id in self._requests:
            while not inbox:
                kept = self.step()
                self._notes = kept + self._notes
            yield inbox.popleft()

    def _close(self, id: int) -> None:
        del self._inboxes[id]
        for answer in list(self._requests[id].answers) if id in self._requests else ():
            self._finish(answer)
        self._requests.pop(id, None)


def _affordable(model: Decoder | NativeDecoder) -> int:
    """Tokens of cache where nobody says how many: four contexts, at most a quarter of the free memory, at least a block."""
    kv = model.facts.kv
    assert kv is not None, "a decoder states the shape of its keys and values"
    if model.device.type == "cuda":
        import torch

        assert not isinstance(model, NativeDecoder), "native models run on CPUs"
        free, element = torch.cuda.mem_get_info(model.device)[0], next(model.parameters()).element_size()
    else:
        free, element = hardware.memory()[1], 4
    return max(BLOCK, min(4 * model.facts.context, free // 4 // kv.bytes_per_token(element)))
