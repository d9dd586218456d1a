"""Serves metrics and health over HTTP, on a port of their own, with few and short connections."""

from __future__ import annotations

import asyncio
import contextlib
import socket

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from runtime.errors import InputError
from runtime.server.access import Access
from runtime.server.events import UnauthenticatedError
from runtime.server.health import Health
from runtime.server.timeouts import within

PATH = "/metrics"
_CONNECTIONS = 16
_SECONDS = 5.0
_LARGEST_HEAD = 8192


class MetricsPage:
    """Answers GET /metrics, and GET /healthz and /readyz to everybody. Who comes when all connections are
    taken replaces the oldest."""

    def __init__(
        self, address: str, registry: CollectorRegistry, access: Access | None, health: Health
    ) -> None:
        """Binds the address.

        Args:
            address: host:port.
            registry: what to show.
            access: whose tokens are required for metrics; everybody gets them if None.
            health: what /healthz and /readyz say.

        Raises:
            InputError: the address is invalid or taken.
        """
        host, _, port = address.rpartition(":")
        if not host or not port.isdecimal():
            raise InputError(f"metrics must be host:port, not '{address}'")
        self._registry = registry
        self._access = access
        self._health = health
        self._tasks: dict[asyncio.Task[None], None] = {}
        try:
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            self._socket = socket.create_server((host.strip("[]"), int(port)), family=family)
        except (OSError, OverflowError) as error:
            reason = error.strerror if isinstance(error, OSError) else "there is no such port"
            raise InputError(f"cannot serve metrics at '{address}': {reason}") from error
        self.port: int = self._socket.getsockname()[1]

    async def start(self) -> None:
        """Answers from now on."""
        self._server = await asyncio.start_server(self._connected, sock=self._socket, limit=_LARGEST_HEAD)

    async def stop(self) -> None:
        """Closes all connections."""
        self._server.close()
        for task in self._tasks:
            task.cancel()

    def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if len(self._tasks) >= _CONNECTIONS:
            oldest = next(iter(self._tasks))
            del self._tasks[oldest]
            oldest.cancel()
        task = asyncio.ensure_future(self._answer(reader, writer))
        self._tasks[task] = None

        def end(task: asyncio.Task[None]) -> None:
            self._tasks.pop(task, None)
            writer.close()  # also of one that was cancelled before it began

        task.add_done_callback(end)

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            with contextlib.suppress(OSError, asyncio.TimeoutError, asyncio.IncompleteReadError, ValueError):
                head = await within(_SECONDS, reader.readuntil(b"\r\n\r\n"))
                status, content = await self._page(head)
                lines = [f"HTTP/1.1 {status}", f"Content-Type: {CONTENT_TYPE_LATEST}", "Connection: close"]
                writer.write(
                    "\r\n".join([*lines, f"Content-Length: {len(content)}", "", ""]).encode() + content
                )
                await within(_SECONDS, writer.drain())
        except asyncio.LimitOverrunError:
            pass

    async def _page(self, head: bytes) -> tuple[str, bytes]:
        first, *rest = head.decode("latin-1").split("\r\n")
        method, _, path = first.rpartition(" ")[0].partition(" ")
        path = path.partition("?")[0]
        states = {"/healthz": self._health.is_alive, "/readyz": self._health.is_ready}
        if path != PATH and path not in states:
            return "404 Not Found", b""
        if method != "GET":
            return "405 Method Not Allowed", b""
        if path in states:
            return ("200 OK" if states[path] else "503 Service Unavailable"), b""
        if self._access is not None:
            fields = [line.partition(":") for line in rest]
            given = [value.strip() for name, _, value in fields if name.lower() == "authorization"]
            try:
                self._access.holder_of(given)
            except UnauthenticatedError:
                return "401 Unauthorized", b""
        return "200 OK", await asyncio.to_thread(generate_latest, self._registry)
