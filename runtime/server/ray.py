"""Runs the server as a Ray Serve application; Ray starts the replicas and routes calls to them.

    serve run docker/ray.yaml

Calls come in by Ray's proxies, for gRPC and HTTP, and `RayDoor` sends each to a replica. That is a server
without doors of its own: calls go through its gate, with their tokens, limits and statuses. What the proxies
do themselves is Ray's: TLS, health, reflection, connections.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import grpc
from ray import serve

from runtime.errors import InputError
from runtime.server.events import EngineLostError
from runtime.server.logs import json_logs
from runtime.server.memory import share_one_arena
from runtime.server.ray_door import SERVICE, Asked, AskedHttp, Ended, RayDoor
from runtime.server.serve import Server, open_models
from runtime.server.settings import settings_from

_MOST_CALLS = 64
"""Most simultaneous calls of a replica; its queue refuses earlier."""


class RayContext:
    """A call that came in by Ray's proxy; see `runtime.server.call.Context`."""

    def __init__(self, asked: Asked, put: Callable[[Any], Awaitable[None]]) -> None:
        """Keeps what is known.

        Args:
            asked: the call.
            put: takes what is answered.
        """
        self._asked = asked
        self._message = [asked.message]
        self._put = put
        self.ended = Ended()
        """The final status, if known."""

    def peer(self) -> str:
        """Returns the other end of the proxy's connection."""
        return self._asked.peer

    def invocation_metadata(self) -> Sequence[tuple[str, str | bytes]]:
        """Returns the metadata that the client sent."""
        return self._asked.metadata

    def auth_context(self) -> Mapping[str, Sequence[bytes]]:
        """Returns nothing: the proxy handles certificates."""
        return {}

    def time_remaining(self) -> float | None:
        """Returns None: the proxy cancels calls after their deadline."""
        return None

    async def read(self) -> bytes:
        """Returns the message."""
        return self._message.pop()

    async def write(self, message: bytes) -> None:
        """Waits until the message before is on its way."""
        await self._put(message)

    def set_trailing_metadata(self, metadata: Any) -> None:
        """Goes with the answer's end."""
        self.ended.trailing = list(metadata)

    async def abort(self, code: grpc.StatusCode, details: str, trailing_metadata: Any) -> None:
        """Keeps the status for the answer's end."""
        self.ended = Ended(code, details, list(trailing_metadata))


class Replica:
    """A server for Ray: models of its own, on a card or on cores of its own."""

    async def __init__(self, given: Mapping[str, Any]) -> None:  # type: ignore[misc]  # Ray waits for it
        """Loads the first model.

        Args:
            given: settings by name.

        Raises:
            AnyDoorError: a setting or a bundle cannot be used.
        """
        if "bundle" not in given:
            raise InputError("bundle must name the directory of the model")
        settings = settings_from(given, None, {"bundle": ""})
        settings = replace(settings, listen=(), http="", metrics="")
        self._logs = json_logs(settings.log_level)
        self._logs.__enter__()  # as long as the process
        share_one_arena()
        compositor, filler, bundles = await asyncio.to_thread(open_models, settings)
        self._server = Server(compositor, settings, filler, bundles)
        await self._server.start()
        self._app = self._server.http_app(with_jobs=False)
        gate = self._server.gate
        self._methods = {
            name: partial(gate.serve, method) for name, method in self._server.service.methods.items()
        }

    async def check_health(self) -> None:
        """Has Ray start another replica where the engine failed for good."""
        if self._server.engine_lost.is_set():
            raise EngineLostError()

    async def answer(self, asked: Asked) -> AsyncIterator[bytes | Ended]:
        """Yields the answers of a method, then how the call ended."""
        await self._tell_model()

        async def work(put: Callable[[Any], Awaitable[None]]) -> None:
            context = RayContext(asked, put)
            await self._server.gate.answer(context, asked.method, self._methods[asked.method])
            await put(context.ended)

        async for item in _yielded(work):
            yield item

    async def answer_http(self, asked: AskedHttp) -> AsyncIterator[Any]:
        """Yields the answer as messages of ASGI."""
        await self._tell_model()
        bodies = [{"type": "http.request", "body": asked.body}]

        async def receive() -> Any:
            if not bodies:
                await asyncio.Event().wait()  # who goes away cancels the call
            return bodies.pop()

        async for message in _yielded(lambda put: self._app({**asked.scope}, receive, put)):
            yield message

    async def _tell_model(self) -> None:
        """Lets Ray know that this replica will have the model that the call is for."""
        model = serve.get_multiplexed_model_id()
        if model in self._server.models.names:
            await self._noted(model)

    @serve.multiplexed(max_num_models_per_replica=-1)  # type: ignore[untyped-decorator]
    async def _noted(self, model: str) -> str:
        return model  # it is loaded, and leaves, as `runtime.server.models` says


async def _yielded(work: Callable[[Callable[[Any], Awaitable[None]]], Awaitable[None]]) -> AsyncIterator[Any]:
    """Yields what the work puts; closing the iterator cancels the work."""
    items: asyncio.Queue[Any] = asyncio.Queue(1)
    end = object()

    async def run() -> None:
        try:
            await work(items.put)
        finally:
            await items.put(end)

    task = asyncio.create_task(run())
    try:
        while (item := await items.get()) is not end:
            yield item
        await task
    finally:
        task.cancel()


def add_methods(servicer: Any, server: Any) -> None:
    """Tells Ray's proxy the methods: what its `grpc_servicer_functions` names.

    Messages stay bytes until the gate has let the call in.
    """
    unary, stream = grpc.unary_unary_rpc_method_handler, grpc.unary_stream_rpc_method_handler
    handlers: dict[str, grpc.RpcMethodHandler[Any, Any]] = {}
    for method in SERVICE.methods:
        behaviour: Any = getattr(servicer, method.name, None)
        handlers[method.name] = (stream if method.server_streaming else unary)(behaviour)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE.full_name, handlers),))


def app(given: dict[str, Any]) -> serve.Application:
    """Returns the application; `given` are settings by name, as the config file has them under `args`."""
    replicas = serve.deployment(Replica, name="AnyDoor", max_ongoing_requests=_MOST_CALLS)
    # it only waits for replicas
    door = serve.deployment(
        RayDoor, name="Door", max_ongoing_requests=1000, ray_actor_options={"num_cpus": 0}
    )
    # files that settings name are on the machines of the replicas
    sizes = {name: value for name, value in given.items() if name == "max_message_bytes"}
    return door.bind(replicas.bind(given), settings_from(sizes, None, {"bundle": ""}).max_message_bytes)
