"""The API through OpenAI's own client, against a server on loopback with the shipped tiny model."""

from __future__ import annotations

import json
import math
import re
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from http_server import KEY, Running, running

pytest.importorskip("fastapi", reason="needs the extra `serve`")
openai = pytest.importorskip("openai", reason="needs OpenAI's client")
pytest.importorskip("llguidance", reason="needs the extra `structured`")

HELLO = [{"role": "user", "content": "Hello"}]
CITY = {"type": "object", "properties": {"city": {"enum": ["Oslo", "Rome"]}}, "required": ["city"], "additionalProperties": False}
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": CITY}}, {"type": "function", "function": {"name": "time"}}]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with running(tmp_path_factory.mktemp("http"), "http.max_body=100000", "http.embeddings=mean") as server:
        yield server


@pytest.fixture(scope="module")
def guessing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with running(tmp_path_factory.mktemp("guessing"), "serve.draft=ngram") as server:
        yield server


@pytest.fixture(scope="module")
def client(server: Running):
    return server.client()


def raw(server: Running, path: str, body: object = None, key: str | None = KEY, headers: dict[str, str] | None = None) -> tuple[int, dict]:
    """Status and JSON of a call without the client."""
    data = body if isinstance(body, bytes) else None if body is None else json.dumps(body).encode()
    head = {"Content-Type": "application/json", **({"Authorization": f"Bearer {key}"} if key else {}), **(headers or {})}
    try:
        with urllib.request.urlopen(urllib.request.Request(server.url + path, data, head), timeout=60) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


def ask(client, **more):
    return client.chat.completions.create(**({"model": "tiny", "messages": HELLO, "max_tokens": 16, "temperature": 0} | more))


# ---- text


def test_the_answer_is_the_engines_own(server: Running, client) -> None:
    engine = server.served.engine.engine
    ids = engine.tokenizer.encode(engine.tokenizer.apply_chat(HELLO))
    answer = ask(client)
    assert answer.usage.prompt_tokens == len(ids) and answer.usage.completion_tokens == 16 and answer.usage.total_tokens == len(ids) + 16
    direct = client.completions.create(model="tiny", prompt=ids, max_tokens=16, temperature=0)
    assert direct.choices[0].text == answer.choices[0].message.content
    assert answer.choices[0].finish_reason == "length" and answer.choices[0].message.role == "assistant"


@pytest.mark.parametrize("n", [1, 3])
def test_a_stream_adds_up_to_the_whole(client, n: int) -> None:
    how = dict(n=n, temperature=0.8, seed=7, max_tokens=24, logprobs=True, top_logprobs=2)
    whole, texts, scores, reasons = ask(client, **how), {}, {}, {}
    events = list(ask(client, stream=True, stream_options={"include_usage": True}, **how))
    for event in events[:-1]:
        (choice,) = event.choices
        texts[choice.index] = texts.get(choice.index, "") + (choice.delta.content or "")
        scores.setdefault(choice.index, []).extend(choice.logprobs.content if choice.logprobs else [])
        if choice.finish_reason:
            reasons[choice.index] = choice.finish_reason
    assert texts == {choice.index: choice.message.content for choice in whole.choices} and len(texts) == n
    assert reasons == {choice.index: choice.finish_reason for choice in whole.choices}
    for choice in whole.choices:
        assert [score.token for score in scores[choice.index]] == [score.token for score in choice.logprobs.content]
        assert "".join(score.token for score in choice.logprobs.content) == choice.message.content
        assert all(len(score.top_logprobs) == 2 and score.logprob <= 0 and bytes(score.bytes).decode() == score.token for score in choice.logprobs.content)
    assert events[-1].choices == [] and events[-1].usage.completion_tokens == whole.usage.completion_tokens == 24 * n
    assert n == 1 or len(set(texts.values())) > 1


def test_a_seed_gives_the_same_answer_again_and_another_another(client) -> None:
    one, again, other = (ask(client, temperature=1, seed=seed).choices[0].message.content for seed in (5, 5, 6))
    assert one == again != other


def test_a_stop_string_ends_the_answer_and_never_shows(client) -> None:
    whole = ask(client, max_tokens=40).choices[0].message.content
    stop = whole[10:14]
    for stream in (False, True):
        answer = ask(client, max_tokens=40, stop=[stop, "zzz"], stream=stream)
        text = "".join(event.choices[0].delta.content or "" for event in answer) if stream else answer.choices[0].message.content
        assert text == whole[: whole.index(stop)]
    assert answer is not None and ask(client, max_tokens=40, stop=stop).choices[0].finish_reason == "stop"
    assert ask(client, max_tokens=40, stop=stop).choices[0].model_extra["stop_reason"] == stop


def test_vllms_options_reach_the_engine(client) -> None:
    assert ask(client, extra_body={"ignore_eos": True, "min_tokens": 3, "top_k": -1, "min_p": 0.1, "repetition_penalty": 1.3}).usage.completion_tokens == 16
    banned = ask(client).choices[0].message.content
    first = client.completions.create(model="tiny", prompt="To", max_tokens=1, temperature=0, logprobs=0).choices[0].logprobs.tokens[0]
    other = client.completions.create(model="tiny", prompt="To", max_tokens=1, temperature=0, extra_body={"bad_words": [first]})
    assert banned and first not in other.choices[0].text


def test_echo_and_log_probabilities_of_the_prompt(client) -> None:
    scored = client.completions.create(model="tiny", prompt="To be or not", max_tokens=4, temperature=0, echo=True, logprobs=1).choices[0]
    assert scored.text.startswith("To be or not") and scored.logprobs.token_logprobs[0] is None
    assert "".join(scored.logprobs.tokens) == scored.text
    assert all(scored.text[at:].startswith(token) for token, at in zip(scored.logprobs.tokens, scored.logprobs.text_offset))
    only = client.completions.create(model="tiny", prompt="To be or not", max_tokens=0, echo=True, logprobs=1)
    assert only.choices[0].text == "To be or not" and only.usage.completion_tokens == 0
    assert only.choices[0].logprobs.token_logprobs == scored.logprobs.token_logprobs[: len(only.choices[0].logprobs.tokens)]


def test_several_prompts_and_answers_keep_their_order(client) -> None:
    prompts = ["To be", "ROMEO:", "My lord"]
    together = client.completions.create(model="tiny", prompt=prompts, max_tokens=8, temperature=0, n=2)
    alone = [client.completions.create(model="tiny", prompt=prompt, max_tokens=8, temperature=0).choices[0].text for prompt in prompts]
    assert [choice.index for choice in together.choices] == list(range(6))
    assert [choice.text for choice in together.choices] == [text for text in alone for _ in range(2)]
    streamed = ["" for _ in range(6)]
    for event in client.completions.create(model="tiny", prompt=prompts, max_tokens=8, temperature=0, n=2, stream=True):
        streamed[event.choices[0].index] += event.choices[0].text
    assert streamed == [choice.text for choice in together.choices]


@pytest.mark.parametrize("body", [
    {"prompt": "To be", "temperature": 0.0, "repetition_penalty": 1.0, "max_tokens": 7, "logprobs": None, "ignore_eos": True},
    {"prompt": "To be", "temperature": 0.0, "best_of": 1, "max_tokens": 7, "min_tokens": 7, "ignore_eos": True},
    {"messages": [{"role": "user", "content": [{"type": "text", "text": "To be"}]}], "max_completion_tokens": 7, "ignore_eos": True, "temperature": 0.0},
], ids=["completions", "older completions", "chat"])  # fmt: skip
def test_what_vllms_benchmark_sends_is_streamed_with_usage(server: Running, body: dict) -> None:
    path = "/v1/chat/completions" if "messages" in body else "/v1/completions"
    whole = json.dumps({"model": "tiny", "stream": True, "stream_options": {"include_usage": True}} | body).encode()
    request = urllib.request.Request(server.url + path, whole, {"Content-Type": "application/json", "Authorization": f"Bearer {KEY}"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        assert answer.headers["Content-Type"].startswith("text/event-stream")
        events = [line[6:] for line in answer.read().decode().splitlines() if line]
    assert events[-1] == "[DONE]"
    parsed = [json.loads(event) for event in events[:-1]]
    assert parsed[-1]["usage"]["completion_tokens"] == 7 and parsed[-1]["choices"] == []
    texts = [choice["delta"].get("content") if "messages" in body else choice["text"] for event in parsed for choice in event["choices"]]
    assert 5 <= len([text for text in texts if text]) <= 8


# ---- structure and tools


SCHEMA = {"type": "object", "properties": {"ok": {"type": "boolean"}, "n": {"type": "integer", "minimum": 0, "maximum": 9}}, "required": ["ok", "n"]}
SCHEMA |= {"additionalProperties": False}


def test_a_json_schema_is_kept(client) -> None:
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA, "strict": True}}
    for seed in range(5):
        answer = ask(client, response_format=wanted, temperature=1.5, seed=seed, max_tokens=60)
        assert answer.choices[0].finish_reason == "stop"
        assert set(json.loads(answer.choices[0].message.content)) == {"ok", "n"}
    text = "".join(event.choices[0].delta.content or "" for event in ask(client, response_format=wanted, stream=True, max_tokens=60))
    assert set(json.loads(text)) == {"ok", "n"}


def test_other_structure(client) -> None:
    choice = ask(client, extra_body={"structured_outputs": {"choice": ["yes", "no"]}})
    assert choice.choices[0].message.content in ("yes", "no") and choice.choices[0].finish_reason == "stop"
    text = client.completions.create(model="tiny", prompt="To", max_tokens=20, extra_body={"structured_outputs": {"regex": "[ab]{3}"}}).choices[0].text
    assert len(text) == 3 and set(text) <= {"a", "b"}
    with pytest.raises(openai.BadRequestError, match="uniqueItems") as fault:
        ask(client, response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "array", "uniqueItems": True}}})
    assert fault.value.param == "response_format"


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
def test_calls_that_must_be_made(client, choice) -> None:
    how = dict(tools=TOOLS, tool_choice=choice, parallel_tool_calls=False, temperature=1, seed=3, max_tokens=80)
    answer = ask(client, **how).choices[0]
    (call,) = answer.message.tool_calls
    assert answer.finish_reason == "tool_calls" and answer.message.content is None
    assert call.function.name in ("weather", "time") and (choice == "required" or call.function.name == "weather")
    names, arguments, ids = "", "", []
    for event in ask(client, stream=True, **how):
        for part in event.choices[0].delta.tool_calls or ():
            names += part.function.name or ""
            arguments += part.function.arguments or ""
            ids += [part.id] if part.id else []
            assert part.index == 0
    assert (names, arguments, len(ids)) == (call.function.name, call.function.arguments, 1)
    assert event.choices[0].finish_reason == "tool_calls"
    assert names != "weather" or json.loads(arguments)["city"] in ("Oslo", "Rome")


def test_tools_that_may_be_called_and_a_whole_round(client) -> None:
    free = ask(client, tools=TOOLS, max_tokens=8).choices[0]
    assert free.message.content and not free.message.tool_calls
    call = ask(client, tools=TOOLS, tool_choice="required", parallel_tool_calls=False, max_tokens=80).choices[0].message
    history = [*HELLO, call.model_dump(exclude_none=True), {"role": "tool", "tool_call_id": call.tool_calls[0].id, "content": "4 degrees"}]
    assert ask(client, messages=history, tools=TOOLS, max_tokens=4).usage.completion_tokens == 4
    broken = {"role": "assistant", "tool_calls": [{"id": "1", "type": "function", "function": {"name": "weather", "arguments": "{"}}]}
    assert ask(client, messages=[*HELLO, broken, {"role": "tool", "tool_call_id": "1", "content": "x"}], max_tokens=2).usage.completion_tokens == 2
    assert ask(client, tools=TOOLS, tool_choice="none").usage.prompt_tokens == ask(client).usage.prompt_tokens


# ---- the other routes


def test_responses(client) -> None:
    answer = client.responses.create(model="tiny", input="Hello", max_output_tokens=8, temperature=0, instructions="Be brief.")
    assert answer.status == "incomplete" and answer.incomplete_details.reason == "max_output_tokens" and answer.usage.output_tokens == 8
    with client.responses.stream(model="tiny", input="Hello", max_output_tokens=8, temperature=0, instructions="Be brief.") as stream:
        events = list(stream)
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == answer.output_text
    assert [event.sequence_number for event in events] == list(range(len(events)))
    tool = {"type": "function", "name": "weather", "parameters": CITY, "strict": True}
    called = client.responses.create(model="tiny", input="Hello", tools=[tool], tool_choice="required", parallel_tool_calls=False, max_output_tokens=80)
    (call,) = called.output
    assert call.type == "function_call" and json.loads(call.arguments)["city"] in ("Oslo", "Rome") and called.status == "completed"
    gave = {"type": "function_call_output", "call_id": call.call_id, "output": "4"}
    history = [{"role": "user", "content": "Hello"}, call.model_dump(exclude_none=True), gave]
    wanted = {"format": {"type": "json_schema", "name": "x", "schema": SCHEMA}}
    assert set(json.loads(client.responses.create(model="tiny", input=history, text=wanted).output_text)) == {"ok", "n"}
    with pytest.raises(openai.BadRequestError, match="previous_response_id"):
        client.responses.create(model="tiny", input="x", previous_response_id="resp_1")


def test_embeddings(client) -> None:
    texts = ["To be or not to be", "To be or not to be", "banana"]
    same, again, other = (item.embedding for item in client.embeddings.create(model="tiny", input=texts).data)
    plain = client.embeddings.create(model="tiny", input=texts[0], encoding_format="float", dimensions=8).data[0].embedding
    assert len(same) == 96 and len(plain) == 8
    assert math.isclose(sum(x * x for x in same), 1, rel_tol=1e-5) and math.isclose(sum(x * x for x in plain), 1, rel_tol=1e-5)
    assert max(abs(a - b) for a, b in zip(same, again)) < 1e-5 < max(abs(a - b) for a, b in zip(same, other))


def test_tokens_and_the_small_routes(server: Running, client) -> None:
    status, told = raw(server, "/tokenize", {"prompt": "To be", "return_token_strs": True})
    assert status == 200 and "".join(told["token_strs"]) == "To be" and told["max_model_len"] == 2048
    assert raw(server, "/detokenize", {"tokens": told["tokens"]}) == (200, {"prompt": "To be"})
    assert raw(server, "/tokenize", {"messages": HELLO})[1]["count"] == ask(client).usage.prompt_tokens
    assert raw(server, "/health", key=None) == (200, {"status": "ok"})
    assert [model.id for model in client.models.list()] == ["tiny"] and client.models.retrieve("tiny").id == "tiny"
    assert raw(server, "/version")[0] == 200 and raw(server, "/stats")[1]["blocks_total"] > 0


# ---- refusals

BAD = [
    ({"temperture": 1}, "temperture", "did you mean `temperature`"),
    ({"temperature": "1"}, "temperature", "valid number"),
    ({"temperature": -1}, "temperature", "out of range"),
    ({"max_tokens": 0}, "max_tokens", "out of range"),
    ({"max_tokens": True}, "max_tokens", "valid integer"),
    ({"n": 1000}, "n", "out of range"),
    ({"top_p": 0}, "top_p", "out of range"),
    ({"stop": [""]}, "stop", "out of range"),
    ({"messages": []}, "messages", "at least 1"),
    ({"messages": [{"role": "user"}]}, "messages.0", "needs content"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, "messages.0.content.0.type", "Input should be"),
    ({"messages": [{"role": "user", "content": "x" * 20000}]}, "messages", "longer than the context"),
    ({"messages": [{"role": "user", "content": "\ud800"}]}, "messages", "not valid Unicode"),
    ({"logit_bias": {"a": 1}}, "logit_bias", "names no token"),
    ({"logit_bias": {"99999": 1}}, "messages", "not in the vocabulary"),
    ({"tool_choice": "required"}, None, "needs tools"),
    ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "x"}}}, None, "none of the tools"),
    ({"top_logprobs": 2}, None, "needs logprobs"),
    ({"stream_options": {"include_usage": True}}, None, "stream=true"),
    ({"response_format": {"type": "json_schema"}}, "response_format", "needs it"),
    ({"audio": {}}, "audio", "unsupported field"),
    ({"store": True}, "store", "False"),
]


@pytest.mark.parametrize(("more", "param", "said"), BAD, ids=[said for _, _, said in BAD])
def test_a_refusal_names_the_field(server: Running, more: dict, param: str | None, said: str) -> None:
    status, body = raw(server, "/v1/chat/completions", {"model": "tiny", "messages": HELLO, "max_tokens": 2} | more)
    assert status == 400 and set(body) == {"error"} and set(body["error"]) == {"message", "type", "param", "code"}
    assert said in body["error"]["message"] and body["error"]["param"] == param, body
    assert body["error"]["type"] == "invalid_request_error"


def test_what_a_client_sees_of_errors(server: Running, client) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        ask(client, model="gpt-5")
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="wrong").models.list()
    with pytest.raises(openai.BadRequestError) as long:
        client.completions.create(model="tiny", prompt="x " * 5000)
    assert long.value.code == "context_length_exceeded"
    for body, status in ((b"{", 400), (b"", 400), (b"[1]", 400), (b"x" * 200_000, 413), (b'{"messages": ' + b"[" * 5000, 400)):
        assert raw(server, "/v1/chat/completions", body)[0] == status
    assert raw(server, "/nothing")[0] == 404 and raw(server, "/v1/models", key=None)[0] == 401 and raw(server, "/metrics", key=None)[0] == 401
    assert raw(server, "/health", key=None, headers={"Host": "evil.example"})[0] == 403
    assert raw(server, "/health", key=None, headers={"Host": "localhost:1234"})[0] == 200


def test_what_forbids_every_token_is_the_clients_fault(server: Running) -> None:
    first = server.served.tokenizer.encode("y")[0]
    body = {"messages": HELLO, "structured_outputs": {"regex": "y"}, "logit_bias": {str(first): -100}, "max_tokens": 3}
    status, told = raw(server, "/v1/chat/completions", body)
    assert status == 400 and "forbid all" in told["error"]["message"]


def test_a_body_without_a_length_is_counted_too(server: Running) -> None:
    import http.client

    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
    head = {"Content-Type": "application/json", "Authorization": f"Bearer {KEY}", "Transfer-Encoding": "chunked"}
    connection.request("POST", "/v1/completions", iter([b"x" * 60_000, b"x" * 60_000]), head, encode_chunked=True)
    assert connection.getresponse().status == 413


def figures(server: Running) -> dict[str, float]:
    request = urllib.request.Request(server.url + "/metrics", headers={"Authorization": f"Bearer {KEY}"})
    with urllib.request.urlopen(request, timeout=30) as answer:
        lines = [line for line in answer.read().decode().splitlines() if not line.startswith("#")]
    return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines}


def test_metrics_equal_what_the_clients_counted(server: Running, client) -> None:
    label = '{engine="0",model_name="tiny"}'
    before = figures(server)
    used = [ask(client, n=n, temperature=1, max_tokens=6, extra_body={"ignore_eos": True}).usage for n in (1, 2)]
    for _ in client.completions.create(model="tiny", prompt="To be", max_tokens=5, stream=True, extra_body={"ignore_eos": True}):
        pass
    after = figures(server)
    prompts = sum(usage.prompt_tokens for usage in used) + len(server.served.tokenizer.encode("To be", special=True))
    grown = {name: after[name] - before.get(name, 0) for name in after}
    assert grown[f"vllm:prompt_tokens_total{label}"] == prompts
    assert grown[f"vllm:generation_tokens_total{label}"] == 6 + 12 + 5
    assert grown[f"vllm:time_to_first_token_seconds_count{label}"] == grown[f"vllm:e2e_request_latency_seconds_count{label}"] == 3
    assert grown['vllm:request_success_total{engine="0",finished_reason="length",model_name="tiny"}'] == 4
    parts = {part: grown[f"vllm:request_{part}_time_seconds_sum{label}"] for part in ("queue", "prefill", "decode", "inference")}
    assert all(grown[f"vllm:request_{part}_time_seconds_count{label}"] == 3 for part in parts)
    assert parts["inference"] == pytest.approx(parts["prefill"] + parts["decode"]), "queue, prefill and decode follow each other"
    assert parts["queue"] + parts["prefill"] == pytest.approx(grown[f"vllm:time_to_first_token_seconds_sum{label}"])
    assert parts["queue"] + parts["inference"] <= grown[f"vllm:e2e_request_latency_seconds_sum{label}"]
    assert grown[f"vllm:request_max_num_generation_tokens_sum{label}"] == 6 + 6 + 5
    steps = [grown[f"{name}{label}"] for name in ("vllm:iteration_tokens_total_count", "lilliput:engine_steps_total")]
    assert steps[0] == steps[1] > 0 and grown[f"vllm:iteration_tokens_total_sum{label}"] >= 6 + 12 + 5
    assert 'vllm:lora_requests_info{max_lora="16",model_name="tiny",running_lora_adapters="",waiting_lora_adapters=""}' in after
    assert after[f"vllm:num_requests_running{label}"] == 0 and after[f"vllm:kv_cache_usage_perc{label}"] <= 1


def test_accepted_guesses_are_counted_by_their_place(guessing: Running) -> None:
    guessing.client().completions.create(model="tiny", prompt="a b c d " * 20, max_tokens=60, temperature=0, extra_body={"ignore_eos": True})
    label, found = 'engine="0",model_name="tiny"', figures(guessing)
    places = [found[name] for at in range(8) if (name := f'vllm:spec_decode_num_accepted_tokens_per_pos_total{{{label},position="{at}"}}') in found]
    assert sum(places) == found[f"vllm:spec_decode_num_accepted_tokens_total{{{label}}}"] > 0
    assert places == sorted(places, reverse=True) and places[0] <= found[f"vllm:spec_decode_num_drafts_total{{{label}}}"]


def test_the_dashboard_asks_for_metrics_that_exist(guessing: Running) -> None:
    guessing.client().completions.create(model="tiny", prompt="a b c d " * 20, max_tokens=60, temperature=0, extra_body={"ignore_eos": True})
    raw(guessing, "/nothing")
    names = {name.partition("{")[0] for name in figures(guessing)}
    dashboard = json.loads((Path(__file__).parents[2] / "docs" / "grafana.json").read_text())
    asked = {name for panel in dashboard["panels"] for target in panel["targets"] for name in re.findall(r"(?:vllm|lilliput):\w+", target["expr"])}
    assert len(asked) >= 24 and asked <= names, asked - names


def test_several_models_each_behind_its_name(tmp_path_factory: pytest.TempPathFactory) -> None:
    with running(tmp_path_factory.mktemp("pair"), models=2) as pair:
        client = pair.client()
        assert [model.id for model in client.models.list()] == ["tiny", "tiny-2"] and client.models.retrieve("tiny-2").id == "tiny-2"
        for name in ("tiny", "tiny-2"):
            assert ask(client, model=name, max_tokens=5).model == name
        status, answer = raw(pair, "/v1/completions", {"prompt": "a", "max_tokens": 3})
        assert status == 200 and answer["model"] == "tiny", "who names no model gets the first"
        with pytest.raises(openai.NotFoundError, match="`tiny`, `tiny-2`"):
            ask(client, model="other")
        found = figures(pair)
        tokens = {name: found[f'vllm:generation_tokens_total{{engine="0",model_name="{name}"}}'] for name in ("tiny", "tiny-2")}
        steps = [found[f'lilliput:engine_steps_total{{engine="0",model_name="{name}"}}'] for name in tokens]
        assert tokens == {"tiny": 8, "tiny-2": 5} and all(steps)
        request = urllib.request.Request(pair.url + "/metrics", headers={"Authorization": f"Bearer {KEY}"})
        with urllib.request.urlopen(request, timeout=30) as page:
            kinds = [line.split()[2] for line in page.read().decode().splitlines() if line.startswith("# TYPE")]
        assert len(kinds) == len(set(kinds)), "a family is written once"
        stats = raw(pair, "/stats")[1]["models"]
        assert [one["model"] for one in stats] == ["tiny", "tiny-2"] and all(one["generated"] for one in stats)
