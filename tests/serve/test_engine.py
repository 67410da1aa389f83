"""Engine: tokens equal transformers' generate and the model's own forward, in any batch; what leaves frees its blocks."""

from __future__ import annotations

import random

import pytest
import torch
from served import FAMILIES, GREEDY, Dice, engine_of, model_of, oracle, prompts_of

from lilliput.base.errors import DoesNotFit, UserError
from lilliput.data.tokenizer import Tokenizer
from lilliput.serve.blocks import Table
from lilliput.serve.engine import Engine
from lilliput.serve.request import Delta, Sampling


def finish(engine: Engine) -> dict[int, list[int]]:
    """Step until nothing is left; tokens by request."""
    out: dict[int, list[int]] = {}
    while engine.busy:
        for delta in engine.step():
            out.setdefault(delta.id, []).extend([] if delta.token is None else [delta.token])
    return out


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_equal_transformers(family: str) -> None:
    """Alone and in a batch, prompts whole and in chunks of 7."""
    model, prompts = model_of(family), prompts_of(4)
    expected = oracle(model, prompts, GREEDY.max_tokens)
    for settings in (dict(), dict(max_batch_tokens=7)):
        engine = engine_of(model, **settings)
        assert [list(engine.generate([p], GREEDY)[0].tokens) for p in prompts] == expected
        assert [list(done.tokens) for done in engine.generate(prompts, GREEDY)] == expected
        assert engine.pool.free_count == engine.pool.total


def test_the_repetition_penalty_counts_prompt_and_answer_as_transformers_does() -> None:
    model, prompts = model_of("llama"), prompts_of(3, seed=4)
    how = Sampling(24, repetition_penalty=1.3, ignore_eos=True)
    plain = [list(done.tokens) for done in engine_of(model).generate(prompts, GREEDY)]
    got = [list(done.tokens) for done in engine_of(model).generate(prompts, how)]
    assert got == oracle(model, prompts, 24, penalty=1.3) and got != plain


def test_logits_of_the_cache_equal_the_whole_forward(device: str) -> None:
    """Every chunk and decode row within 2e-5 of one uncached forward (fp32); the log probabilities too."""
    model = model_of("llama").to(device)
    for done, prompt in zip(engine_of(model, max_batch_tokens=16).generate(prompts_of(3), GREEDY), prompts_of(3)):
        with torch.inference_mode():
            logits_TV = model(torch.tensor([prompt + list(done.tokens)], device=device))[0, len(prompt) - 1 : -1]
        logprobs = logits_TV.log_softmax(-1).gather(1, torch.tensor(done.tokens, device=device)[:, None])[:, 0].cpu()
        torch.testing.assert_close(torch.tensor(done.logprobs), logprobs, rtol=0, atol=2e-5)
        assert logits_TV.argmax(-1).tolist() == list(done.tokens)


def test_scattered_blocks_give_the_same_tokens() -> None:
    model, prompts = model_of("llama"), prompts_of(1, seed=5)
    engine = engine_of(model, kv_tokens=16 * 16)
    expected = engine.generate(prompts, GREEDY)
    tables = [Table() for _ in range(16)]
    for table in tables:
        engine.pool.grow(table, 16)
    for table in tables[::2]:
        engine.pool.free(table)  # only every second block is free
    assert engine.generate(prompts, GREEDY)[0].tokens == expected[0].tokens
    assert engine.pool.free_count == 8


def test_a_seed_gives_the_same_tokens_in_any_batch() -> None:
    model, prompts = model_of("qwen3"), prompts_of(9)
    how = [Sampling(20, 0.9, top_k=40, top_p=0.95, min_p=0.01, repetition_penalty=1.1, seed=i, ignore_eos=True) for i in range(9)]
    alone = [engine_of(model).generate([p], s)[0].tokens for p, s in zip(prompts, how)]
    assert len(set(alone)) == 9
    for trial in range(4):
        draw = random.Random(trial)
        engine = engine_of(model, max_batch_tokens=draw.choice([5, 40, 512]))
        order = draw.sample(range(9), 9)
        ids = {}
        for i in order:
            ids[i] = engine.add(prompts[i], how[i])
            if draw.random() < 0.5:
                engine._notes = engine.step() + engine._notes  # arrivals at different steps
        got = finish(engine)
        assert [tuple(got[ids[i]]) for i in range(9)] == alone
    other = engine_of(model).generate(prompts[:1], Sampling(20, 0.9, seed=77, ignore_eos=True))[0].tokens
    assert other != alone[0]


def test_requests_join_and_leave_while_others_run() -> None:
    model, prompts = model_of("llama"), prompts_of(6, seed=2)
    expected = {i: engine_of(model).generate([p], Sampling(4 + 5 * i, ignore_eos=True))[0].tokens for i, p in enumerate(prompts)}
    engine = engine_of(model, kv_tokens=200, max_batch_tokens=20)  # room for about three of them
    for i, p in enumerate(prompts):
        assert engine.add(p, Sampling(4 + 5 * i, ignore_eos=True)) == i
    assert {i: tuple(tokens) for i, tokens in finish(engine).items()} == expected
    assert engine.pool.free_count == engine.pool.total


def test_cancel_frees_the_blocks_at_once() -> None:
    engine = engine_of(model_of("gpt2"), max_batch_tokens=8)
    first, second, waiting = (engine.add(p, Sampling(50, ignore_eos=True)) for p in ([1] * 20, [2] * 5, [3] * 5))
    engine.step()
    free = engine.pool.free_count
    assert engine.cancel(first) and engine.pool.free_count == free + 1  # 8 of its tokens were computed
    assert engine.cancel(waiting) and engine.pool.free_count == free + 1
    assert not engine.cancel(first)
    deltas = engine.step()
    assert [(d.id, d.token, d.finish_reason) for d in deltas[:2]] == [(first, None, "cancelled"), (waiting, None, "cancelled")]
    assert [d.id for d in deltas[2:]] == [second]
    assert len(finish(engine)[second]) == 49
    assert engine.pool.free_count == engine.pool.total and not engine.cancel(second)


@pytest.mark.parametrize("seed", range(4))
def test_random_arrivals_streams_and_cancels_leave_no_block(seed: int) -> None:
    """400 random operations: each request's deltas end with exactly one reason, and nothing is left at the end."""
    draw = random.Random(seed)
    engine = engine_of(model_of("llama"), kv_tokens=320, max_batch_tokens=draw.choice([3, 16, 64]))
    engine.runner = Dice()
    streams, reasons, added = [], {}, {}

    def note(deltas: list[Delta]) -> None:
        for delta in deltas:
            if delta.finish_reason:
                reasons.setdefault((delta.id, delta.index), []).append(delta.finish_reason)

    for _ in range(400):
        act = draw.choice(["add", "stream", "cancel", "step", "step", "pull", "pull", "close"])
        stop, ignore_eos = draw.choice([(), ("a",), ("bc",)]), draw.random() < 0.5
        how = Sampling(draw.randrange(1, 30), draw.choice([0.0, 1.0]), seed=draw.randrange(99), stop=stop, ignore_eos=ignore_eos,
                       n=draw.choice([1, 1, 3]))  # fmt: skip
        prompt = [draw.randrange(256) for _ in range(draw.randrange(1, 60))]
        if act == "add":
            added |= {(id, index): how for id in [engine.add(prompt, how)] for index in range(how.n)}
        elif act == "stream":
            streams.append(engine.stream(prompt, how))
        elif act == "cancel" and engine._requests:
            assert engine.cancel(draw.choice(list(engine._requests)))
        elif act == "step":
            note(engine.step())
        elif act == "pull" and streams:
            next(draw.choice(streams), None)
        elif act == "close" and streams:
            streams.pop(draw.randrange(len(streams))).close()
        owned = {block for group in engine.scheduler.running for table in group.tables for block in table.blocks}
        assert len(owned) == engine.pool.total - engine.pool.free_count
    for stream in streams:
        stream.close()
    while engine.busy:
        note(engine.step())
    assert reasons.keys() == added.keys() and all(len(r) == 1 for r in reasons.values())
    assert {r for (r,) in reasons.values()} >= {"length", "cancelled"}
    assert engine.pool.free_count == engine.pool.total and not engine._callers.inboxes and not engine._requests


def test_streams_interleave_and_closing_one_stops_it() -> None:
    model = model_of("llama")
    engine = engine_of(model)
    a, b = prompts_of(2, seed=3)
    expected = [done.tokens for done in engine.generate([a, b], GREEDY)]
    loose = engine.add(a, Sampling(3, ignore_eos=True))
    first, second = engine.stream(a, GREEDY), engine.stream(b, GREEDY)
    pairs = [(next(first).token, next(second).token) for _ in range(10)]
    assert tuple(x for x, _ in pairs) == expected[0][:10] and tuple(y for _, y in pairs) == expected[1][:10]
    first.close()  # type: ignore[attr-defined]
    rest = list(second)
    assert tuple(delta.token for delta in rest) == expected[1][10:] and rest[-1].finish_reason == "length"
    assert engine.pool.free_count == engine.pool.total
    assert [(d.id, d.token) for d in engine.step()] == [(loose, token) for token in expected[0][:3]]  # kept for whoever steps
    assert not engine.busy


def test_the_end_token_and_stop_strings_end_an_answer() -> None:
    model, tokenizer = model_of("llama"), Tokenizer.bytes_()
    (prompt,) = prompts_of(1, seed=8)
    free = engine_of(model).generate([prompt], GREEDY)[0]
    eos = free.tokens[5]
    at = free.tokens.index(eos)
    engine = engine_of(model)
    engine._eos = frozenset({eos})
    done = engine.generate([prompt], Sampling(24))[0]
    assert done.tokens == free.tokens[: at + 1] and done.finish_reason == "stop" and len(done.logprobs) == at + 1
    assert done.text == tokenizer.decode(free.tokens[:at])
    stop = free.text[4:6]
    cut = engine_of(model).generate([prompt], Sampling(24, stop=(stop,), ignore_eos=True))[0]
    assert cut.text == free.text[: free.text.index(stop)] and cut.finish_reason == "stop"


def test_an_answer_ends_where_the_context_ends() -> None:
    engine = engine_of(model_of("gpt2"))
    done = engine.generate([[1] * 120], Sampling(1000, ignore_eos=True))[0]
    assert len(done.tokens) == 8 and done.finish_reason == "length"


def test_a_context_below_the_models() -> None:
    """Requests end at it, the cache is sized by it, and the tokens are those of the whole context."""
    model = model_of("llama")
    engine, whole = engine_of(model, context=40, kv_tokens=None), engine_of(model)
    assert engine.pool.total * 16 == 4 * 40 and whole.context == 128
    done, more = (one.generate([[5] * 30], Sampling(1000, ignore_eos=True))[0].tokens for one in (engine, whole))
    assert len(done) == 10 and len(more) == 98 and list(more[:10]) == list(done)
    with pytest.raises(UserError, match="longer than the context") as error:
        engine.add([5] * 40)
    assert "40 tokens of prompt, 40 tokens of context" in str(error.value.why)
    with pytest.raises(UserError, match="beyond the model") as error:
        engine_of(model, context=129)
    assert error.value.fix == "serve.context=128"


@pytest.mark.parametrize(
    "prompt, sampling, words",
    [
        ([], Sampling(), "no tokens"),
        ([1, 259], Sampling(), "token id 259"),
        ([-1], Sampling(), "token id -1"),
        ([1] * 128, Sampling(), "longer than the context"),
        ([1] * 60, Sampling(50), "does not fit into the cache"),
    ],
    ids=["empty", "vocabulary", "negative", "context", "cache"],
)
def test_requests_that_can_never_run_are_refused(prompt: list[int], sampling: Sampling, words: str) -> None:
    engine = engine_of(model_of("llama"), kv_tokens=64)
    with pytest.raises(UserError, match=words) as error:
        engine.add(prompt, sampling)
    assert error.value.why and error.value.fix
    assert not engine.busy and engine.pool.free_count == engine.pool.total


def test_a_request_that_does_not_fit_says_what_would() -> None:
    engine = engine_of(model_of("llama"), kv_tokens=64)
    with pytest.raises(DoesNotFit) as error:
        engine.add([1] * 60, Sampling(50))
    assert "60 tokens of prompt and 50 of answer need 112 tokens of cache in blocks of 16, it has 64" in error.value.why
    assert error.value.fix == "kv_tokens=112 or max_tokens=5"
    engine.add([1] * 60, Sampling(5))
    engine_of(model_of("llama"), kv_tokens=112).add([1] * 60, Sampling(50))


def test_many_answers_that_do_not_fit_say_what_would() -> None:
    engine = engine_of(model_of("llama"), kv_tokens=128, max_batch_tokens=4)
    with pytest.raises(DoesNotFit, match="too many answers") as error:
        engine.add([1], Sampling(1, n=5))
    assert error.value.fix == "max_batch_tokens=5 or n=4"
    with pytest.raises(DoesNotFit) as error:
        engine.add([1] * 40, Sampling(60, n=4))
    assert "4 answers of 60 need 352 tokens" in error.value.why and error.value.fix == "kv_tokens=352 or max_tokens=9"
    assert len(engine.generate([[1] * 40], Sampling(9, n=4, ignore_eos=True))) == 4


def test_a_batch_with_a_bad_prompt_leaves_nothing_behind() -> None:
    engine = engine_of(model_of("llama"))
    with pytest.raises(UserError):
        engine.generate([[1, 2], []], GREEDY)
    assert not engine.busy and engine.pool.free_count == engine.pool.total and not engine._callers.inboxes


def test_broken_weights_are_named() -> None:
    model = model_of("llama")
    with torch.no_grad():
        model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")  # type: ignore[union-attr, index]
    with pytest.raises(UserError, match="not finite"):
        engine_of(model).generate([[1, 2, 3]], GREEDY)


def test_bf16_weights_are_served_with_a_cache_in_fp32_on_cpus() -> None:
    model = model_of("llama").to(torch.bfloat16)
    engine = engine_of(model)
    (prompt,) = prompts_of(1)
    done = engine.generate([prompt], GREEDY)[0]
    with torch.inference_mode():
        logits_TV = model(torch.tensor([prompt + list(done.tokens)]))[0, len(prompt) - 1 : -1]
    assert logits_TV.argmax(-1).tolist() == list(done.tokens)
    assert engine.runner.store_2LGSD.dtype == torch.float32  # type: ignore[attr-defined]


def test_the_cache_is_sized_by_contexts_where_nobody_says() -> None:
    assert Engine(model_of("llama"), Tokenizer.bytes_()).kv_tokens == 4 * 128
    with pytest.raises(UserError, match="kv_tokens=0"):
        engine_of(model_of("llama"), kv_tokens=0)
    with pytest.raises(UserError, match="unknown kv policy `ful`"):
        engine_of(model_of("llama"), policy="ful")
