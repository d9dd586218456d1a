"""Adapts an ASGI request to the interface of a call that `runtime.server.gate` expects."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any
from urllib.parse import parse_qs

import grpc
from starlette.types import Receive, Scope, Send

from runtime.errors import InputError
from runtime.server.events import CallerGoneError

JSON = "application/json"
EVENTS = "text/event-stream"

_ERRORS: Mapping[grpc.StatusCode, tuple[HTTPStatus, str]] = {
    grpc.StatusCode.INVALID_ARGUMENT: (HTTPStatus.BAD_REQUEST, "invalid_request_error"),
    grpc.StatusCode.UNAUTHENTICATED: (HTTPStatus.UNAUTHORIZED, "authentication_error"),
    grpc.StatusCode.PERMISSION_DENIED: (HTTPStatus.FORBIDDEN, "permission_error"),
    grpc.StatusCode.NOT_FOUND: (HTTPStatus.NOT_FOUND, "invalid_request_error"),
    grpc.StatusCode.UNIMPLEMENTED: (HTTPStatus.NOT_FOUND, "invalid_request_error"),
    grpc.StatusCode.FAILED_PRECONDITION: (HTTPStatus.CONFLICT, "invalid_request_error"),
    grpc.StatusCode.RESOURCE_EXHAUSTED: (HTTPStatus.TOO_MANY_REQUESTS, "rate_limit_error"),
    grpc.StatusCode.UNAVAILABLE: (HTTPStatus.SERVICE_UNAVAILABLE, "server_error"),
    grpc.StatusCode.DEADLINE_EXCEEDED: (HTTPStatus.GATEWAY_TIMEOUT, "server_error"),
    grpc.StatusCode.INTERNAL: (HTTPStatus.INTERNAL_SERVER_ERROR, "server_error"),
}
"""Status of a call -> that of HTTP, and the type of error in the shape of OpenAI's API."""

SILENCE_SECONDS = 15.0
"""Longest silence of a stream of events. Many proxies end a connection after a minute of it."""

_COMMENT = b":\n\n"
"""Of a stream of events: says nothing, and clients pass over it."""

_RETRY_SECONDS = 1
"""Seconds until a retry if nothing else is known."""


class HttpContext:
    """See `runtime.server.call.Context`."""

    def __init__(self, scope: Scope, receive: Receive, send: Send, max_bytes: int) -> None:
        """Begins with nothing read and nothing sent.

        Args:
            scope: of ASGI, like the other two.
            receive: likewise.
            send: likewise.
            max_bytes: of the body.
        """
        self.scope = scope
        self._receive = receive
        self._send = send
        self._max_bytes = max_bytes
        self._headers = [
            (name.decode("latin-1").lower(), value.decode("latin-1")) for name, value in scope["headers"]
        ]
        self._status = HTTPStatus.OK
        self._answer_headers: dict[str, str] = {}
        self._is_started = self._is_finished = False
        self.task: asyncio.Task[None] | None = None
        """Answers the call; cancelled when the client goes away."""
        self.has_all = False
        """Whether the body is read."""
        self._watch: asyncio.Task[None] | None = None
        self._refusal: HTTPStatus | None = None
        self._sending = asyncio.Lock()
        self._last_sent = 0.0
        self._comments: asyncio.Task[None] | None = None

    # --- the request --------------------------------------------------------------------------------------

    def header(self, name: str) -> str:
        """Returns the value of a header, "" if there is none."""
        return next((value for found, value in self._headers if found == name), "")

    def wants(self, media_type: str) -> bool:
        """Returns whether the client asks for an answer of a type, like "image/"."""
        return self.header("accept").startswith(media_type)

    @property
    def path(self) -> Mapping[str, str]:
        """The variable parts of the path."""
        found: Mapping[str, str] = self.scope.get("path_params", {})
        return found

    def query(self, name: str) -> str:
        """Returns a value of the path's query, "" if there is none."""
        text: bytes = self.scope.get("query_string", b"")
        found = parse_qs(text.decode("latin-1"))
        return found.get(name, [""])[-1]

    def peer(self) -> str:
        """Returns the other end, as gRPC writes it."""
        return peer_of(self.scope)

    def invocation_metadata(self) -> Sequence[tuple[str, str | bytes]]:
        """Returns the headers."""
        return list(self._headers)

    def auth_context(self) -> Mapping[str, Sequence[bytes]]:
        """Returns nothing: clients with a certificate are admitted, and identified by their host."""
        return {}

    def time_remaining(self) -> float | None:
        """Returns None: a client that stops waiting closes the connection, which ends the call."""
        return None

    async def read(self) -> bytes:
        """Returns the body.

        Raises:
            InputError: it is longer than is accepted.
            CallerGoneError: it will never be there.
        """
        length = self.header("content-length")
        if length.isdigit() and int(length) > self._max_bytes:
            raise self._too_large()
        content = bytearray()
        while True:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                raise CallerGoneError()
            content += message.get("body", b"")
            if len(content) > self._max_bytes:
                raise self._too_large()
            if not message.get("more_body"):
                break
        self.has_all = True
        self.watch()
        return bytes(content)

    def watch(self) -> None:
        """From now on, the call is cancelled when the client goes away."""
        self._watch = asyncio.ensure_future(self._cancel_when_gone())

    def refuse_verb(self, allowed: str) -> None:
        """Has the refusal that follows say that the path takes other verbs, like "GET, HEAD"."""
        self._refusal = HTTPStatus.METHOD_NOT_ALLOWED
        self._answer_headers["allow"] = allowed

    def _too_large(self) -> InputError:
        self._refusal = HTTPStatus.REQUEST_ENTITY_TOO_LARGE
        return InputError(f"the body has more than {self._max_bytes:,} bytes, the most that are accepted")

    async def _cancel_when_gone(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        if self.task:
            self.task.cancel()

    # --- the answer ---------------------------------------------------------------------------------------

    def head(self, media_type: str, status: HTTPStatus = HTTPStatus.OK, **headers: str) -> None:
        """Sets what goes before the answer's first part; in names of headers _ stands for -."""
        self._status = status
        self._answer_headers["content-type"] = media_type
        self._answer_headers |= {name.replace("_", "-"): value for name, value in headers.items()}

    def head_of_events(self) -> None:
        """Sets what goes before a stream of events, which is never silent for long from now on."""
        # nginx passes on what comes as it comes
        self.head(EVENTS, cache_control="no-store", x_accel_buffering="no")
        self._last_sent = asyncio.get_running_loop().time()
        self._comments = asyncio.ensure_future(self._break_silence())

    async def _break_silence(self) -> None:
        clock = asyncio.get_running_loop().time
        while True:
            await asyncio.sleep(self._last_sent + SILENCE_SECONDS - clock())
            if clock() >= self._last_sent + SILENCE_SECONDS:
                await self.write(_COMMENT)

    async def write(self, message: bytes) -> None:
        """Sends a part of the answer; waits until it is on its way."""
        async with self._sending:
            await self._start()
            # what is sent is buffered; the next part, which may be empty, waits until there is room
            for part in (message, b""):
                await self._send({"type": "http.response.body", "body": part, "more_body": True})
        self._last_sent = asyncio.get_running_loop().time()

    async def finish(self) -> None:
        """Ends the answer."""
        async with self._sending:
            self.stop()
            if not self._is_finished:
                self._is_finished = True
                await self._start()
                await self._send({"type": "http.response.body", "body": b""})

    def stop(self) -> None:
        """Ends what goes on beside the answer."""
        for task in (self._watch, self._comments):
            if task:
                task.cancel()

    async def _start(self) -> None:
        if not self._is_started:
            self._is_started = True
            headers = [
                (name.encode(), value.encode("latin-1")) for name, value in self._answer_headers.items()
            ]
            await self._send({"type": "http.response.start", "status": int(self._status), "headers": headers})

    def set_trailing_metadata(self, metadata: Sequence[tuple[str, str]]) -> None:
        """Sends it with the head: x-request-id."""
        self._answer_headers |= {f"x-{name}": value for name, value in metadata}

    async def abort(
        self, code: grpc.StatusCode, details: str, trailing_metadata: Sequence[tuple[str, str]]
    ) -> None:
        """Answers with an error; of a stream that has begun it is the last event."""
        status, error = error_of(code, details, dict(trailing_metadata), self._refusal)
        if self._is_started:
            await self.write(server_sent_event("error", error))
            return
        if self._comments:
            self._comments.cancel()
        headers = {}
        if status is HTTPStatus.UNAUTHORIZED:
            headers["www_authenticate"] = "Bearer"
        if status in (HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE):
            headers["retry_after"] = str(_retry_seconds(dict(trailing_metadata)))
        if not self.has_all:
            headers["connection"] = "close"  # the rest of the body is not read
        self.head(JSON, status, **headers)
        await self.write(json.dumps(error).encode())


def peer_of(scope: Scope) -> str:
    """Returns the other end of a request, as gRPC writes it."""
    host, port = scope.get("client") or ("127.0.0.1", 0)
    return f"ipv6:[{host}]:{port}" if ":" in host else f"ipv4:{host}:{port}"


def error_of(
    code: grpc.StatusCode,
    details: str,
    more: Mapping[str, str],
    refusal: HTTPStatus | None = None,
) -> tuple[HTTPStatus, dict[str, Any]]:
    """Status and body of an error, in the shape of OpenAI's API.

    Args:
        code: of the call.
        details: a sentence.
        more: trailing metadata of the call; "field" is the path of the field that cannot be used.
        refusal: a status that says it better.
    """
    status, kind = _ERRORS.get(code, (HTTPStatus.INTERNAL_SERVER_ERROR, "server_error"))
    field = more.get("field") or None
    error = {"message": details, "type": kind, "param": field, "code": code.name.lower()}
    return refusal or status, {"error": error}


def server_sent_event(name: str, fields: Mapping[str, Any]) -> bytes:
    """Returns an event of a stream, as of the HTML standard, section 9.2."""
    return f"event: {name}\ndata: {json.dumps(fields)}\n\n".encode()


def _retry_seconds(trailing: Mapping[str, str]) -> int:
    milliseconds = trailing.get("grpc-retry-pushback-ms")
    return max(_RETRY_SECONDS, math.ceil(int(milliseconds) / 1000)) if milliseconds else _RETRY_SECONDS
