"""The server as an application of Ray Serve, which starts its replicas, and routes calls to them.

    serve run docker/ray.yaml

A replica is a server without doors of its own: calls come in by Ray's gRPC proxy and go through the same
gate, with their tokens, limits and statuses. What the proxy does itself is Ray's: TLS, health, reflection,
connections.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import grpc
from ray import serve

from engines.errors import AnyDoorError
from runtime.errors import InputError
from runtime.rpc import compositor_pb2 as pb
from runtime.server.events import EngineLostError
from runtime.server.serve import Server, open_models
from runtime.server.settings import settings_from

SERVICE = pb.DESCRIPTOR.services_by_name["CompositorService"]

_MOST_CALLS = 64
"""Of a replica at a time; its queue refuses before that."""


class _Answer(bytes):
    """A message that is serialized already; the proxy takes it for one."""

    def SerializeToString(self) -> bytes:  # noqa: N802
        return bytes(self)


class RefusedError(AnyDoorError):
    """Ends a call; its status is that of the call's context."""


class RayContext:
    """A call that came in by Ray's proxy; see `runtime.server.call.Context`."""

    def __init__(self, message: bytes, context: Any) -> None:
        """Keeps what is known.

        Args:
            message: serialized.
            context: `ray.serve.grpc_util.RayServegRPCContext`.
        """
        self._message = message
        self._context = context
        self.answers: asyncio.Queue[bytes | None] = asyncio.Queue(1)
        """Serialized messages."""
        self.is_refused = False
        """Whether the call ended with an error."""

    def peer(self) -> str:
        """The other end of the proxy's connection."""
        return str(self._context.peer())

    def invocation_metadata(self) -> Sequence[tuple[str, str | bytes]]:
        """As the client sent it."""
        return list(self._context.invocation_metadata())

    def auth_context(self) -> Mapping[str, Sequence[bytes]]:
        """Nothing: certificates are the proxy's."""
        return {}

    def time_remaining(self) -> float | None:
        """None: the proxy cancels a call whose deadline is over."""
        return None

    async def read(self) -> bytes:
        """The message."""
        message, self._message = self._message, b""
        return message

    async def write(self, message: bytes) -> None:
        """Waits until the message before is on its way."""
        await self.answers.put(message)

    def set_trailing_metadata(self, metadata: Any) -> None:
        """Goes with the answer's end."""
        self._context.set_trailing_metadata(list(metadata))

    async def abort(self, code: grpc.StatusCode, details: str, trailing_metadata: Any) -> None:
        """Keeps the status for the answer's end."""
        self.is_refused = True
        self._context.set_code(code)
        self._context.set_details(details)
        self.set_trailing_metadata(trailing_metadata)


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
            raise InputError("bundle must say where the model is")
        settings = settings_from(given, None, "")
        settings = replace(settings, listen=(), http="", metrics="")
        compositor, filler, bundles = await asyncio.to_thread(open_models, settings)
        self._server = Server(compositor, settings, filler, bundles)
        await self._server.start()
        self._gate = self._server.gate
        self._methods = {
            name: partial(self._gate.serve, method) for name, method in self._server.service.methods.items()
        }

    async def check_health(self) -> None:
        """Has Ray start another replica where the engine failed for good."""
        if self._server.engine_lost.is_set():
            raise EngineLostError()

    async def _answer(self, name: str, message: bytes, grpc_context: Any) -> _Answer:
        """The answer of a method with one; an empty one where the context has another status than OK."""
        context = RayContext(message, grpc_context)
        await self._gate.answer(context, name, self._methods[name])
        answer = None if context.answers.empty() else context.answers.get_nowait()
        return _Answer(answer or b"")

    async def _answers(self, name: str, message: bytes, grpc_context: Any) -> AsyncIterator[_Answer]:
        """The answers of a method with several.

        Raises:
            RefusedError: the context has another status than OK.
        """
        context = RayContext(message, grpc_context)

        async def answer() -> None:
            try:
                await self._gate.answer(context, name, self._methods[name])
            finally:
                await context.answers.put(None)

        task = asyncio.create_task(answer())
        try:
            while (content := await context.answers.get()) is not None:
                yield _Answer(content)
            if context.is_refused:
                raise RefusedError(grpc_context.details())
        finally:
            task.cancel()


def _add_methods() -> None:
    """Gives a replica the methods of the service, by whose names the proxy calls it."""
    for method in SERVICE.methods:

        async def one(self: Any, message: bytes, grpc_context: Any, name: str = method.name) -> _Answer:
            answer: _Answer = await self._answer(name, message, grpc_context)
            return answer

        async def several(
            self: Any, message: bytes, grpc_context: Any, name: str = method.name
        ) -> AsyncIterator[_Answer]:
            async for answer in self._answers(name, message, grpc_context):
                yield answer

        setattr(Replica, method.name, several if method.server_streaming else one)


_add_methods()


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
    """The application; `given` are settings by name, as the config file has them under `args`."""
    deployment = serve.deployment(Replica, name="AnyDoor", max_ongoing_requests=_MOST_CALLS)
    return deployment.bind(given)
