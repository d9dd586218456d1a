"""Receives calls on Ray Serve, and sends each to a replica, or to another one if that ends on the way."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any

import grpc
from ray.exceptions import RayActorError
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from engines.errors import AnyDoorError
from runtime.errors import InputError
from runtime.rpc import compositor_pb2 as pb
from runtime.server.http.body import read_fields
from runtime.server.http.context import error_of
from runtime.server.parsing import parse

SERVICE = pb.DESCRIPTOR.services_by_name["CompositorService"]

_TRIES = 4
_SECONDS_BETWEEN = 0.1
_RESENT = "resent"
"""Trailing metadata, and x-resent over HTTP: how many replicas have ended while they were at the call."""
_LOST = "the replica that was at the call has ended: try again"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Asked:
    """A call by gRPC, on its way to a replica."""

    method: str
    message: bytes
    peer: str
    metadata: Sequence[tuple[str, str | bytes]]


@dataclass(frozen=True)
class AskedHttp:
    """A call by HTTP, likewise."""

    scope: Mapping[str, Any]
    """The part of the ASGI scope that can be sent."""
    body: bytes


@dataclass
class Ended:
    """The final status of a call."""

    code: grpc.StatusCode = grpc.StatusCode.OK
    details: str = ""
    trailing: list[tuple[str, str]] = field(default_factory=list)


class RefusedError(AnyDoorError):
    """Ends a call; its status is that of the call's context."""


class _Answer(bytes):
    """A message that is serialized already; the proxy takes it for one."""

    def SerializeToString(self) -> bytes:  # noqa: N802
        return bytes(self)


class RayDoor:
    """Takes calls by gRPC and HTTP to replicas."""

    def __init__(self, replicas: Any, most_bytes: int) -> None:
        """Keeps the replicas.

        Args:
            replicas: `ray.serve.handle.DeploymentHandle` of them.
            most_bytes: of a body over HTTP; a larger one is refused before a replica sees it.
        """
        self._replicas = replicas
        self._most_bytes = most_bytes

    async def _one(self, name: str, message: bytes, grpc_context: Any) -> _Answer:
        """Returns the answer of a method with one; an empty one where the context has another status than
        OK."""
        found = _Answer()
        async with aclosing(self._call(name, message, grpc_context)) as answers:
            async for answer in answers:
                found = answer
        return found

    async def _several(self, name: str, message: bytes, grpc_context: Any) -> AsyncIterator[_Answer]:
        """Yields the answers of a method with several.

        Raises:
            RefusedError: the context has another status than OK.
        """
        async with aclosing(self._call(name, message, grpc_context)) as answers:
            async for answer in answers:
                yield answer
        if grpc_context.code() not in (None, grpc.StatusCode.OK):
            raise RefusedError(grpc_context.details())

    async def _call(self, name: str, message: bytes, context: Any) -> AsyncGenerator[_Answer, None]:
        """Yields the answers of a replica, and passes its final status to the context."""
        asked = Asked(name, message, str(context.peer()), list(context.invocation_metadata()))
        model = await asyncio.to_thread(_model_of, name, message)
        async with aclosing(self._anywhere("answer", asked, model)) as items:
            async for item, resent in items:
                if isinstance(item, bytes):
                    yield _Answer(item)
                    continue
                more = [(_RESENT, str(resent))] if resent else []
                context.set_trailing_metadata([*item.trailing, *more])
                if item.code is not grpc.StatusCode.OK:
                    context.set_code(item.code)
                    context.set_details(item.details)

    async def _anywhere(self, method: str, asked: Any, model: str) -> AsyncGenerator[tuple[Any, int], None]:
        """Yields what a replica yields, and how many have ended before it. Where one ends after it has begun
        to answer, or one too many did, the last item is a status: UNAVAILABLE."""
        chosen = {"multiplexed_model_id": model} if model else {}
        handle = getattr(self._replicas.options(stream=True, **chosen), method)
        for resent in range(_TRIES):
            begun, items = False, handle.remote(asked)
            try:
                async for item in items:
                    begun = True
                    yield item, resent
                return
            except RayActorError as error:
                logger.warning("a replica ended while it was at a call: %s", error)
                if begun:
                    break
                await asyncio.sleep(_SECONDS_BETWEEN * 2**resent)
            finally:
                items.cancel()
        yield Ended(grpc.StatusCode.UNAVAILABLE, _LOST), resent + 1

    async def __call__(self, request: Request) -> Response:
        """Answers over HTTP."""
        wanted = (
            "type",
            "http_version",
            "method",
            "path",
            "raw_path",
            "query_string",
            "headers",
            "client",
            "scheme",
        )
        body = bytearray()
        async for piece in request.stream():
            body += piece
            if len(body) > self._most_bytes:
                sentence = f"the message is larger than {self._most_bytes} bytes"
                refusal = HTTPStatus.REQUEST_ENTITY_TOO_LARGE
                status, error = error_of(grpc.StatusCode.RESOURCE_EXHAUSTED, sentence, {}, refusal)
                return JSONResponse(error, int(status), {"connection": "close"})
        asked = AskedHttp(
            {name: request.scope[name] for name in wanted if name in request.scope}, bytes(body)
        )
        model = await asyncio.to_thread(_model_of_http, request, asked.body)
        items = self._anywhere("answer_http", asked, model)
        head, resent = await anext(items)
        if isinstance(head, Ended):
            status, error = error_of(head.code, head.details, {})
            return JSONResponse(error, int(status), {"retry-after": "1"})
        headers = {name.decode(): value.decode("latin-1") for name, value in head["headers"]}
        if resent:
            headers[f"x-{_RESENT}"] = str(resent)
        return StreamingResponse(_bodies(items), head["status"], headers)


async def _bodies(items: AsyncGenerator[tuple[Any, int], None]) -> AsyncIterator[bytes]:
    async with aclosing(items):
        async for item, _ in items:
            if isinstance(item, Ended):
                raise RefusedError(item.details)  # the answer is cut off
            yield item["body"]


def _add_methods() -> None:
    """Gives the door the methods of the service, by whose names the proxy calls it."""
    for method in SERVICE.methods:

        async def one(self: Any, message: bytes, grpc_context: Any, name: str = method.name) -> _Answer:
            answer: _Answer = await self._one(name, message, grpc_context)
            return answer

        async def several(
            self: Any, message: bytes, grpc_context: Any, name: str = method.name
        ) -> AsyncIterator[_Answer]:
            async for answer in self._several(name, message, grpc_context):
                yield answer

        setattr(RayDoor, method.name, several if method.server_streaming else one)


_add_methods()


def _model_of(name: str, message: bytes) -> str:
    """Returns the model that a message names: calls for it go where it is loaded."""
    kind = getattr(pb, SERVICE.methods_by_name[name].input_type.name)
    try:
        found: Any = parse(kind, message)
    except Exception:
        return ""  # the replica refuses it
    return str(getattr(getattr(found, "request", found), "model", ""))


def _model_of_http(request: Request, body: bytes) -> str:
    try:
        fields = read_fields(body, request.headers.get("content-type", "")) if body else {}
    except InputError:
        return ""
    return str(fields.get("model") or request.query_params.get("model", ""))
