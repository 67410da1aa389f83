"""The front of replicas: the only socket. It guards, reads a request whole, asks a replica and passes its answer on as it comes.

A replica may die at any moment. As long as nothing of an answer has been sent, the request is asked again of another one, so the client sees
nothing; a stream that had begun ends with an error event, since its tokens may differ. A client that leaves ends its request on the replica.
/metrics is all replicas' pages in one (each under its own `engine`), /stats the sum over replicas for each model.
"""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from lilliput.base.job import Http
from lilliput.base.version import __version__
from lilliput.serve.http import Guard, admit_origins, put_page
from lilliput.serve.openai.errors import ApiError
from lilliput.serve.openai.reply import DONE, event, left, until_left
from lilliput.serve.routing import digests, text_of

TRIES = 3  # replicas that are asked for one answer
ONE_REPLICA = dict.fromkeys(("/v1/load_lora_adapter", "/v1/unload_lora_adapter"), "adapters are loaded from serve.adapters when replicas start")
ONE_REPLICA |= {"/reset_prefix_cache": "restart the replicas to forget prefixes"}
KEPT = ("type", "http_version", "method", "scheme", "path", "raw_path", "query_string", "root_path", "headers", "client", "server")


class Front:
    """The application of the front. `handle`: of the replicas (replicas.start); `lost`: the exceptions that mean that a replica has died."""

    def __init__(self, handle: Any, lost: tuple[type[BaseException], ...], options: Http, keys: tuple[str, ...] = (), page: Path | None = None) -> None:
        """`keys`: any of them opens it, none = it is open; `page`: folder of the web page."""
        self.handle, self.lost, self.options = handle, lost, options
        self.ending, self.again = False, 0
        self.refused: Counter[int] = Counter()  # by status, before a replica was asked
        self.app = FastAPI(title="Lilliput", version=__version__, docs_url=None, redoc_url=None, openapi_url=None)
        self._about()
        free = put_page(self.app, page)
        self.app.add_api_route("/{path:path}", self._pass_on, methods=["GET", "POST"])
        self.app.add_middleware(Guard, options=options, refused=self.refuse, keys=keys, free=free)
        admit_origins(self.app, options)

    def refuse(self, status: int) -> None:
        """A request that no replica was asked."""
        self.refused[status] += 1

    async def stop(self) -> None:
        """Take no new requests; uvicorn waits for the open ones."""
        self.ending = True

    def _about(self) -> None:
        @self.app.get("/health", response_model=None)
        @self.app.get("/ping", response_model=None)
        async def health() -> Response:
            return JSONResponse({"status": "stopping" if self.ending else "ok"}, 503 if self.ending else 200)

        @self.app.get("/metrics", response_model=None)
        async def metrics() -> Response:
            mine = f"# HELP lilliput:requests_asked_again Requests whose replica had died.\n# TYPE lilliput:requests_asked_again counter\n" \
                   f"lilliput:requests_asked_again_total {self.again}\n"  # fmt: skip
            mine += "# HELP lilliput:requests_refused_total Requests answered with an error, by status.\n# TYPE lilliput:requests_refused_total counter\n"
            mine += "".join(f'lilliput:requests_refused_total{{engine="front",model_name="",status="{status}"}} {count}\n' for status, count in
                            sorted(self.refused.items()))  # fmt: skip
            return Response(merged([*await self._all("metrics"), mine]), media_type="text/plain; version=0.0.4")

        @self.app.get("/stats", response_model=None)
        async def stats() -> Response:
            models = summed(await self._all("figures"))
            return JSONResponse({**models[0], "models": models} if models else {"models": []})

        @self.app.get("/load", response_model=None)
        async def load() -> Response:
            return JSONResponse({"server_load": sum(one["requests"] for one in summed(await self._all("figures")))})

    async def _all(self, method: str) -> list[Any]:
        """What every replica that is there says."""
        found = await self.handle.broadcast(method).results_async(return_exceptions=True)
        return [one for one in found if not isinstance(one, BaseException)]

    async def _pass_on(self, request: Request) -> Response:
        refusal = ApiError("the server is stopping", status=503) if self.ending else None
        if (why := ONE_REPLICA.get(request.url.path)) is not None:
            refusal = ApiError(f"it would reach one replica alone: {why}", status=403)
        if refusal is not None:
            self.refuse(refusal.status)
            return JSONResponse(refusal.body(), refusal.status, refusal.headers)
        body = await request.body()
        return Passed(self, {name: value for name, value in request.scope.items() if name in KEPT}, body)

    async def messages(self, call: Mapping[str, Any], body: bytes) -> AsyncIterator[dict[str, Any]]:
        """An answer's messages, from the replica that gives it. ApiError 503 when none does."""
        keys = digests(text_of(read(body))) if call["method"] == "POST" else []
        for _ in range(TRIES):
            begun = False
            start: dict[str, Any] | None = None
            stream = self.handle.options(stream=True).answer.remote(call, body, keys=keys)
            try:
                async for message in stream:
                    if message["type"] == "http.response.start":
                        start = message  # held until there is something of the answer itself
                        continue
                    if start is not None:
                        begun = True
                        yield start
                        start = None
                    yield message
                return
            except self.lost:
                if begun:
                    yield {"type": "http.response.body", "body": event(ApiError("the replica that wrote this has died", status=500).body()) + DONE}
                    return
                self.again += 1
            finally:
                stream.cancel()
        raise ApiError("no replica answers", status=503)


class Passed(Response):
    """A replica's answer on its way to the client, which may leave."""

    def __init__(self, front: Front, call: Mapping[str, Any], body: bytes) -> None:
        """`call`, `body`: the request."""
        self._front, self._call, self._body = front, call, body
        self.background = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI's entry."""
        await until_left(self._write(send), receive)

    async def _write(self, send: Send) -> None:
        try:
            async with contextlib.aclosing(self._front.messages(self._call, self._body)) as messages:  # type: ignore[type-var]
                async for message in messages:
                    await send(message)
        except ApiError as error:
            self._front.refuse(error.status)
            await JSONResponse(error.body(), error.status, error.headers)({"type": "http"}, left, send)  # type: ignore[arg-type]


def read(body: bytes) -> dict[str, Any]:
    """A JSON object; empty for anything else, which the replica will refuse."""
    try:
        found = json.loads(body)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def merged(pages: Iterable[str]) -> str:
    """Prometheus pages in one: each family's head once, then the samples of all."""
    families: dict[str, tuple[list[str], list[str]]] = {}
    for page in pages:
        name = ""
        for line in page.splitlines():
            if line.startswith("# HELP "):
                name = line.split(" ", 3)[2]
            head, samples = families.setdefault(name, ([], []))
            if not line.startswith("#"):
                samples.append(line)
            elif len(head) < 2 and line not in head:
                head.append(line)
    return "".join(f"{line}\n" for head, samples in families.values() for line in (*head, *samples))


def summed(replicas: Sequence[Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """The figures of each model over its replicas: counts are added, the longest step is kept, names are those of all."""
    found: dict[str, dict[str, Any]] = {}
    for replica in replicas:
        for one in replica:
            into = found.setdefault(one["model"], {"model": one["model"], "replicas": 0})
            into["replicas"] += 1
            for name, value in one.items():
                if name == "last_step_seconds":
                    into[name] = max(into.get(name, 0.0), value)
                elif isinstance(value, int | float):
                    into[name] = into.get(name, 0) + value
                elif name != "model":
                    into.setdefault(name, value)
    return list(found.values())
