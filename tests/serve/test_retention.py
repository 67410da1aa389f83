"""Cache policies in the engine: what stays, where it lies, what positions it has; against plain loops over a dense cache."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from served import engine_of, model_of, prompts_of
from torch import Tensor

from lilliput.base import registry
from lilliput.base.errors import UserError
from lilliput.models import rope
from lilliput.models.decoder import Decoder
from lilliput.models.native import NativeDecoder
from lilliput.ops import native
from lilliput.ops.paged import KvStore
from lilliput.serve.request import Sampling

needs_native = pytest.mark.skipif(native.module() is None, reason=str(native.missing()))
GREEDY = Sampling(60, ignore_eos=True)


def lowered(model: Decoder, on_read: bool = False) -> NativeDecoder:
    return NativeDecoder(model.spec, lambda name: model.get_parameter(name).detach(), weights="fp32", rotate_on_read=on_read)  # type: ignore[arg-type]


def native_engine(policy: str, family: str = "llama", **settings: Any) -> Any:
    on_read = registry.find("kv_policy", policy.partition(":")[0])(policy.partition(":")[2]).positions == "in_cache"
    return engine_of(lowered(model_of(family), on_read), policy=policy, **settings)  # type: ignore[arg-type]


class Dense:
    """One sequence on the eager model with a cache of loose tokens: keys before RoPE, values, mass and positions a layer and head."""

    def __init__(self, model: Decoder, policy: Any) -> None:
        self.model, self.policy, kv = model, policy, model.facts.kv
        assert kv is not None
        self.k, self.v = (torch.empty(kv.layers, kv.kv_heads, 0, kv.head_dim) for _ in range(2))
        self.mass, self.positions = torch.empty(kv.layers, kv.kv_heads, 0), torch.empty(kv.layers, kv.kv_heads, 0, dtype=torch.long)
        self.done = 0

    def read(self, ids: list[int]) -> Tensor:
        """Logits of the last token. `ids` are read together; evicts when full, as the engine does at the end of a step."""
        places = range(self.done, self.done + len(ids))
        if self.policy.positions == "in_cache":
            places = range(self.k.shape[2], self.k.shape[2] + len(ids))
        new_k, new_v, mass = [], [], []

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
            # q and k come rotated by `places`; kept keys are rotated by their own places or positions here
            plain_k = self._turn(k[0], torch.tensor(list(places)), -1)
            keys = torch.cat([self.k[layer], plain_k], 1)
            at = torch.arange(keys.shape[1]).expand(keys.shape[:2]) if self.policy.positions == "in_cache" else torch.cat(
                [self.positions[layer], torch.tensor(list(places)).expand(keys.shape[0], -1)], 1)  # fmt: skip
            turned, values = self._turn(keys, at, 1), torch.cat([self.v[layer], v[0]], 1)
            group = q.shape[1] // keys.shape[0]
            scores = torch.einsum("htd,hsd->hts", q[0], turned.repeat_interleave(group, 0)) * q.shape[-1] ** -0.5
            behind = torch.arange(keys.shape[1] - len(ids), keys.shape[1])[:, None] >= torch.arange(keys.shape[1])
            p = scores.masked_fill(~behind, float("-inf")).softmax(-1)
            new_k.append(plain_k), new_v.append(v[0]), mass.append(p.sum(1).unflatten(0, (-1, group)).sum(1))
            return torch.einsum("hts,hsd->htd", p, values.repeat_interleave(group, 0))[None]

        hidden = self.model.hidden(torch.tensor([ids]), torch.tensor([list(places)]), attend=attend)
        self.k, self.v = torch.cat([self.k, torch.stack(new_k)], 2), torch.cat([self.v, torch.stack(new_v)], 2)
        self.mass = torch.cat([self.mass, torch.zeros(*self.mass.shape[:2], len(ids))], 2) + torch.stack(mass)
        new = torch.arange(self.done, self.done + len(ids)).expand(*self.positions.shape[:2], -1)
        self.positions = torch.cat([self.positions, new], 2)
        self.done += len(ids)
        if self.k.shape[2] == self.policy.size:
            keep = self.policy.keep(self.policy.size - 16, self.mass, self.positions)
            keep = keep.expand(*self.mass.shape[:2], -1)
            self.mass, self.positions = self.mass.gather(2, keep), self.positions.gather(2, keep)
            self.k, self.v = (x.gather(2, keep[..., None].expand(*keep.shape, x.shape[-1])) for x in (self.k, self.v))
        return self.model.head(hidden[0, -1:])[0]

    def _turn(self, k_GTD: Tensor, at: Tensor, sign: int) -> Tensor:
        """Keys [G, T, D] rotated to the positions `at` ([T] or [G, T]), or back."""
        spec = self.model.spec
        angle = at[..., None].double() * torch.tensor(rope.frequencies(spec.rope, spec.head_dim), dtype=torch.float64)
        cos, sin = angle.cos().float(), sign * angle.sin().float()
        a, b = k_GTD.chunk(2, -1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


@torch.inference_mode()
def by_hand(policy: str, prompt: list[int], new: int) -> list[int]:
    """Greedy tokens: the prompt in pieces that fill the cache, as the scheduler cuts it, then token by token."""
    name, _, argument = policy.partition(":")
    model = Dense(model_of("llama"), registry.find("kv_policy", name)(argument))
    tokens, at, logits = list(prompt), 0, torch.empty(0)
    while len(tokens) < len(prompt) + new:
        count = min(len(tokens) - at, model.policy.size - model.k.shape[2])
        logits = model.read(tokens[at : at + count])
        at += count
        if at == len(tokens):
            tokens.append(int(logits.argmax()))
    return tokens[len(prompt) :]


POLICIES = ["sinks:4+44", "sinks:0+48", "sinks:16+32", "sinks:20+28", "sliding:48", "heavy_hitter:24+24", "heavy_hitter:0+48", "heavy_hitter:40+8"]


@needs_native
@pytest.mark.parametrize("policy", POLICIES)
def test_answers_equal_a_dense_loop(policy: str) -> None:
    """Six answers in one batch, each as alone by hand: prompts shorter and longer than the cache, and evictions while answering."""
    prompts = prompts_of(6)
    engine = native_engine(policy, max_batch_tokens=512)
    assert [list(done.tokens) for done in engine.generate(prompts, GREEDY)] == [by_hand(policy, prompt, 60) for prompt in prompts]
    assert engine.pool.free_count == engine.pool.total and not engine.retention._held
    engine.generate(prompts[:2], GREEDY)
    assert engine.stats().prefix_hits == 0, "evicting policies share no prefix"


@needs_native
@pytest.mark.parametrize("policy", ["sinks:4+44", "sliding:48", "heavy_hitter:24+24"])
@pytest.mark.parametrize("settings", [dict(kv_tokens=96, preemption="swap", swap_tokens=512), dict(kv_tokens=96, preemption="recompute")], ids=str)
def test_preempted_answers_go_on(policy: str, settings: dict[str, Any]) -> None:
    prompts = prompts_of(6)
    engine = native_engine(policy, **settings)
    got = [list(done.tokens) for done in engine.generate(prompts, GREEDY)]
    stats = engine.stats()
    assert stats.preempted_swap + stats.preempted_recompute > 0
    if settings["preemption"] == "swap":
        assert got == [by_hand(policy, prompt, 60) for prompt in prompts]
    assert engine.pool.free_count == engine.pool.total and engine.pool.swap_free == engine.pool.swap_total


@needs_native
@pytest.mark.parametrize("policy", ["sinks:4+252", "sliding:256", "heavy_hitter:128+128"])
def test_a_budget_of_everything_is_full_attention(policy: str) -> None:
    prompts = prompts_of(4)
    some, every = (native_engine(name).generate(prompts, GREEDY) for name in (policy, "full"))
    if policy.startswith("sinks"):  # keys are rotated when they are read: other roundings
        assert [done.tokens for done in some] == [done.tokens for done in every]
    else:
        assert some == every


@needs_native
def test_a_stream_is_longer_than_the_context_and_memory_is_constant() -> None:
    engine = native_engine("sinks:4+44", kv_tokens=48)
    prompt = [random.Random(3).randrange(256) for _ in range(1000)]
    assert engine.context == 128
    (done,) = engine.generate([prompt], Sampling(200, ignore_eos=True, prompt_logprobs=0))
    assert len(done.tokens) == 200 and engine.pool.total == 3
    with pytest.raises(UserError, match="context"):
        native_engine("sliding:48").generate([prompt], GREEDY)


@needs_native
def test_prompts_are_scored_while_tokens_leave() -> None:
    """The same log probabilities whether a prompt is scored with 48 places or was all there (until the first token leaves), and of every token."""
    prompt = prompts_of(3)[2] + prompts_of(5)[4]
    (few,) = native_engine("sliding:48").generate([prompt], Sampling(1, prompt_logprobs=0))
    (all_,) = native_engine("full").generate([prompt], Sampling(1, prompt_logprobs=0))
    assert few.prompt_logprobs is not None and all_.prompt_logprobs is not None
    assert len(few.prompt_logprobs) == len(all_.prompt_logprobs) == len(prompt) > 64
    near = [abs(a.logprob - b.logprob) for a, b in zip(few.prompt_logprobs[1:], all_.prompt_logprobs[1:]) if a and b]
    assert max(near[:47]) < 1e-4 < max(near[48:])


def test_heavy_hitters_are_the_heaviest_and_the_recent() -> None:
    """Against a search by hand, with ties and positions that are not in order."""
    draw = random.Random(1)
    policy = registry.find("kv_policy", "heavy_hitter")("20+28")
    for _ in range(40):
        mass = torch.tensor([[[draw.random() for _ in range(48)] for _ in range(2)] for _ in range(2)])
        positions = torch.stack([torch.stack([torch.tensor(sorted(draw.sample(range(20), 20)) + list(range(30, 58))) for _ in range(2)]) for _ in range(2)])
        order = torch.randperm(48)
        mass, positions = mass[..., order], positions[..., order]
        keep = policy.keep(32, mass, positions)
        for layer in range(2):
            for head in range(2):
                recent = {i for i in range(48) if positions[layer, head, i] >= 30}
                others = sorted(set(range(48)) - recent, key=lambda i: -float(mass[layer, head, i]))[:4]
                assert keep[layer, head].tolist() == sorted(recent | set(others))


@pytest.mark.parametrize("codec", ["fp32", "fp16", "int8"])
def test_single_tokens_move_between_places(codec: str) -> None:
    torch.manual_seed(0)
    store = KvStore(layers=2, blocks=5, kv_heads=3, head_dim=8, codec=codec)
    store.numbers.random_(0, 60)
    if store.scales is not None:
        store.scales.normal_()
    table = torch.tensor([3, 0, 4], dtype=torch.int32)
    before = [store.read(layer, table, 48) for layer in range(2)]
    source, target = (torch.stack([torch.stack([torch.randperm(48)[:7] for _ in range(3)]) for _ in range(2)]) for _ in range(2))
    store.shift(table, source, target)
    for layer in range(2):
        for side, now in enumerate(store.read(layer, table, 48)):
            want = before[layer][side].clone()
            for head in range(3):
                want[target[layer, head], head] = before[layer][side][source[layer, head], head]
            assert torch.equal(now, want)


@pytest.mark.parametrize("policy, word", [("sinks:4+200", "blocks of 16"), ("sinks:4", "2 numbers"), ("heavy_hitter:1+15", "two must stay"),
                                          ("sliding:16", "two must stay"), ("full:3", "no argument"), ("crystal", "unknown")])  # fmt: skip
def test_sizes_that_make_no_sense(policy: str, word: str) -> None:
    name, _, argument = policy.partition(":")
    with pytest.raises(UserError) as fault:
        registry.find("kv_policy", name)(argument)
    assert word in str(fault.value) + fault.value.why


def test_what_does_not_go_together_says_why() -> None:
    model = model_of("llama")
    with pytest.raises(UserError, match="cannot run here"):
        engine_of(model, policy="sinks:4+44")
    with pytest.raises(UserError, match="cannot run here"):
        engine_of(model, policy="heavy_hitter:24+24")
    with pytest.raises(UserError, match="together"):
        engine_of(model, policy="sliding:48", draft="ngram")
    with pytest.raises(UserError, match="share"):
        engine_of(model, policy="sliding:48").generate([[1, 2]], Sampling(4, n=2))
    if native.module() is not None:
        with pytest.raises(UserError, match="cannot run here"):
            engine_of(lowered(model), policy="sinks:4+44")  # type: ignore[arg-type]
