"""The HTTP server: OpenAI's API, health, metrics and the web page, in one process beside the engine's thread.

    POST /v1/chat/completions  /v1/completions  /v1/responses  /v1/embeddings  /tokenize  /detokenize
    GET  /v1/models  /health  /version  /metrics  /stats  /openapi.json  /

It listens on loopback and answers only to names of this machine there, so that no web page can reach it through a name of its own (DNS
rebinding). Keys guard everything but /health and the page's files. Pages of other origins get nothing unless http.cors names them.
A body is counted while it is read; a client that leaves frees its blocks within a step; SIGTERM refuses new requests, lets the open
ones end for http.drain seconds and exits with 0.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import signal
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from starlette.exceptions import HTTPException
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lilliput.base.errors import UserError
from lilliput.base.version import __version__
from lilliput.serve.openai import chat, completions, extras, protocol, responses
from lilliput.serve.openai.errors import ApiError, from_user_error, from_validation
from lilliput.serve.openai.protocol import ChatRequest, CompletionRequest, DetokenizeRequest, EmbeddingRequest, TokenizeRequest
from lilliput.serve.openai.reply import EventStream, GoneError, unless_gone
from lilliput.serve.openai.served import Served
from lilliput.serve.traces import PARENT

if TYPE_CHECKING:
    from lilliput.base.job import Http

OPEN_PATHS = ("/health", "/")  # without a key; the page's files too
LOOPBACK = ("127.0.0.1", "::1", "localhost")
WARM_AFTER = 2.0  # seconds; the first answer comes first
GONE = 499  # nginx's word for a client that left; nobody reads it


def application(served: Served, keys: tuple[str, ...] = (), page: Path | None = None) -> FastAPI:
    """The ASGI application. `keys`: any of them opens it, none = it is open; `page`: folder of the web page."""

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        if served.engine is not None:
            served.engine.start()
        warming = asyncio.create_task(_warm(served))
        yield
        warming.cancel()
        if served.engine is not None and not served.engine.ending:
            await served.engine.stop(drain=True, timeout=served.options.drain)
        if served.metrics.tracer is not None:
            await asyncio.to_thread(served.metrics.tracer.close)

    app = FastAPI(title="Lilliput", version=__version__, docs_url=None, redoc_url=None, lifespan=lifespan)
    _errors(app, served)
    _openai(app, served)
    _about(app, served)
    files = {"/": "index.html"} | {f"/web/{file.name}": file.name for file in sorted(page.iterdir()) if file.suffix in (".js", ".css", ".svg")} if page else {}
    for path, name in files.items():
        app.add_api_route(path, _file(page / name), methods=["GET"], include_in_schema=False)  # type: ignore[operator]
    app.add_middleware(Guard, served=served, keys=keys, free=frozenset((*OPEN_PATHS, *files)))
    origins = [served.options.cors] if isinstance(served.options.cors, str) else list(served.options.cors)
    if any(origins):
        app.add_middleware(CORSMiddleware, allow_origins=origins, allow_methods=["GET", "POST"], allow_headers=["*"])
    return app


async def _warm(served: Served) -> None:
    """Once it is up: what the first structured answer would wait for (0.2 s). Where llguidance is missing, that answer says so."""
    await asyncio.sleep(WARM_AFTER)
    if served.engine is not None:
        with contextlib.suppress(UserError):
            await asyncio.to_thread(lambda: served.grammars)


def _openai(app: FastAPI, served: Served) -> None:
    async def answer(request: Request, work: chat.Chat | completions.Completion | responses.Answering, stream: bool | None) -> Response:
        if stream:
            return EventStream(work.events())
        return JSONResponse(await unless_gone(request, work.whole()))

    @app.post("/v1/chat/completions", response_model=None)
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        return await answer(request, await chat.start(served, body), body.stream)

    @app.post("/v1/completions", response_model=None)
    async def text_completions(body: CompletionRequest, request: Request) -> Response:
        return await answer(request, await completions.start(served, body), body.stream)

    @app.post("/v1/responses", response_model=None)
    async def responses_(body: responses.ResponsesRequest, request: Request) -> Response:
        return await answer(request, await responses.start(served, body), body.stream)

    @app.post("/v1/embeddings", response_model=None)
    async def embeddings(body: EmbeddingRequest, request: Request) -> Response:
        return JSONResponse(await unless_gone(request, extras.embeddings(served, body)))

    @app.post("/tokenize", response_model=None)
    async def tokenize(body: TokenizeRequest) -> Response:
        return JSONResponse(await extras.tokenize(served, body))

    @app.post("/detokenize", response_model=None)
    async def detokenize(body: DetokenizeRequest) -> Response:
        return JSONResponse(await extras.detokenize(served, body))

    @app.get("/v1/models", response_model=None)
    async def models() -> Response:
        return JSONResponse({"object": "list", "data": [_model(served)]})

    @app.get("/v1/models/{name:path}", response_model=None)
    async def model(name: str) -> Response:
        served.check_model(name)
        return JSONResponse(_model(served))


def _model(served: Served) -> dict[str, Any]:
    context = None if served.engine is None else served.engine.engine.context
    return {"id": served.name, "object": "model", "created": served.created, "owned_by": "lilliput", "root": served.name, "max_model_len": context}


def _about(app: FastAPI, served: Served) -> None:
    @app.get("/health", response_model=None)
    async def health() -> Response:
        stopping = served.engine is not None and served.engine.ending
        return JSONResponse({"status": "stopping" if stopping else "ok"}, 503 if stopping else 200)

    @app.get("/version", response_model=None)
    async def version() -> Response:
        return JSONResponse({"version": __version__})

    @app.get("/metrics", response_model=None)
    async def metrics() -> Response:
        return Response(served.metrics.render(), media_type="text/plain; version=0.0.4")

    @app.get("/stats", response_model=None)
    async def stats() -> Response:
        figures = {} if served.engine is None else vars(served.engine.stats())
        return JSONResponse({"model": served.name, "requests": served.open, **figures})


def _file(path: Path) -> Callable[[], Any]:
    async def send() -> FileResponse:
        policy = "default-src 'self'; img-src 'self' data:; style-src 'self'; script-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        return FileResponse(path, headers={"Content-Security-Policy": policy, "X-Content-Type-Options": "nosniff", "Cache-Control": "no-cache"})

    return send


def _errors(app: FastAPI, served: Served) -> None:
    def refuse(error: ApiError) -> Response:
        served.metrics.refused(error.status)
        return JSONResponse(error.body(), error.status, error.headers)

    async def api(request: Request, error: Any) -> Response:
        return refuse(error)

    async def user(request: Request, error: Any) -> Response:
        return refuse(from_user_error(error))

    async def invalid(request: Request, error: Any) -> Response:
        return refuse(from_validation(error.errors(), FIELDS.get(request.url.path, ())))

    async def plain(request: Request, error: Any) -> Response:
        missing = f"there is no {request.method} {request.url.path} here"
        return refuse(ApiError(missing if error.status_code in (404, 405) else str(error.detail), status=error.status_code))

    async def gone(request: Request, error: Any) -> Response:
        return Response(status_code=GONE)

    async def ours(request: Request, error: Any) -> Response:
        return refuse(ApiError(f"this is the server's fault: {type(error).__name__}", status=500))

    for kind, handler in ((ApiError, api), (UserError, user), (RequestValidationError, invalid), (HTTPException, plain), (GoneError, gone), (Exception, ours)):
        app.add_exception_handler(kind, handler)


FIELDS = {
    "/v1/chat/completions": tuple(ChatRequest.model_fields),
    "/v1/completions": tuple(CompletionRequest.model_fields),
    "/v1/responses": tuple(responses.ResponsesRequest.model_fields),
    "/v1/embeddings": tuple(protocol.EmbeddingRequest.model_fields),
}


class Guard:
    """Before every route: the host's name, the key, and the size of the body."""

    def __init__(self, app: ASGIApp, served: Served, keys: tuple[str, ...], free: frozenset[str]) -> None:
        """`free`: paths that need no key."""
        self.app, self.served, self.free = app, served, free
        self.keys = [key.encode() for key in keys]
        self.names = LOOPBACK if served.options.host in LOOPBACK else ()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI's entry."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        refusal = self._refusal(scope["path"], headers)
        if refusal is not None:
            self.served.metrics.refused(refusal.status)
            await JSONResponse(refusal.body(), refusal.status, refusal.headers)(scope, receive, send)
            return
        PARENT.set(headers.get(b"traceparent", b"").decode("latin-1"))  # each request is answered in a context of its own
        await self.app(scope, self._counted(receive), send)

    def _refusal(self, path: str, headers: dict[bytes, bytes]) -> ApiError | None:
        host = headers.get(b"host", b"").decode("latin-1").lower()
        if self.names and _hostname(host) not in self.names:
            return ApiError(f"this server answers to {', '.join(self.names)} alone, not to {host!r}", status=403)
        if self.keys and path not in self.free:
            kind, _, shown = headers.get(b"authorization", b"").partition(b" ")
            if kind.lower() != b"bearer" or not any([hmac.compare_digest(key, shown.strip()) for key in self.keys]):
                return ApiError("a key is needed: Authorization: Bearer KEY", status=401, code="invalid_api_key")
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > self.served.options.max_body:
            return self._too_large()
        return None

    def _too_large(self) -> ApiError:
        return ApiError(f"the body is larger than {self.served.options.max_body:,} bytes", status=413)

    def _counted(self, receive: Receive) -> Receive:
        seen = 0

        async def counted() -> Message:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > self.served.options.max_body:
                raise HTTPException(413, self._too_large().message)  # FastAPI lets nothing else through while it reads a body
            return message

        return counted


def _hostname(host: str) -> str:
    """Without the port: `localhost:8000`, `[::1]:8000`."""
    return host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]


class Server(uvicorn.Server):
    """uvicorn, with signals that drain and then end the process quietly. `on_ready`: called with the port once requests are taken."""

    def __init__(self, app: FastAPI, served: Served, on_ready: Callable[[int], None]) -> None:
        options = served.options
        super().__init__(uvicorn.Config(app, options.host, options.port, log_level="error", access_log=False, timeout_keep_alive=30, backlog=1024,
                                        timeout_graceful_shutdown=int(options.drain) + 5, server_header=False))  # fmt: skip
        self._on_ready, self._engine, self._drain = on_ready, served.engine, options.drain

    async def startup(self, sockets: Any = None) -> None:
        """Listen, then say so."""
        await super().startup(sockets)
        if self.started:
            self._on_ready(self.servers[0].sockets[0].getsockname()[1])

    async def shutdown(self, sockets: Any = None) -> None:
        """Close the socket, let the open answers end for a while, and tell those that did not."""
        stopping = asyncio.create_task(self._engine.stop(drain=True, timeout=self._drain)) if self._engine is not None else None
        await super().shutdown(sockets)
        if stopping is not None:
            await stopping

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """SIGTERM and SIGINT drain; a second one ends at once."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.handle_exit, number, None)
        try:
            yield
        finally:
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.remove_signal_handler(number)


def check_address(options: Http, keys: tuple[str, ...]) -> None:
    """UserError where a network would be served without a key."""
    if options.host not in LOOPBACK and not keys:
        raise UserError(f"http.host={options.host} serves others, and no key is set", "whoever reaches the port could use the model",
                        "LILLIPUT_API_KEY=... before the command, or http.host=127.0.0.1")  # fmt: skip


def serve(served: Served, keys: tuple[str, ...], page: Path | None, on_ready: Callable[[int], None]) -> None:
    """Serve until a signal comes. UserError where the port is taken."""
    check_address(served.options, keys)
    server = Server(application(served, keys, page), served, on_ready)
    try:
        server.run()
    except SystemExit as error:  # uvicorn's way to say that it could not listen
        raise UserError(f"cannot listen on {served.options.host}:{served.options.port}", "the port is taken, or the address is not this machine's",
                        "http.port=0 takes a free one") from error  # fmt: skip
