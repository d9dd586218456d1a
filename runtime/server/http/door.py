"""Listens for HTTP: uvicorn in the server's event loop, with a time limit for request headers, and answers
that reach clients that are still sending."""

from __future__ import annotations

import asyncio
import json
import socket
import ssl
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any, cast

import grpc
import h11
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from runtime.errors import InputError
from runtime.server.http.context import error_of

_HEAD_SECONDS = 10.0
_KEEP_ALIVE_SECONDS = 60
_LARGEST_HEAD = 32 << 10
_MOST_SMALL_PIECES = 500
"""Most small pieces of a body."""
_SMALL_PIECE = 512
"""Bytes of a piece; one with half as many counts half."""
_LAST_ANSWERS_SECONDS = 1
_LINGER_SECONDS = 5.0
"""Most seconds that the rest of a body is read after its request was answered."""


class _Connection(h11.Connection):
    """Refuses a body of many small chunks: each takes the event loop as long as a large one."""

    _pieces = 0.0

    def next_event(self) -> Any:
        event = super().next_event()
        if isinstance(event, h11.Request):
            self._pieces = 0.0
        elif isinstance(event, h11.Data):
            self._pieces += max(1 - len(event.data) / _SMALL_PIECE, 0)
            if self._pieces > _MOST_SMALL_PIECES:
                raise h11.RemoteProtocolError("the body comes in too many small chunks")
        return event


class _LingeringTransport:
    """A transport that is closed after its client has sent everything.

    A connection that is closed with unread bytes is reset, and a client that is still sending loses the
    answer (RFC 9112, section 9.6).
    """

    def __init__(self, transport: asyncio.Transport, is_sending: Callable[[], bool]) -> None:
        """Keeps the transport; `is_sending` tells whether the client has more of a request to send."""
        self._transport = transport
        self._is_sending = is_sending
        self.lingers = False
        """Whether all is answered, and what comes is of no interest."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def is_closing(self) -> bool:
        return self.lingers or self._transport.is_closing()

    def close(self) -> None:
        """Sends no more, and closes when the client does, after `_LINGER_SECONDS`, or when called again."""
        if self.is_closing() or not self._is_sending():
            self._transport.close()
            return
        self.lingers = True
        if self._transport.can_write_eof():
            self._transport.write_eof()
        self._transport.resume_reading()
        asyncio.get_running_loop().call_later(_LINGER_SECONDS, self._transport.close)


class _Protocol(H11Protocol):
    """Closes a connection that does not finish the head of a request."""

    _timer: asyncio.TimerHandle | None = None

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.conn = _Connection(h11.SERVER, _LARGEST_HEAD)

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._lingering = _LingeringTransport(transport, self._is_receiving)
        self.transport = cast(asyncio.Transport, self._lingering)
        if self.limit_concurrency is not None and len(self.connections) > self.limit_concurrency:
            transport.abort()
            return
        self._timer = self.loop.call_later(_HEAD_SECONDS, transport.close)

    def send_400_response(self, msg: str) -> None:
        """Answers a request that cannot be read, as those that can are refused."""
        _, error = error_of(grpc.StatusCode.INVALID_ARGUMENT, "the request is not valid HTTP", {})
        body = json.dumps(error).encode()
        head = [
            ("content-type", "application/json"),
            ("content-length", str(len(body))),
            ("connection", "close"),
        ]
        for event in (
            h11.Response(status_code=400, headers=head, reason=b"Bad Request"),
            h11.Data(data=body),
            h11.EndOfMessage(),
        ):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def _is_receiving(self) -> bool:
        return self.conn.their_state in (h11.SEND_BODY, h11.ERROR)

    def data_received(self, data: bytes) -> None:
        if self._lingering.lingers:
            return
        waits = self.cycle is None or self.cycle.response_complete
        before = self.cycle
        super().data_received(data)
        has_head = self.cycle is not before or not waits
        if has_head and self._timer:
            self._timer.cancel()
            self._timer = None
        elif not has_head and self._timer is None and not self.transport.is_closing():
            self._timer = self.loop.call_later(_HEAD_SECONDS, self.transport.close)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._timer:
            self._timer.cancel()
        super().connection_lost(exc)


class _Server(uvicorn.Server):
    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listens at the sockets; a handshake of TLS has as long as the head of a request."""
        config = self.config
        protocol = partial(_Protocol, config=config, server_state=self.server_state, app_state={})
        timeout = _HEAD_SECONDS if config.ssl else None
        loop = asyncio.get_running_loop()
        self.servers = [
            await loop.create_server(
                protocol,
                sock=each,
                ssl=config.ssl,
                backlog=config.backlog,
                ssl_handshake_timeout=timeout,
            )
            for each in sockets or []
        ]
        self.started = True

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals are those of `runtime.server.process`."""
        yield


class Door:
    """A listening socket, and what answers there."""

    def __init__(self, address: str, app: ASGIApp, tls: ssl.SSLContext | None, connections: int) -> None:
        """Binds the address.

        Args:
            address: host:port.
            app: answers.
            tls: None for plain HTTP.
            connections: at a time; the last gets 503, and further ones are closed.

        Raises:
            InputError: the address is invalid or taken.
        """
        host, _, port = address.rpartition(":")
        if not host or not port.isdecimal():
            raise InputError(f"http must be host:port, not '{address}'")
        try:
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            self._socket = socket.create_server((host.strip("[]"), int(port)), family=family, backlog=1024)
        except (OSError, OverflowError) as error:
            reason = error.strerror if isinstance(error, OSError) else "there is no such port"
            raise InputError(f"cannot serve HTTP at '{address}': {reason}") from error
        self.address = f"{host}:{self._socket.getsockname()[1]}"
        """With the port that was chosen for port 0."""
        config = uvicorn.Config(
            app,
            http=_Protocol,
            ws="none",
            lifespan="off",
            loop="none",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            limit_concurrency=connections,
            backlog=connections,  # those that come at once are taken at once
            timeout_keep_alive=_KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=_LAST_ANSWERS_SECONDS,
            h11_max_incomplete_event_size=_LARGEST_HEAD,
        )
        config.load()
        config.ssl = tls
        self._server = _Server(config)
        self._serving: asyncio.Task[Any] | None = None

    def start(self) -> None:
        """Answers from now on."""
        self._serving = asyncio.create_task(self._server.serve(sockets=[self._socket]))

    async def stop(self) -> None:
        """Closes all connections; answers that are on their way get a second."""
        self._server.should_exit = True
        if self._serving is None:
            self._socket.close()
            return
        with suppress(asyncio.CancelledError):
            await self._serving
