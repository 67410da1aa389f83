"""Replicas: the whole server several times, as actors of Ray Serve, which starts them, watches them, and adds and removes them with the load.

    front (front.py)   the only socket, in the process of `lilliput serve`: keys, limits, the page; it reads a request whole and passes it on
    router             the replica that has read the longest beginning of it (routing.py, ray_router.py)
    Replica            the application of http.py without a socket: an engine, a model and a cache of its own

A replica that dies is started again by Ray Serve; requests of which nothing had been sent are asked again of another one (front.py). Ray's own HTTP
proxy is not started. On one machine replicas share its cores, so they gain nothing but what one process cannot use; they are for many machines
(replicas.address), each with the package and the model in place.

Moritz et al. 2018 (Ray), OSDI 2018.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from typing import TYPE_CHECKING, Any

from lilliput.base import env
from lilliput.base.errors import UserError
from lilliput.serve.http import application

if TYPE_CHECKING:
    from lilliput.base.job import Http, Replicas
    from lilliput.serve.openai.house import House

NAME = "lilliput"
Call = dict[str, Any]  # an ASGI scope, without what belongs to the front's socket
Message = dict[str, Any]  # of ASGI: http.response.start or http.response.body


class Replica:
    """One server without a socket."""

    async def __init__(self, make: Callable[[str], House]) -> None:  # type: ignore[misc]  # Ray Serve awaits it
        """`make`: the models, given this replica's name."""
        from ray import serve

        name = serve.get_replica_context().replica_id.unique_id
        self.house = await asyncio.to_thread(make, name)
        self._app = application(self.house)
        self._lifespan = self._app.router.lifespan_context(self._app)
        await self._lifespan.__aenter__()

    async def answer(self, call: Call, body: bytes, keys: Sequence[bytes] = ()) -> AsyncIterator[Message]:
        """The messages of one answer as they come, bodies that are there at once in one. `keys`: for the router. Closing it ends the request."""
        messages: asyncio.Queue[Message | None] = asyncio.Queue()
        gone, asked = asyncio.Event(), False

        async def receive() -> Message:
            nonlocal asked
            if not asked:
                asked = True
                return {"type": "http.request", "body": body, "more_body": False}
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            messages.put_nowait(message)

        async def run() -> None:
            try:
                await self._app({**call, "app": self._app}, receive, send)
            finally:
                messages.put_nowait(None)

        task = asyncio.create_task(run())
        try:
            while (message := await messages.get()) is not None:
                while message["type"] == "http.response.body" and not messages.empty():
                    more = messages.get_nowait()
                    if more is None:
                        messages.put_nowait(None)
                        break
                    message = {**more, "body": message.get("body", b"") + more.get("body", b"")}
                yield message
            await task
        finally:
            gone.set()
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def figures(self) -> list[dict[str, Any]]:
        """What its models are doing, as GET /stats has it."""
        from lilliput.serve.http import figures

        return [figures(served) for served in self.house.models]

    async def metrics(self) -> str:
        """What Prometheus reads."""
        return self.house.board.render().decode()


def start(make: Callable[[str], House], options: Replicas, http: Http) -> tuple[Any, tuple[type[BaseException], ...]]:
    """Start Ray (or join the cluster at options.address) and the replicas: a handle to call them, and the exceptions that mean that one has died.
    UserError where Ray is missing or they do not start."""
    try:
        env.default("RAY_USAGE_STATS_ENABLED", "0")  # nothing is reported to anybody
        import ray
        from ray import serve
        from ray.serve.config import AutoscalingConfig, RequestRouterConfig
    except ModuleNotFoundError as error:
        raise UserError("--replicas needs Ray", f"{error.name} is not installed", "pip install 'lilliput[ray]'") from error
    if options.address:
        ray.init(address=options.address, log_to_driver=False)
    else:
        ray.init(include_dashboard=False, log_to_driver=False, _node_ip_address="127.0.0.1")
    serve.start(proxy_location="Disabled")
    scale: dict[str, Any] = {"num_replicas": options.count}
    if options.most > options.count:
        scale = {"autoscaling_config": AutoscalingConfig(min_replicas=options.count, initial_replicas=options.count, max_replicas=options.most,
                                                         target_ongoing_requests=options.target, downscale_delay_s=options.idle)}  # fmt: skip
    routing: dict[str, Any] = {"request_router_class": "lilliput.serve.ray_router:PrefixRouter", "request_router_kwargs": {"slack": options.slack}}
    deployment = serve.deployment(Replica).options(  # type: ignore[attr-defined]
        name=NAME, ray_actor_options={"num_cpus": options.cpus}, max_ongoing_requests=http.max_requests, request_router_config=RequestRouterConfig(**routing),
        health_check_period_s=2, graceful_shutdown_timeout_s=http.drain, **scale,
    )  # fmt: skip
    try:
        return serve.run(deployment.bind(make), name=NAME, route_prefix=None), (ray.exceptions.RayActorError,)
    except Exception as error:
        raise UserError("the replicas did not start", str(error).strip().splitlines()[-1], "lilliput serve without --replicas says more") from error


def stop() -> None:
    """End the replicas, and Ray where this process has started it."""
    import ray
    from ray import serve

    serve.delete(NAME)
    serve.shutdown()
    ray.shutdown()
