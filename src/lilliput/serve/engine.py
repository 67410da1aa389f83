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

from collections import deque
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from lilliput.base import hardware, registry
from lilliput.base.errors import DoesNotFit, UserError
from lilliput.base.protocols import Runner
from lilliput.data.tokenizer import Tokenizer
from lilliput.models.native import NativeDecoder
from lilliput.ops import sampling as ops
from lilliput.serve.blocks import BLOCK, BlockPool, blocks_for
from lilliput.serve.request import Completion, Delta, Request, Sampling
from lilliput.serve.runners.eager import Eager
from lilliput.serve.runners.native import Native
from lilliput.serve.scheduler import Chunk, Scheduler

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
        self._eos = frozenset((*tokenizer.eos_ids, *model.spec.eos_ids))
        self._requests: dict[int, Request] = {}
        self._next_id = 0
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

    def add(self, prompt_ids: Sequence[int], sampling: Sampling | None = None) -> int:
        """Queue a request; its id. UserError for a prompt that is empty, beyond the context or beyond the cache."""
        prompt, sampling = list(prompt_ids), sampling or Sampling()
        vocab = self.model.facts.vocab
        if not prompt:
            raise UserError("the prompt has no tokens", why="the model needs at least one to go on from", fix="give some text")
        if not 0 <= min(prompt) <= max(prompt) < vocab:
            stranger = min(prompt) if min(prompt) < 0 else max(prompt)
            raise UserError(f"token id {stranger} is not in the vocabulary", f"ids go from 0 to {vocab - 1}", "use the model's own tokenizer")
        if len(prompt) >= self.context:
            why = f"{len(prompt):,} tokens of prompt, {self.context:,} tokens of context, and the answer needs at least one"
            raise UserError("the prompt is longer than the model's context", why, f"shorten the prompt by {len(prompt) - self.context + 1:,} tokens or more")
        limit = min(sampling.max_tokens, self.context - len(prompt))
        reserve = self.policy.budget(len(prompt), limit)
        if blocks_for(reserve) > self.pool.total:
            why = f"{len(prompt):,} tokens of prompt and {limit:,} of answer need {reserve:,} tokens of cache, it has {self.kv_tokens:,}"
            room = self.kv_tokens - len(prompt)
            fix = f"kv_tokens={blocks_for(reserve) * BLOCK}" + (f" or max_tokens={room}" if room > 0 else "")
            raise DoesNotFit("the request does not fit into the cache", why, fix)
        request = Request(self._next_id, prompt, sampling, limit, self._eos, self.tokenizer.stream(prompt))
        self._next_id += 1
        self._requests[request.id] = request
        self.scheduler.add(request.id, len(prompt), reserve)
        return request.id

    def cancel(self, id: int) -> bool:
        """Stop a request; its blocks are free at once, and the next step gives its last delta. False when it had ended before."""
        if id not in self._requests:
            return False
        self._forget(id)
        self._deliver(Delta(id, None, "", "cancelled", None), self._notes)
        return True

    def step(self) -> list[Delta]:
        """Schedule, forward, sample, commit; what became known, except for requests that stream() or generate() drives."""
        deltas, self._notes = self._notes, []
        chunks = self.scheduler.schedule()
        if chunks:
            logits_NV = self.runner.forward([(chunk, self._requests[chunk.id].known(chunk.start, chunk.stop)) for chunk in chunks])
            sampled = [chunk for chunk in chunks if chunk.samples]
            choices = dict(zip((chunk.id for chunk in sampled), self._sample(sampled, logits_NV)))
            for chunk in chunks:
                self._commit(chunk, choices.get(chunk.id), deltas)
        return deltas

    def stream(self, prompt_ids: Sequence[int], sampling: Sampling | None = None) -> Iterator[Delta]:
        """Give the deltas of one request as they come; closing the iterator stops the request. Others run in the same steps."""
        id = self._open(prompt_ids, sampling)
        try:
            yield from self._drive(id)
        finally:
            self._close(id)

    def generate(self, prompts: Sequence[str | Sequence[int]], sampling: Sampling | None = None) -> list[Completion]:
        """Answer several prompts (ids, or text to go on from) in one batch, in their order."""
        ids: list[int] = []
        try:
            for prompt in prompts:
                ids.append(self._open(self.tokenizer.encode(prompt, special=True) if isinstance(prompt, str) else prompt, sampling))
            return [_collect(list(self._drive(id))) for id in ids]
        finally:
            for id in ids:
                self._close(id)

    def _sample(self, sampled: list[Chunk], logits_NV: Tensor) -> list[tuple[int, float]]:
        """(token, log probability) of each row. The random number's key is the token's position."""
        draws = []
        for chunk in sampled:
            request, how = self._requests[chunk.id], self._requests[chunk.id].sampling
            seen = request.prompt + request.tokens if how.repetition_penalty != 1 else ()
            u = ops.uniform(request.seed, chunk.stop) if how.temperature else 0.0
            draws.append(ops.Draw(u, how.temperature, how.top_k, how.top_p, how.min_p, how.repetition_penalty, seen=seen))
        choices = ops.choose_rows(logits_NV, draws)
        for chunk, choice in zip(sampled, choices):
            if choice.token < 0:
                why = f"the logits of token {chunk.stop} sum to {choice.total}"
                raise UserError("the model answers with numbers that are not finite", why, "check the model's weights")
        return [(choice.token, choice.logprob) for choice in choices]

    def _commit(self, chunk: Chunk, choice: tuple[int, float] | None, deltas: list[Delta]) -> None:
        self.scheduler.commit(chunk, sampled=choice is not None)
        if choice is None:
            return
        delta = self._requests[chunk.id].append(*choice)
        if delta.finish_reason:
            self._forget(chunk.id)
        self._deliver(delta, deltas)

    def _deliver(self, delta: Delta, others: list[Delta]) -> None:
        self._inboxes.get(delta.id, others).append(delta)

    def _forget(self, id: int) -> None:
        self.scheduler.finish(id)
        del self._requests[id]

    def _open(self, prompt_ids: Sequence[int], sampling: Sampling | None) -> int:
        id = self.add(prompt_ids, sampling)
        self._inboxes[id] = deque()
        return id

    def _drive(self, id: int) -> Iterator[Delta]:
        """Step until the request has ended; what steps give for requests of others is kept for the next step()."""
        inbox, reason = self._inboxes[id], None
        while not reason:
            while not inbox:
                kept = self.step()
                self._notes = kept + self._notes
            delta = inbox.popleft()
            reason = delta.finish_reason
            yield delta

    def _close(self, id: int) -> None:
        del self._inboxes[id]
        if id in self._requests:
            self._forget(id)


def _collect(deltas: list[Delta]) -> Completion:
    tokens = tuple(delta.token for delta in deltas if delta.token is not None)
    reason = deltas[-1].finish_reason
    assert reason is not None, "a request ends with a reason"
    return Completion(tokens, "".join(delta.text for delta in deltas), reason, tuple(delta.logprob for delta in deltas if delta.logprob is not None))


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
