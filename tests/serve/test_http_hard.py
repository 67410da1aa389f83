"""What a server meets: clients that leave at any moment, more requests than it takes, time limits, and bodies that nobody would write."""

from __future__ import annotations

import json
import random
import socket
import struct
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import pytest
from http_server import KEY, Running, running

pytest.importorskip("fastapi", reason="needs the extra `serve`")
pytest.importorskip("llguidance", reason="needs the extra `structured`")

HELLO = [{"role": "user", "content": "Hello"}]
CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
FORMAT = {"type": "json_schema", "json_schema": {"name": "x", "schema": CITY}}
LONG = {"messages": HELLO, "max_tokens": 1900, "ignore_eos": True}


TIGHT = ("serve.kv_tokens=4096", "serve.swap_tokens=1024", "serve.draft=ngram")  # so that requests wait, lose their blocks, and guess ahead


@pytest.fixture(scope="module", params=[(), TIGHT], ids=["plenty", "tight"])
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with running(tmp_path_factory.mktemp("hard"), "http.max_requests=24", *request.param) as server:
        yield server


def post(server: Running, body: dict[str, Any], path: str = "/v1/chat/completions") -> Any:
    head = {"Content-Type": "application/json", "Authorization": f"Bearer {KEY}"}
    return urllib.request.urlopen(urllib.request.Request(server.url + path, json.dumps(body).encode(), head), timeout=60)


def until(good: Callable[[], bool], seconds: float = 15) -> bool:
    """Whether it becomes true in time."""
    end = time.monotonic() + seconds
    while not good() and time.monotonic() < end:
        time.sleep(0.01)
    return good()


def idle(server: Running) -> bool:
    """Nothing is held by anybody."""
    stats = server.served.engine.stats()
    return server.served.open == stats.running == stats.waiting == stats.blocks_used == 0


def leave(server: Running, seed: int) -> None:
    """A client that asks for something and leaves: at once, after a moment, or after some of the answer; politely or not."""
    draw = random.Random(seed)
    path, body = draw.choice([
        ("/v1/chat/completions", LONG),
        ("/v1/chat/completions", LONG | {"n": 3}),
        ("/v1/chat/completions", LONG | {"response_format": FORMAT}),
        ("/v1/chat/completions", LONG | {"tools": [{"type": "function", "function": {"name": "f", "parameters": CITY}}]}),
        ("/v1/completions", {"prompt": ["To be", "x " * 300], "max_tokens": 1200, "ignore_eos": True}),
        ("/v1/responses", {"input": "Hello", "max_output_tokens": 1900}),
        ("/v1/embeddings", {"input": "Hello"}),
    ])  # fmt: skip
    if "embeddings" not in path:
        body = body | {"stream": draw.random() < 0.6}
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {KEY}\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    whole = head.encode() + data
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as connection:
        if draw.random() < 0.5:  # without the goodbye: the connection is reset
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.sendall(whole if draw.random() < 0.85 else whole[: draw.randrange(1, len(whole))])
        time.sleep(draw.choice([0, 0, 0.002, 0.01, 0.03]))
        if draw.random() < 0.3:
            connection.settimeout(0.2)
            with suppress(TimeoutError):
                connection.recv(draw.randrange(1, 3000))


def disconnects(server: Running, count: int) -> None:
    before = server.served.engine.stats().steps
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda seed: leave(server, seed), range(count)))
    assert until(lambda: idle(server)), (server.served.open, server.served.engine.stats())
    assert server.served.engine.stats().steps > before, "some of them ran"
    engine = server.served.engine.engine
    assert not engine._requests and not server.served.engine._readers
    with post(server, {"messages": HELLO, "max_tokens": 3, "ignore_eos": True}) as answer:
        assert json.loads(answer.read())["usage"]["completion_tokens"] == 3


def test_clients_that_leave_leave_no_block(server: Running) -> None:
    disconnects(server, 100)


@pytest.mark.slow
def test_a_thousand_clients_that_leave_leave_no_block(server: Running) -> None:
    disconnects(server, 1000)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_ends_its_request_within_a_step(server: Running, stream: bool) -> None:
    data = json.dumps(LONG | {"stream": stream}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {KEY}\r\nContent-Type: application/json\r\n"
    connection = socket.create_connection(("127.0.0.1", server.port), timeout=30)
    connection.sendall(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
    assert until(lambda: server.served.engine.stats().running == 1)
    connection.close()
    assert until(lambda: server.served.open == 0)
    steps = server.served.engine.stats().steps
    assert until(lambda: idle(server))
    assert server.served.engine.stats().steps - steps <= 1


def test_more_than_it_takes_is_refused_and_health_answers(server: Running) -> None:
    streams = [post(server, LONG | {"stream": True}) for _ in range(24)]
    assert until(lambda: server.served.open == 24)
    with pytest.raises(urllib.error.HTTPError) as full:
        post(server, LONG)
    assert full.value.code == 503 and full.value.headers["Retry-After"] == "1" and json.loads(full.value.read())["error"]["code"] == "overloaded"
    for _ in range(20):
        with urllib.request.urlopen(server.url + "/health", timeout=10) as answer:
            assert answer.status == 200
    for stream in streams:
        stream.close()
    assert until(lambda: idle(server))


def test_the_time_limit_ends_a_request(tmp_path_factory: pytest.TempPathFactory) -> None:
    with running(tmp_path_factory.mktemp("limits"), "http.timeout=0.05", "http.max_tokens=1900", "generate.temperature=0") as server:
        with pytest.raises(urllib.error.HTTPError) as late:
            post(server, LONG)
        assert late.value.code == 504 and json.loads(late.value.read())["error"]["type"] == "timeout_error"
        with post(server, LONG | {"stream": True}) as stream:
            text = stream.read().decode()
        assert text.rstrip().endswith("data: [DONE]") and "longer than this server's limit" in text.splitlines()[-4]
        assert until(lambda: idle(server))
        with pytest.raises(urllib.error.HTTPError) as many:
            post(server, LONG | {"max_tokens": 1901})
        assert many.value.code == 400 and json.loads(many.value.read())["error"]["param"] == "max_tokens"
        texts = set()
        for _ in range(2):  # what the server was told about sampling holds where a request says nothing
            with post(server, {"prompt": "To be", "max_tokens": 8}, "/v1/completions") as answer:
                texts.add(json.loads(answer.read())["choices"][0]["text"])
        assert len(texts) == 1


def test_streams_of_many_clients_are_each_their_own(server: Running) -> None:
    prompts = [f"{word} {number}" for number, word in enumerate(["To be", "My lord", "ROMEO:", "What is"] * 4)]

    def read(prompt: str) -> str:
        with post(server, {"prompt": prompt, "max_tokens": 60, "temperature": 0, "stream": True}, "/v1/completions") as stream:
            events = [line[6:] for line in stream.read().decode().splitlines() if line.startswith("data: ")]
        return "".join(json.loads(event)["choices"][0]["text"] for event in events if event != "[DONE]")

    alone = [read(prompt) for prompt in prompts]
    with ThreadPoolExecutor(16) as pool:
        assert list(pool.map(read, prompts)) == alone


# ---- slow: 500 schemas, and schemathesis


UNENFORCED = [{"not": {"type": "null"}}, {"uniqueItems": True}, {"contains": {"const": 1}}, {"if": {}, "then": {}}, {"propertyNames": {"maxLength": 3}},
              {"dependentRequired": {"a": ["b"]}}, {"unevaluatedProperties": False}, {"contentEncoding": "base64"}, {"nullable": True}]  # fmt: skip


def schema_of(draw: random.Random, depth: int) -> dict[str, Any]:
    """A random schema over all keywords, some of which nobody enforces."""
    flat = ["string", "integer", "number", "boolean", "null", "enum", "const", "types", "pattern", "format"]
    kind = draw.choice([*flat, "object", "array", "anyOf", "oneOf", "allOf", "ref"] if depth else flat)
    low = draw.randrange(-50, 50)
    inner = lambda: schema_of(draw, depth - 1)
    found: dict[str, Any] = {
        "string": lambda: {"type": "string", "maxLength": draw.randrange(1, 8), **({"minLength": draw.randrange(0, 3)} if draw.random() < 0.4 else {})},
        "integer": lambda: {"type": "integer", "minimum": low, "maximum": low + draw.randrange(0, 2000)},
        "number": lambda: {"type": "number", **draw.choice([{"exclusiveMinimum": low, "maximum": low + 5.5}, {"multipleOf": draw.choice([2, 0.25])}])},
        "boolean": lambda: {"type": "boolean"},
        "null": lambda: {"type": "null"},
        "enum": lambda: {"enum": draw.sample(["a", "b c", 'q"', "é", 1, -2.5, True, None, [1, "x"], {"k": {}}], draw.randrange(1, 5))},
        "const": lambda: {"const": draw.choice(["x\n", 7, False, {"a": [None]}])},
        "types": lambda: {"type": draw.sample(["boolean", "null", "integer"], 2)},
        "pattern": lambda: {"type": "string", "pattern": draw.choice([r"^[a-f]{2,5}$", r"^\d{1,3}-\d$", r"ab", r"^(yes|no)$", r"^\w{1,4}$", r"(?!a)b"])},
        "format": lambda: {"type": "string", "format": draw.choice(["date", "time", "date-time", "uuid", "ipv4", "email", "hostname", "duration", "color"])},
        "object": lambda: _object(draw, inner),
        "array": lambda: {"type": "array", "items": inner(), "maxItems": draw.randrange(1, 4), **({"minItems": 1} if draw.random() < 0.4 else {})},
        "anyOf": lambda: {"anyOf": [inner() for _ in range(draw.randrange(1, 4))]},
        "oneOf": lambda: {"oneOf": [inner() for _ in range(draw.randrange(1, 3))]},
        "allOf": lambda: {"allOf": [inner() for _ in range(draw.randrange(1, 3))]},
        "ref": lambda: {"$defs": {"d": inner()}, "type": "array", "items": {"$ref": "#/$defs/d"}, "maxItems": 2} if depth > 2 else {"$ref": "#/$defs/no"},
    }[kind]()
    if draw.random() < 0.2:
        found |= {"title": "T", "description": "D"}
    return found | (draw.choice(UNENFORCED) if draw.random() < 0.06 else {})


def _object(draw: random.Random, inner: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    names = draw.sample(["a", "b", "long name", 'q"uote', "é", "$x"], draw.randrange(0, 4))
    found: dict[str, Any] = {"type": "object", "properties": {name: inner() for name in names}, "required": [n for n in names if draw.random() < 0.6]}
    extra = draw.choice([False, False, False, inner(), None])
    return found | ({} if extra is None else {"additionalProperties": extra}) | ({"patternProperties": {"^z": inner()}} if draw.random() < 0.1 else {})


def try_schemas(server: Running, count: int) -> Counter[str]:
    """Valid, refused (with a reason), or cut at the limit; anything else fails."""
    jsonschema_rs = pytest.importorskip("jsonschema_rs", reason="needs jsonschema_rs, which schemathesis brings")

    def one(seed: int) -> str:
        schema = schema_of(random.Random(seed), 3)
        body = {"messages": HELLO, "max_tokens": 300, "temperature": 1, "seed": seed}
        try:
            with post(server, body | {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}}) as answer:
                choice = json.loads(answer.read())["choices"][0]
        except urllib.error.HTTPError as error:
            said = json.loads(error.read())["error"]
            assert error.code == 400 and said["param"] == "response_format" and len(said["message"]) > 20, (schema, error.code, said)
            return "refused"
        if choice["finish_reason"] == "length":
            return "cut"
        check = jsonschema_rs.validator_for(schema, validate_formats=True)
        assert check.is_valid(json.loads(choice["message"]["content"])), (schema, choice["message"]["content"])
        return "valid"

    with ThreadPoolExecutor(8) as pool:
        return Counter(pool.map(one, range(count)))


def test_json_schemas_give_valid_answers_or_a_400(server: Running) -> None:
    found = try_schemas(server, 40)
    assert found["valid"] >= 15 and found["refused"] >= 3, found


@pytest.mark.slow
def test_500_json_schemas_give_valid_answers_or_a_400(server: Running) -> None:
    found = try_schemas(server, 500)
    assert found["valid"] >= 250 and found["refused"] >= 30, found


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_schemathesis_finds_no_5xx(tmp_path_factory: pytest.TempPathFactory) -> None:
    schemathesis = pytest.importorskip("schemathesis", reason="needs schemathesis")
    from hypothesis import HealthCheck, given, settings

    with running(tmp_path_factory.mktemp("fuzz"), "http.max_tokens=8", "http.embeddings=mean") as server:
        head = {"Authorization": f"Bearer {KEY}"}
        schema = schemathesis.openapi.from_url(server.url + "/openapi.json", headers=head)
        seen: Counter[int] = Counter()
        lock = threading.Lock()
        for operation in (found.ok() for found in schema.get_all_operations()):

            @given(case=operation.as_strategy())
            @settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck), database=None, derandomize=True)
            def attack(case: Any) -> None:
                answer = case.call(headers=head, timeout=60)
                with lock:
                    seen[answer.status_code] += 1
                assert answer.status_code < 500, (answer.status_code, case.as_curl_command(), answer.text)

            attack()
        assert sum(seen.values()) >= 1200 and seen[200] >= 50, seen
        assert until(lambda: idle(server))
