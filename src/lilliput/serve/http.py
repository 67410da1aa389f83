"""The HTTP server: OpenAI's API, health, metrics and the web page, in one process beside the engines' threads.

    POST /v1/chat/completions  /v1/completions  /v1/responses  /v1/embeddings  /tokenize  /detokenize  /v1/[un]load_lora_adapter
    POST /reset_prefix_cache    GET  /v1/models  /health  /ping  /load  /version  /metrics  /stats  /openapi.json  /

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
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from starlette.exceptions import HTTPException
from starlette.responses import FileResponse, JSONResponse, PlainTextResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lilliput.base.errors import UserError
from lilliput.base.version import __version__
from lilliput.serve.openai import chat, completions, extras, protocol, responses
from lilliput.serve.openai.errors import ApiError, from_user_error, from_validation
from lilliput.serve.openai.house import House
from lilliput.serve.openai.protocol import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    EmbeddingRequest,
    LoadAdapterRequest,
    TokenizeRequest,
    UnloadAdapterRequest,
)
from lilliput.serve.openai.reply import EventStream, GoneError, unless_gone
from lilliput.serve.openai.served import Served
from lilliput.serve.traces import PARENT

if TYPE_CHECKING:
    from lilliput.base.job import Http

OPEN_PATHS = ("/health", "/ping", "/")  # without a key; the page's files too
LOOPBACK = ("127.0.0.1", "::1", "localhost")
WARM_AFTER = 2.0  # seconds; the first answer comes first
GONE = 499  # nginx's word for a client that left; nobody reads it


def application(house: House, keys: tuple[str, ...] = (), page: Path | None = None) -> FastAPI:
    """The ASGI application. `keys`: any of them opens it, none = it is open; `page`: folder of the web page."""

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        house.start()
        warming = asyncio.create_task(_warm(house))
        yield
        warming.cancel()
        await house.stop()
        await house.close()

    app, options = FastAPI(title="Lilliput", version=__version__, docs_url=None, redoc_url=None, lifespan=lifespan), house.first.options
    _errors(app, house)
    _openai(app, house)
    _adapters(app, house)
    _about(app, house)
    free = put_page(app, page)
    app.add_middleware(Guard, options=options, refused=house.refused, keys=keys, free=free)
    admit_origins(app, options)
    return app


def admit_origins(app: FastAPI, options: Http) -> None:
    """Answers to the browsers of pages that http.cors names; added last, so that a preflight needs no key."""
    origins = [options.cors] if isinstance(options.cors, str) else list(options.cors)
    if any(origins):
        app.add_middleware(CORSMiddleware, allow_origins=origins, allow_methods=["GET", "POST"], allow_headers=["*"])


def put_page(app: FastAPI, page: Path | None) -> frozenset[str]:
    """Routes of the web page's files; the paths that need no key."""
    files = {"/": "index.html"} | {f"/web/{file.name}": file.name for file in sorted(page.iterdir()) if file.suffix in (".js", ".css", ".svg")} if page else {}
    for path, name in files.items():
        app.add_api_route(path, _file(page / name), methods=["GET"], include_in_schema=False)  # type: ignore[operator]
    return frozenset((*OPEN_PATHS, *files))


async def _warm(house: House) -> None:
    """Once it is up: what the first structured answer would wait for (0.2 s). Where llguidance is missing, that answer says so."""
    await asyncio.sleep(WARM_AFTER)
    for served in house.models:
        if served.engine is not None:
            with contextlib.suppress(UserError):
                await asyncio.to_thread(getattr, served, "grammars")


def _openai(app: FastAPI, house: House) -> None:
    async def answer(request: Request, work: chat.Chat | completions.Completion | responses.Answering, stream: bool | None) -> Response:
        if stream:
            return EventStream(work.events())
        return JSONResponse(await unless_gone(request, work.whole()))

    @app.post("/v1/chat/completions", response_model=None)
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        return await answer(request, await chat.start(house.pick(body.model), body), body.stream)

    @app.post("/v1/completions", response_model=None)
    async def text_completions(body: CompletionRequest, request: Request) -> Response:
        return await answer(request, await completions.start(house.pick(body.model), body), body.stream)

    @app.post("/v1/responses", response_model=None)
    async def responses_(body: responses.ResponsesRequest, request: Request) -> Response:
        return await answer(request, await responses.start(house.pick(body.model), body), body.stream)

    @app.post("/v1/embeddings", response_model=None)
    async def embeddings(body: EmbeddingRequest, request: Request) -> Response:
        return JSONResponse(await unless_gone(request, extras.embeddings(house.pick(body.model), body)))

    @app.post("/tokenize", response_model=None)
    async def tokenize(body: TokenizeRequest) -> Response:
        return JSONResponse(await extras.tokenize(house.pick(body.model), body))

    @app.post("/detokenize", response_model=None)
    async def detokenize(body: DetokenizeRequest) -> Response:
        return JSONResponse(await extras.detokenize(house.pick(body.model), body))

    @app.get("/v1/models", response_model=None)
    async def models() -> Response:
        return JSONResponse({"object": "list", "data": [_model(served, name) for served in house.models for name in ("", *served.adapters)]})

    @app.get("/v1/models/{name:path}", response_model=None)
    async def model(name: str) -> Response:
        served = house.pick(name)
        return JSONResponse(_model(served, served.adapter_of(name)))


def _adapters(app: FastAPI, house: House) -> None:
    @app.post("/v1/load_lora_adapter", response_model=None)
    async def load_adapter(body: LoadAdapterRequest) -> Response:
        return PlainTextResponse(await extras.load_adapter(house.pick(body.model), body))

    @app.post("/v1/unload_lora_adapter", response_model=None)
    async def unload_adapter(body: UnloadAdapterRequest) -> Response:
        return PlainTextResponse(await extras.unload_adapter(house.pick(body.model) if body.model else house.holder(body.lora_name), body))


def _model(served: Served, adapter: str) -> dict[str, Any]:
    """The model, or one of its adapters, as OpenAI's clients list it; `parent` as vLLM has it."""
    context = None if served.engine is None else served.engine.engine.context
    return {"id": adapter or served.name, "object": "model", "created": served.created, "owned_by": "lilliput", "root": served.name,
            "parent": served.name if adapter else None, "max_model_len": context}  # fmt: skip


def _about(app: FastAPI, house: House) -> None:
    @app.get("/health", response_model=None)
    async def health() -> Response:
        return JSONResponse({"status": "stopping" if house.ending else "ok"}, 503 if house.ending else 200)

    @app.get("/ping", response_model=None)
    @app.post("/ping", response_model=None)
    async def ping() -> Response:
        return await health()

    @app.get("/load", response_model=None)
    async def load() -> Response:
        return JSONResponse({"server_load": sum(served.open for served in house.models)})

    @app.post("/reset_prefix_cache", response_model=None)
    async def reset_prefix_cache() -> Response:
        for served in house.models:
            if served.engine is not None:
                await served.engine.forget_prefixes()
        return Response()

    @app.get("/version", response_model=None)
    async def version() -> Response:
        return JSONResponse({"version": __version__})

    @app.get("/metrics", response_model=None)
    async def metrics() -> Response:
        return Response(house.board.render(), media_type="text/plain; version=0.0.4")

    @app.get("/stats", response_model=None)
    async def stats() -> Response:
        models = [figures(served) for served in house.models]
        return JSONResponse({**models[0], "models": models})


def figures(served: Served) -> dict[str, Any]:
    """One model now."""
    counts = {} if served.engine is None else vars(served.engine.stats())
    return {"model": served.name, "adapters": served.adapters, "requests": served.open, **counts}


def _file(path: Path) -> Callable[[], Any]:
    async def send() -> FileResponse:
        policy = "default-src 'self'; img-src 'self' data:; style-src 'self'; script-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        return FileResponse(path, headers={"Content-Security-Policy": policy, "X-Content-Type-Options": "nosniff", "Cache-Control": "no-cache"})

    return send


def _errors(app: FastAPI, house: House) -> None:
    def refuse(error: ApiError) -> Response:
        house.refused(error.status)
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
    "/v1/load_lora_adapter": tuple(LoadAdapterRequest.model_fields),
    "/v1/unload_lora_adapter": tuple(UnloadAdapterRequest.model_fields),
}


class Guard:
    """Before every route: the host's name, the key, and the size of the body."""

    def __init__(self, app: ASGIApp, options: Http, refused: Callable[[int], None], keys: tuple[str, ...], free: frozenset[str]) -> None:
        """`refused`: told the status of each refusal; `free`: paths that need no key."""
        self.app, self.options, self.refused, self.free = app, options, refused, free
        self.keys = [key.encode() for key in keys]
        self.names = LOOPBACK if self.options.host in LOOPBACK else ()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI's entry."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        refusal = self._refusal(scope["path"], headers)
        if refusal is not None:
            self.refused(refusal.status)
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
        if length.isdigit() and int(length) > self.options.max_body:
            return self._too_large()
        return None

    def _too_large(self) -> ApiError:
        return ApiError(f"the body is larger than {self.options.max_body:,} bytes", status=413)

    def _counted(self, receive: Receive) -> Receive:
        seen = 0

        async def counted() -> Message:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > self.options.max_body:
                raise HTTPException(413, self._too_large().message)  # FastAPI lets nothing else through while it reads a body
            return message

        return counted


def _hostname(host: str) -> str:
    """Without the port: `localhost:8000`, `[::1]:8000`."""
    return host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]


class Server(uvicorn.Server):
    """uvicorn, with signals that drain and then end the process quietly. `on_ready`: called with the port once requests are taken."""

    def __init__(self, app: FastAPI, options: Http, stop: Callable[[], Coroutine[Any, Any, None]], on_ready: Callable[[int], None]) -> None:
        """`stop`: called once when requests are no longer taken, beside those that are open."""
        super().__init__(uvicorn.Config(app, options.host, options.port, log_level="error", access_log=False, timeout_keep_alive=30, backlog=1024,
                                        timeout_graceful_shutdown=int(options.drain) + 5, server_header=False))  # fmt: skip
        self._on_ready, self._stop = on_ready, stop

    async def startup(self, sockets: Any = None) -> None:
        """Listen, then say so."""
        await super().startup(sockets)
        if self.started:
            self._on_ready(self.servers[0].sockets[0].getsockname()[1])

    async def shutdown(self, sockets: Any = None) -> None:
        """Close the socket, let the open answers end for a while, and tell those that did not."""
        stopping = asyncio.create_task(self._stop())
        await super().shutdown(sockets)
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


def serve(app: FastAPI, options: Http, stop: Callable[[], Coroutine[Any, Any, None]], on_ready: Callable[[int], None]) -> None:
    """Serve until a signal comes. UserError where the port is taken."""
    server = Server(app, options, stop, on_ready)
    try:
        server.run()
    except SystemExit as error:  # uvicorn's way to say that it could not listen
        raise UserError(f"cannot listen on {options.host}:{options.port}", "the port is taken, or the address is not this machine's",
                        "http.port=0 takes a free one") from error  # fmt: skip
