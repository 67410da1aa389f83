"""The front of replicas without Ray: what it passes on, asks again, breaks off, adds up; and a replica's application without a socket."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="needs the extra `serve`")

from fastapi import FastAPI, Request
from starlette.responses import JSONResponse, StreamingResponse

from lilliput.base.job import Job
from lilliput.serve.front import Front, merged, read, summed
from lilliput.serve.replicas import Replica
from lilliput.serve.routing import digests, text_of

START = {"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"application/json")]}
BODY = {"type": "http.response.body", "body": b"{}", "more_body": False}
BIT = {"type": "http.response.body", "body": b"data: 1\n\n", "more_body": True}


class LostError(Exception):
    """A replica has died."""


class Stream:
    """What a call gives: messages, or the death of the replica after them."""

    def __init__(self, messages: list[Any]) -> None:
        self.messages, self.cancelled = messages, False

    async def __aiter__(self) -> AsyncIterator[dict[str, Any]]:
        for message in self.messages:
            if message is LostError:
                raise LostError
            if message is None:
                await asyncio.sleep(60)
            yield message

    def cancel(self) -> None:
        self.cancelled = True


class Handle:
    """Ray Serve's handle, with answers laid out."""

    def __init__(self, *answers: list[Any], pages: dict[str, list[Any]] | None = None) -> None:
        self.streams, self.calls, self.pages = [Stream(answer) for answer in answers], [], pages or {}
        self.answer = self

    def options(self, stream: bool) -> Handle:
        assert stream
        return self

    def remote(self, call: dict[str, Any], body: bytes, keys: list[bytes]) -> Stream:
        self.calls.append((call, body, keys))
        return self.streams[len(self.calls) - 1]

    def broadcast(self, method: str) -> Handle:
        self.found = self.pages[method]
        return self

    async def results_async(self, return_exceptions: bool) -> list[Any]:
        assert return_exceptions
        return self.found


def front(handle: Handle, *settings: str, **more: Any) -> Front:
    return Front(handle, (LostError,), Job.load(None, ["http.max_body=2000", *settings]).http, **more)


def ask(app: Any, path: str = "/v1/completions", body: bytes = b'{"prompt": "x"}', leave: asyncio.Event | None = None, method: str = "", **headers: str) -> Any:
    """(status, body) of a request through ASGI."""

    async def main() -> tuple[int, bytes]:
        sent: list[dict[str, Any]] = []
        asked = False

        async def receive() -> dict[str, Any]:
            nonlocal asked
            if not asked:
                asked = True
                return {"type": "http.request", "body": body, "more_body": False}
            await (asyncio.sleep(0.05) if leave else asyncio.sleep(60))
            return {"type": "http.disconnect"}

        async def send(message: dict[str, Any]) -> None:
            sent.append(message)

        head = [(b"host", b"localhost"), *((name.encode(), value.encode()) for name, value in headers.items())]
        scope = {"type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": method or ("POST" if body else "GET"), "scheme": "http",
                 "path": path, "raw_path": path.encode(), "query_string": b"", "root_path": "", "headers": head,
                 "client": ("127.0.0.1", 1), "server": ("x", 1)}  # fmt: skip
        await asyncio.wait_for(app(scope, receive, send), 20)
        status = next((message["status"] for message in sent if message["type"] == "http.response.start"), 0)
        return status, b"".join(message.get("body", b"") for message in sent)

    return asyncio.run(main())


def test_an_answer_is_passed_on_with_the_digests_of_its_text() -> None:
    handle, body = Handle([START, BODY]), json.dumps({"model": "m", "prompt": "y" * 400}).encode()
    assert ask(front(handle).app, body=body) == (200, b"{}")
    (call, passed, keys), = handle.calls
    assert passed == body and keys == digests(text_of(json.loads(body))) and len(keys) == 3
    assert call["path"] == "/v1/completions" and (b"host", b"localhost") in call["headers"] and "app" not in call, "only what can travel"


def test_a_replica_that_dies_before_its_answer_is_replaced_by_another() -> None:
    one = front(Handle([LostError], [START, LostError], [START, BODY]))
    assert ask(one.app) == (200, b"{}"), "a head without a body had not been sent"
    assert one.again == 2 and all(stream.cancelled for stream in one.handle.streams)
    status, text = ask(front(Handle([LostError], [LostError], [LostError])).app)
    assert status == 503 and b"no replica answers" in text


def test_a_stream_that_had_begun_ends_with_an_error() -> None:
    one = front(Handle([START, BIT, LostError]))
    status, text = ask(one.app)
    assert status == 200 and text.startswith(b"data: 1\n\n") and b"has died" in text and text.endswith(b"data: [DONE]\n\n") and one.again == 0


def test_a_client_that_leaves_ends_its_call() -> None:
    handle = Handle([START, BIT, None])
    assert ask(front(handle).app, leave=asyncio.Event())[1] == b"data: 1\n\n"
    assert handle.streams[0].cancelled


def test_the_front_guards() -> None:
    handle = Handle([START, BODY])
    app = front(handle, keys=("secret",)).app
    assert ask(app)[0] == 401 and ask(app, host="evil.example")[0] == 403 and handle.calls == []
    assert ask(app, authorization="Bearer secret", **{"content-length": "3000"})[0] == 413
    assert ask(app, authorization="Bearer secret")[0] == 200
    assert ask(app, "/health", b"")[0] == 200


def test_what_would_reach_one_replica_alone_is_refused() -> None:
    handle = Handle([START, BODY])
    for path in ("/v1/load_lora_adapter", "/v1/unload_lora_adapter"):
        status, text = ask(front(handle).app, path)
        assert status == 403 and b"when replicas start" in text
    assert handle.calls == []


def test_a_preflight_is_answered_by_the_front_and_refusals_are_counted() -> None:
    asks = {"origin": "https://page.example", "access-control-request-method": "POST"}
    handle = Handle([LostError], [LostError], [LostError], pages={"metrics": []})
    one = front(handle, "http.cors=https://page.example", keys=("secret",))
    assert ask(one.app, body=b"", method="OPTIONS", **asks)[0] == 200 and handle.calls == []
    assert ask(one.app, body=b"", method="OPTIONS", **{**asks, "origin": "https://evil.example"})[0] == 400
    assert ask(front(handle).app, body=b"", method="OPTIONS", **asks)[0] == 405, "no origin is named"
    key = {"authorization": "Bearer secret"}
    assert [ask(one.app)[0], ask(one.app)[0], ask(one.app, "/reset_prefix_cache", **key)[0], ask(one.app, **key)[0]] == [401, 401, 403, 503]
    page = ask(one.app, "/metrics", b"", **key)[1].decode()
    for status, count in ((401, 2), (403, 1), (503, 1)):
        assert f'lilliput:requests_refused_total{{engine="front",model_name="",status="{status}"}} {count}' in page


def test_while_stopping_nothing_new_is_taken() -> None:
    one = front(Handle([START, BODY]))
    asyncio.run(one.stop())
    assert ask(one.app)[0] == 503 and ask(one.app, "/health", b"")[0] == 503 and one.handle.calls == []


PAGE = """# HELP vllm:x Text.
# TYPE vllm:x counter
vllm:x_total{engine="%s"} %d
# HELP vllm:y Other text.
# TYPE vllm:y gauge
vllm:y{engine="%s"} 1.0
"""


def test_pages_of_replicas_become_one() -> None:
    text = merged([PAGE % ("a", 1, "a"), PAGE % ("b", 2, "b")])
    assert text.splitlines() == ["# HELP vllm:x Text.", "# TYPE vllm:x counter", 'vllm:x_total{engine="a"} 1', 'vllm:x_total{engine="b"} 2',
                                 "# HELP vllm:y Other text.", "# TYPE vllm:y gauge", 'vllm:y{engine="a"} 1.0', 'vllm:y{engine="b"} 1.0']  # fmt: skip
    one = front(Handle(pages={"metrics": [PAGE % ("a", 1, "a"), LostError(), PAGE % ("b", 2, "b")]}))
    status, found = ask(one.app, "/metrics", b"")
    assert status == 200 and found.decode().startswith(text) and b"lilliput:requests_asked_again_total 0" in found


def test_figures_are_summed_for_each_model() -> None:
    said = lambda tokens, step: [{"model": "m", "adapters": (), "generated": tokens, "last_step_seconds": step}, {"model": "n", "adapters": (), "generated": 1}]
    found = summed([said(3, 0.2), said(4, 0.1)])
    assert [(one["model"], one["generated"], one["replicas"]) for one in found] == [("m", 7, 2), ("n", 2, 2)] and found[0]["last_step_seconds"] == 0.2
    one = front(Handle(pages={"figures": [said(3, 0.2)]}))
    assert json.loads(ask(one.app, "/stats", b"")[1])["models"][0]["generated"] == 3
    assert json.loads(ask(front(Handle(pages={"figures": []})).app, "/stats", b"")[1]) == {"models": []}


def test_what_is_no_object_has_no_text() -> None:
    assert [read(body) for body in (b"", b"[1]", b"{", b'{"a": 1}', b"\xff")] == [{}, {}, {}, {"a": 1}, {}]


# ---- a replica without its actor


def replica(make: Callable[[FastAPI], None]) -> Any:
    app = FastAPI()
    make(app)
    made = object.__new__(Replica)
    made._app = app
    return made


CALL = {"type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "scheme": "http", "path": "/x", "raw_path": b"/x",
        "query_string": b"", "root_path": "", "headers": [(b"content-type", b"application/json")], "client": None, "server": None}  # fmt: skip


def test_a_replica_answers_a_call_and_joins_what_is_there_at_once() -> None:
    def make(app: FastAPI) -> None:
        @app.post("/x")
        async def x(request: Request) -> JSONResponse:
            return JSONResponse(await request.json())

        @app.post("/s")
        async def s() -> StreamingResponse:
            async def bits() -> AsyncIterator[bytes]:
                for at in range(50):
                    yield b"%d\n" % at

            return StreamingResponse(bits())

    async def main() -> None:
        one = replica(make)
        found = [message async for message in one.answer(CALL, b'{"a": 1}')]
        assert found[0]["status"] == 200 and b"".join(message.get("body", b"") for message in found) == b'{"a":1}'
        found = [message async for message in one.answer({**CALL, "path": "/s", "raw_path": b"/s"}, b"")]
        assert b"".join(message.get("body", b"") for message in found).splitlines() == [b"%d" % at for at in range(50)]
        assert found[-1]["more_body"] is False

    asyncio.run(main())


def test_closing_the_call_tells_the_application_that_the_client_left() -> None:
    left: list[str] = []

    def make(app: FastAPI) -> None:
        @app.post("/x")
        async def x(request: Request) -> StreamingResponse:
            async def bits() -> AsyncIterator[bytes]:
                try:
                    yield b"a"
                    await asyncio.sleep(60)
                finally:
                    left.append("left")

            return StreamingResponse(bits())

    async def main() -> None:
        stream = replica(make).answer(CALL, b"")
        found = [await anext(stream), await anext(stream)]
        assert found[1]["body"] == b"a"
        await stream.aclose()

    asyncio.run(asyncio.wait_for(main(), 10))
    assert left == ["left"]
