"""The fields of vLLM's requests, one by one: each works or is a 400 that names it; and the small routes that its tools call."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from http_server import KEY, Running, running

from lilliput.base.errors import UserError
from lilliput.base.job import Job
from lilliput.cli import serve as verb
from lilliput.serve.beams import Beam
from lilliput.serve.openai.protocol import ChatRequest, CompletionRequest
from lilliput.serve.request import Delta

pytest.importorskip("fastapi", reason="needs the extra `serve`")
openai = pytest.importorskip("openai", reason="needs OpenAI's client")
pytest.importorskip("llguidance", reason="needs the extra `structured`")

HELLO = [{"role": "user", "content": "Hello"}]
PROMPT = "To be or not"
WORKS: dict[str, object] = {  # of vLLM's SamplingParams and of its two protocols
    "n": 2, "presence_penalty": 0.5, "frequency_penalty": 0.5, "repetition_penalty": 1.1, "temperature": 0.5, "top_p": 0.9, "top_k": 5, "min_p": 0.1,
    "seed": 3, "stop": ["zq"], "stop_token_ids": [5], "ignore_eos": True, "max_tokens": 3, "min_tokens": 1, "logit_bias": {"5": 1}, "bad_words": ["zq"],
    "prompt_logprobs": 1, "skip_special_tokens": False, "spaces_between_special_tokens": True, "include_stop_str_in_output": True,
    "allowed_token_ids": [5, 6, 7], "truncate_prompt_tokens": 3, "structured_outputs": {"regex": "a{1,9}"}, "response_format": {"type": "json_object"},
    "stream": True, "stream_options": {"include_usage": True}, "user": "me", "return_token_ids": True, "echo": True, "priority": 0, "model": "tiny",
    "use_beam_search": True, "length_penalty": 1.5, "early_stopping": True, "add_special_tokens": True,
}  # fmt: skip
OF_CHAT: dict[str, object] = {
    "logprobs": True, "top_logprobs": 2, "max_completion_tokens": 3, "add_generation_prompt": False, "continue_final_message": False,
    "chat_template_kwargs": {}, "include_reasoning": False, "modalities": ["text"], "tools": [], "tool_choice": "auto", "parallel_tool_calls": True,
}  # fmt: skip
OF_TEXT: dict[str, object] = {"logprobs": 2, "best_of": 2}
REFUSED: dict[str, object] = {
    "logits_processors": ["x"], "prompt_embeds": "x", "mm_processor_kwargs": {}, "kv_transfer_params": {}, "cache_salt": "x", "vllm_xargs": {},
    "request_id": "x",
    "return_tokens_as_token_ids": True, "documents": [], "chat_template": "x", "guided_json": {}, "guided_regex": "x", "flat_logprobs": True,
    "thinking_token_budget": 5, "suffix": "x", "functions": [], "audio": {}, "media_io_kwargs": {}, "prediction": {}, "web_search_options": {}, "logprobs": 99,
    "spaces_between_special_tokens": False, "priority": 3, "reasoning_effort": "low", "length_penalty": 1.0,
}  # fmt: skip
NEEDS = {"stream_options": {"stream": True}, "top_logprobs": {"logprobs": True},
         "length_penalty": {"use_beam_search": True}, "early_stopping": {"use_beam_search": True}}  # fmt: skip


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with running(tmp_path_factory.mktemp("fields"), "http.cors=https://page.example", "http.embeddings=mean") as server:
        yield server


@pytest.fixture(scope="module")
def client(server: Running):
    return server.client()


def call(server: Running, path: str, body: object = None, method: str | None = None, **headers: str) -> tuple[int, str, dict[str, str]]:
    data = None if body is None else json.dumps(body).encode()
    head = {"Content-Type": "application/json", "Authorization": f"Bearer {KEY}", **headers}
    try:
        with urllib.request.urlopen(urllib.request.Request(server.url + path, data, head, method=method), timeout=60) as answer:
            return answer.status, answer.read().decode(), dict(answer.headers)
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode(), dict(error.headers)


@pytest.mark.parametrize("route", ["chat/completions", "completions"])
def test_every_field_of_vllms_works_or_is_refused_by_its_name(server: Running, route: str) -> None:
    chat = route != "completions"
    base = {"model": "tiny", "max_tokens": 2, **({"messages": HELLO} if chat else {"prompt": PROMPT})}
    works = WORKS | (OF_CHAT if chat else OF_TEXT)
    for name, value in works.items():
        status, text, _ = call(server, f"/v1/{route}", base | NEEDS.get(name, {}) | {name: value})
        assert status == 200, (name, text)
    known = set((ChatRequest if chat else CompletionRequest).model_fields)
    assert set(works) <= known
    for name, value in REFUSED.items():
        status, text, _ = call(server, f"/v1/{route}", base | {name: value})
        said = json.loads(text)["error"]
        assert status == 400 and name in f"{said['param']} {said['message']}", (name, text)


def test_log_probabilities_of_the_prompt(server: Running, client) -> None:
    text = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=1, extra_body={"prompt_logprobs": 2, "return_token_ids": True}).choices[0]
    ids, scored = text.model_extra["prompt_token_ids"], text.model_extra["prompt_logprobs"]
    assert len(scored) == len(ids) and scored[0] is None and len(text.model_extra["token_ids"]) == 1
    echoed = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=1, echo=True, logprobs=1).choices[0].logprobs.token_logprobs
    for id, one, value in zip(ids[1:], scored[1:], echoed[1:]):
        assert one[str(id)]["logprob"] == pytest.approx(value, abs=1e-4) and 2 <= len(one) <= 3
        assert sorted(named["rank"] for named in one.values() if named["rank"] is not None) == [1, 2]
    both = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=1, echo=True, logprobs=1, extra_body={"prompt_logprobs": 3}).choices[0]
    assert all(len(top) <= 2 for top in both.logprobs.top_logprobs[1 : len(ids)]) and len(both.model_extra["prompt_logprobs"][1]) >= 3
    whole = client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=1, extra_body={"prompt_logprobs": 0, "return_token_ids": True})
    assert len(whole.model_extra["prompt_logprobs"]) == len(whole.model_extra["prompt_token_ids"]) == whole.usage.prompt_tokens
    assert call(server, "/v1/completions", {"prompt": PROMPT, "prompt_logprobs": 1, "stream": True})[0] == 400


def test_ids_in_streams_are_those_of_the_whole(client) -> None:
    how = dict(model="tiny", max_tokens=6, temperature=0, extra_body={"return_token_ids": True, "ignore_eos": True})
    whole = client.completions.create(prompt=PROMPT, **how).choices[0]
    events = list(client.completions.create(prompt=PROMPT, stream=True, **how))
    assert [id for event in events for id in event.choices[0].model_extra["token_ids"]] == whole.model_extra["token_ids"]
    assert len(whole.model_extra["token_ids"]) == 6
    assert events[0].choices[0].model_extra["prompt_token_ids"] == whole.model_extra["prompt_token_ids"]
    talk = client.chat.completions.create(messages=HELLO, **how)
    events = list(client.chat.completions.create(messages=HELLO, stream=True, **how))
    assert [id for event in events for id in (event.choices[0].model_extra or {}).get("token_ids", [])] == talk.choices[0].model_extra["token_ids"]
    assert events[0].model_extra["prompt_token_ids"] == talk.model_extra["prompt_token_ids"]


def test_the_stop_string_shows_where_it_is_asked_for(client) -> None:
    how = dict(model="tiny", prompt=PROMPT, max_tokens=30, temperature=0)
    plain = client.completions.create(**how).choices[0].text
    stop = plain[6:10]
    for shown in (False, True):
        choice = client.completions.create(stop=stop, extra_body={"include_stop_str_in_output": shown}, **how).choices[0]
        assert choice.text == plain[: plain.index(stop) + 4 * shown] and choice.finish_reason == "stop"
    ids = client.completions.create(extra_body={"return_token_ids": True}, **how).choices[0].model_extra["token_ids"]
    bodies = [{"stop_token_ids": [ids[3]], "include_stop_str_in_output": shown} for shown in (False, True)]
    ended = [client.completions.create(extra_body=body, **how).choices[0].text for body in bodies]
    assert len(ended[0]) < len(ended[1]) and plain.startswith(ended[1])


def test_special_tokens_show_where_they_are_asked_for(server: Running, client) -> None:
    special = min(server.served.tokenizer.special_ids)
    how = dict(model="tiny", prompt=PROMPT, max_tokens=3, temperature=0)
    more = {"allowed_token_ids": [special], "ignore_eos": True}
    assert client.completions.create(extra_body=more, **how).choices[0].text == ""
    shown = client.completions.create(extra_body=more | {"skip_special_tokens": False}, **how).choices[0].text
    assert shown == server.served.tokenizer.token_bytes(special).decode() * 3


def test_only_allowed_tokens_come_and_a_grammar_holds_beside_them(server: Running, client) -> None:
    ids = [server.served.tokenizer.encode(letter)[0] for letter in "ab"]
    how = dict(model="tiny", prompt=PROMPT, max_tokens=8, temperature=1, seed=1)
    assert set(client.completions.create(extra_body={"allowed_token_ids": ids}, **how).choices[0].text) <= {"a", "b"}
    both = client.completions.create(extra_body={"allowed_token_ids": ids, "structured_outputs": {"regex": "[bc]{4}"}}, **how).choices[0].text
    assert both == "bbbb"
    with pytest.raises(openai.BadRequestError, match="not in the vocabulary"):
        client.completions.create(extra_body={"allowed_token_ids": [10**6]}, **how)


def test_a_prompt_is_cut_at_its_beginning(server: Running, client) -> None:
    ids = server.served.tokenizer.encode(PROMPT, special=True)
    how = dict(model="tiny", max_tokens=4, temperature=0)
    cut = client.completions.create(prompt=PROMPT, extra_body={"truncate_prompt_tokens": 3}, echo=True, **how)
    assert cut.usage.prompt_tokens == 3 and cut.choices[0].text == client.completions.create(prompt=ids[-3:], echo=True, **how).choices[0].text
    long = client.completions.create(prompt="x " * 5000, extra_body={"truncate_prompt_tokens": -1}, **how)
    assert long.usage.prompt_tokens == 2048 - 4
    talk = client.chat.completions.create(messages=[{"role": "user", "content": "x " * 5000}], extra_body={"truncate_prompt_tokens": 100}, **how)
    assert talk.usage.prompt_tokens == 100


def test_an_answer_goes_on_from_the_last_message(server: Running, client) -> None:
    begun = [*HELLO, {"role": "assistant", "content": "To be or "}]
    more = {"continue_final_message": True, "add_generation_prompt": False, "return_token_ids": True}
    talk = client.chat.completions.create(model="tiny", messages=begun, max_tokens=5, temperature=0, extra_body=more)
    prompt = server.served.tokenizer.decode(talk.model_extra["prompt_token_ids"], skip_special=False)
    assert prompt.endswith("<|im_start|>assistant\nTo be or ")
    direct = client.completions.create(model="tiny", prompt=talk.model_extra["prompt_token_ids"], max_tokens=5, temperature=0).choices[0].text
    assert talk.choices[0].message.content == direct
    for stream in (False, True):
        answer = client.chat.completions.create(model="tiny", messages=begun, max_tokens=5, temperature=0, stream=stream, extra_body=more | {"echo": True})
        text = "".join(event.choices[0].delta.content or "" for event in answer) if stream else answer.choices[0].message.content
        assert text == "To be or " + direct
    bare = client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=1, extra_body={"add_generation_prompt": False, "return_token_ids": True})
    assert server.served.tokenizer.decode(bare.model_extra["prompt_token_ids"], skip_special=False).endswith("Hello<|im_end|>\n")
    with pytest.raises(openai.BadRequestError, match="add_generation_prompt is false"):
        client.chat.completions.create(model="tiny", messages=begun, extra_body={"continue_final_message": True, "add_generation_prompt": True})


def test_a_schema_on_completions(client) -> None:
    schema = {"type": "object", "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 9}}, "required": ["n"], "additionalProperties": False}
    wanted = {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}}
    text = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=30, extra_body=wanted).choices[0].text
    assert set(json.loads(text)) == {"n"}


@pytest.mark.parametrize("penalty", [0.5, 1.0])
def test_beam_search_is_the_engines_own(server: Running, client, penalty: float) -> None:
    ids = server.served.tokenizer.encode(PROMPT, special=True)
    how = {"use_beam_search": True, "length_penalty": penalty}
    found = client.completions.create(model="tiny", prompt=PROMPT, n=3, max_tokens=8, temperature=0, extra_body=how)
    engine = server.served.engine.engine

    async def direct() -> list[Delta]:
        return [delta async for delta in server.served.engine.stream(ids, Beam(3, 8, length_penalty=penalty))]

    import asyncio

    deltas = asyncio.run_coroutine_threadsafe(direct(), server.served.engine._loop).result(30)
    assert [choice.text for choice in found.choices] == ["".join(delta.text for delta in deltas if delta.index == at) for at in range(3)]
    assert len({choice.text for choice in found.choices}) == 3 and engine.stats().blocks_used == 0
    talk = client.chat.completions.create(model="tiny", messages=HELLO, n=2, max_tokens=4, extra_body=how)
    assert len(talk.choices) == 2
    for more, said in (({"stream": True}, "stream"), ({"temperature": 0.5}, "temperature"), ({"stop": ["x"]}, "stop"), ({"best_of": 4}, "best_of")):
        with pytest.raises(openai.BadRequestError, match=f"{said}=.*no meaning in a beam search"):
            client.completions.create(**({"model": "tiny", "prompt": PROMPT, "max_tokens": 2, "extra_body": how} | more))


def test_priority_is_refused_where_it_would_have_no_effect(tmp_path_factory: pytest.TempPathFactory, server: Running) -> None:
    status, text, _ = call(server, "/v1/completions", {"prompt": PROMPT, "max_tokens": 1, "priority": 1})
    assert status == 400 and "serve.scheduling=priority" in text and json.loads(text)["error"]["param"] == "priority"
    with running(tmp_path_factory.mktemp("priority"), "serve.scheduling=priority") as heeds:
        assert call(heeds, "/v1/completions", {"prompt": PROMPT, "max_tokens": 1, "priority": 1})[0] == 200


def test_sharing_by_name_and_a_policy_that_evicts_are_refused(tmp_path_factory: pytest.TempPathFactory) -> None:
    job = lambda *words: Job.load(None, ["model=lilliput-tiny", "serve.policy=sinks:4+60", *words])
    with pytest.raises(UserError, match="sharing=true cannot stand") as refusal:
        verb.check([job("serve.sharing=true")])
    assert "sinks:4+60" in refusal.value.why
    verb.check([job(), job("serve.sharing=false", "model=x")]), verb.check([Job.load(None, ["model=lilliput-tiny", "serve.sharing=true"])])
    from lilliput.serve.metrics import Board

    assert "not shared: serve.policy=sinks:4+60 evicts" in verb.served(job(), Board())[1]


def test_responses_refuse_by_name_and_a_fault_in_a_stream_is_a_failed_response(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    for more, said in (({"include": ["message.output_text.logprobs"]}, "not to be had here"), ({"top_logprobs": 2}, "unsupported field `top_logprobs`"),
                       ({"stream": True, "stream_options": {"include_usage": True}}, "unsupported field `stream_options`")):  # fmt: skip
        status, text, _ = call(server, "/v1/responses", {"input": "Hello", "max_output_tokens": 2} | more)
        assert status == 400 and said in text and json.loads(text)["error"]["param"] in more

    async def breaks(prompt: list[int], how: object):
        yield Delta(1, 0, 65, "A", logprob=-1.0)
        yield Delta(1, 0, None, "", "error", message="the model broke")

    monkeypatch.setattr(server.served.engine, "stream", breaks)
    status, text, _ = call(server, "/v1/responses", {"input": "Hello", "stream": True})
    events = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: ")]
    last = events[-1]
    assert status == 200 and last["type"] == "response.failed" and last["response"]["status"] == "failed"
    assert "the model broke" in last["response"]["error"]["message"] and [event["sequence_number"] for event in events] == list(range(len(events)))
    assert call(server, "/v1/responses", {"input": "Hello"})[0] == 500


def test_small_routes_of_vllms(server: Running, client) -> None:
    assert call(server, "/ping", Authorization="")[0] == 200 and call(server, "/ping", {})[0] == 200
    assert json.loads(call(server, "/load")[1]) == {"server_load": 0}
    prompt = "forget me " * 30
    cached = lambda: client.completions.create(model="tiny", prompt=prompt, max_tokens=1).usage.prompt_tokens_details.cached_tokens
    first, again = cached(), cached()
    assert first == 0 < again
    assert call(server, "/reset_prefix_cache", {})[0] == 200 and cached() == 0


def test_a_page_of_a_named_origin_may_call_and_no_other(server: Running) -> None:
    asks = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,content-type"}
    status, _, head = call(server, "/v1/chat/completions", method="OPTIONS", Origin="https://page.example", Authorization="", **asks)
    assert status == 200 and head["access-control-allow-origin"] == "https://page.example" and "authorization" in head["access-control-allow-headers"]
    status, _, head = call(server, "/v1/chat/completions", method="OPTIONS", Origin="https://evil.example", Authorization="", **asks)
    assert status == 400 and "access-control-allow-origin" not in head
    status, _, head = call(server, "/v1/models", Origin="https://page.example", Authorization="Bearer wrong")
    assert status == 401 and head["access-control-allow-origin"] == "https://page.example", "the page can read why"


def test_a_context_below_the_models_over_http(tmp_path: Path) -> None:
    with running(tmp_path, "serve.context=64") as server:
        client = server.client()
        assert client.models.list().data[0].model_dump()["max_model_len"] == 64
        with pytest.raises(openai.BadRequestError) as long:
            client.completions.create(model="tiny", prompt=[5] * 70, max_tokens=1)
        assert long.value.code == "context_length_exceeded" and "70 tokens of prompt, 64 tokens of context" in str(long.value)
        answer = client.completions.create(model="tiny", prompt=[5] * 60, max_tokens=50, extra_body={"ignore_eos": True})
        assert answer.usage.completion_tokens == 4 and answer.choices[0].finish_reason == "length"
        short = client.completions.create(model="tiny", prompt=[5] * 90, max_tokens=4, extra_body={"truncate_prompt_tokens": -1, "ignore_eos": True})
        assert short.usage.prompt_tokens == 60
