"""Admits calls: authenticates callers before anything is kept of their calls, and limits the calls of each.

gRPC hands over a call when its head is there. Its message stays with the sender, but for one flow-control
window, until it is asked for; here that is when the caller is known and has room. So every method, whatever
its kind, is a stream to gRPC. What gRPC itself must limit is in `CHANNEL_OPTIONS`.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter, OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import grpc

from runtime.errors import InputError
from runtime.server import tracing
from runtime.server.access import Access
from runtime.server.call import Call, Context, status_of
from runtime.server.connections import cut_off, host_of
from runtime.server.events import (
    BusyError,
    DeadlineError,
    ShuttingDownError,
    UnknownMethodError,
    UnmeetableDeadlineError,
)
from runtime.server.health import SERVICE as HEALTH
from runtime.server.logs import FIELDS
from runtime.server.memory import PROBE_BYTES, Ledger
from runtime.server.metrics import Metrics
from runtime.server.settings import Settings
from runtime.server.timeouts import within

CHANNEL_OPTIONS = (
    ("grpc.max_concurrent_streams", 32),
    # a connection that says nothing is closed; gRPC's own limit is two minutes
    ("grpc.server_handshake_timeout_ms", 10_000),
    ("grpc.http2.settings_timeout", 10_000),
    ("grpc.max_connection_idle_ms", 5 * 60_000),
    ("grpc.max_connection_age_ms", 60 * 60_000),
    ("grpc.max_connection_age_grace_ms", 60 * 60_000),
    ("grpc.keepalive_time_ms", 60_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    # clients ask, too
    ("grpc.http2.min_ping_interval_without_data_ms", 30_000),
    # above these gRPC ends calls at random, whoever makes them; `Gate` ends the connection that floods
    ("grpc.server.max_pending_requests", 20_000),
    ("grpc.server.max_pending_requests_hard_limit", 40_000),
    # two servers on one port would share its calls unnoticed
    ("grpc.so_reuseport", 0),
    ("grpc.max_send_message_length", -1),
)

_MOST_CALLS = 256
"""Most simultaneous calls of a client."""
_MOST_MESSAGES = 4
"""Most messages that a connection sends at a time; others wait."""
_PROBE_SECONDS = 5.0
_LARGEST_PROBE = 4096
_REFLECTION_SECONDS = 60.0
_FRUITLESS = 200, 20.0
"""Calls of a connection that end without a message: at once, and per second. Above that it is flooding."""
_REFUSALS = 100, 5.0
"""Most refusals of a client, and their rate per second. Further refusals are delayed."""
_LATE_SECONDS = 0.5
_FAULTS_OF_CALLERS = {
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.UNAUTHENTICATED,
    grpc.StatusCode.PERMISSION_DENIED,
    grpc.StatusCode.UNIMPLEMENTED,
    grpc.StatusCode.NOT_FOUND,
}
_REMEMBERED = 4096
"""Connections, and clients."""

Handler = Any
"""A `grpc.RpcMethodHandler` whose method takes a message's bytes and a `Call`."""

Serve = Callable[[bytes, Call], Awaitable[None]]
"""Answers a call, whose message it gets."""

_Known = TypeVar("_Known")

logger = logging.getLogger(__name__)


@dataclass
class _Lately:
    """Counts recent events."""

    times: float = 0.0
    since: float = field(default_factory=time.monotonic)

    def add(self, burst: float, per_second: float) -> bool:
        """Counts once more; returns whether that is too often."""
        now = time.monotonic()
        rest = max(self.times - (now - self.since) * per_second, 0.0)
        self.times, self.since = min(rest, burst) + 1, now
        return self.times > burst


@dataclass
class _Connection:
    """The state of a client's connection."""

    messages: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(_MOST_MESSAGES))
    questions: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(_MOST_MESSAGES))
    """Of reflection, whose streams may wait for the next one."""
    fruitless: _Lately = field(default_factory=_Lately)
    is_ended: bool = False


class Gate(grpc.aio.ServerInterceptor):  # type: ignore[misc]
    """Lets calls in, sends their answers, and tells logs, metrics and spans how they ended."""

    def __init__(self, access: Access, ledger: Ledger, settings: Settings, metrics: Metrics) -> None:
        self._access = access
        self.ledger = ledger
        self._settings = settings
        self._metrics = metrics
        self._of_client: Counter[str] = Counter()
        self._connections: OrderedDict[str, _Connection] = OrderedDict()
        self._refusals: OrderedDict[str, _Lately] = OrderedDict()
        self._probes: dict[asyncio.Future[Any], None] = {}
        self.at_work = 0
        """Calls whose message is there, and that are not answered."""
        self._receiving: set[asyncio.Task[Any]] = set()
        self._stopped = False

    def stop(self) -> None:
        """Ends the calls whose message is not there."""
        self._stopped = True
        for task in self._receiving:
            task.cancel()

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]],
        details: grpc.HandlerCallDetails,
    ) -> Handler:
        """Intercepts every call of gRPC."""
        handler = await continuation(details)
        answer = partial(self._answer, details.method, handler)
        if handler is not None and handler.request_streaming:
            return grpc.stream_stream_rpc_method_handler(
                answer, handler.request_deserializer, handler.response_serializer
            )
        return grpc.stream_stream_rpc_method_handler(answer)

    async def _answer(
        self, path: str, handler: Handler | None, messages: AsyncIterator[Any], context: Any
    ) -> None:
        service, _, name = path.lstrip("/").rpartition("/")
        call = Call(
            context,
            name if handler else "other",
            self._settings.max_message_bytes,
            self._settings.transfer_seconds,
        )
        async with self._observe(call, is_probe=service == HEALTH):
            call.client = host_of(call.connection)
            if service == HEALTH and handler:
                await self.serve(handler, await self._read_probe(call), call)
                return
            call.client = self._access.client_of(context)
            if handler is None:
                raise UnknownMethodError()
            with self._place(call):
                if handler.request_streaming:
                    await self._reflect(handler, messages, call)
                    return
                await self._read_and_serve(partial(self.serve, handler), call)

    async def answer(
        self,
        context: Context,
        name: str,
        serve: Serve,
        client: str | None = None,
        has_message: bool = True,
    ) -> None:
        """Answers a call that came in by another door than gRPC's.

        Args:
            context: the call.
            name: what logs and metrics call its method.
            serve: answers it.
            client: whose call it is, where that is known.
            has_message: whether there is one to wait for.
        """
        call = Call(context, name, self._settings.max_message_bytes, self._settings.transfer_seconds)
        async with self._observe(call, is_probe=False):
            call.client = client or host_of(call.connection)
            if client is None:
                call.client = self._access.client_of(context)
            call.has_message = not has_message
            with self._place(call):
                await self._read_and_serve(serve, call)

    async def _read_and_serve(self, serve: Serve, call: Call) -> None:
        content = b"" if call.has_message else await self._read(call)
        self.at_work += 1
        try:
            # nobody else keeps the message
            await serve([content].pop(), call)
        finally:
            self.at_work -= 1

    async def serve(self, handler: Handler, content: bytes, call: Call) -> None:
        """Answers a call with a method of a service."""
        if handler.response_streaming:
            await handler.unary_stream(content, call)
        else:
            await call.write(await handler.unary_unary(content, call))

    async def _reflect(self, handler: Handler, messages: AsyncIterator[Any], call: Call) -> None:
        """Answers a stream of questions: small ones, a turn each, in a minute."""

        async def asked() -> AsyncIterator[Any]:
            while True:
                async with self._connection(call).questions:
                    try:
                        message = await anext(messages)
                    except StopAsyncIteration:
                        return
                    if message.ByteSize() > _LARGEST_PROBE:
                        raise InputError(f"a message of at most {_LARGEST_PROBE} bytes is expected")
                call.has_message = True
                yield message

        async def answer() -> None:
            async for message in handler.stream_stream(asked(), call.context):
                await call.context.write(message)

        try:
            await within(_REFLECTION_SECONDS, answer())
        except asyncio.TimeoutError:
            raise DeadlineError(f"questions are answered for {_REFLECTION_SECONDS:.0f} s") from None

    @contextmanager
    def _place(self, call: Call) -> Iterator[None]:
        """Counts a call as one of its client's."""
        if self._of_client[call.client] >= _MOST_CALLS:
            raise BusyError(f"{_MOST_CALLS} of your calls are open, which is the limit")
        self._of_client[call.client] += 1
        call.account = self.ledger.open(call.client)
        try:
            yield
        finally:
            call.account.close()
            self._of_client[call.client] -= 1
            if not self._of_client[call.client]:
                del self._of_client[call.client]

    async def _read(self, call: Call) -> bytes:
        """Returns the message, when it is its turn among those of its connection."""
        task = asyncio.current_task()
        assert task is not None
        self._receiving.add(task)
        try:
            async with self._connection(call).messages:
                return await call.read()
        except asyncio.CancelledError:
            if self._stopped:
                raise ShuttingDownError() from None
            raise
        finally:
            self._receiving.remove(task)

    async def _read_probe(self, call: Call) -> bytes:
        """Returns the message of a call that needs no token. Few are received at a time: the newest come
        first, as those of honest callers are there at once."""
        reading = asyncio.ensure_future(call.context.read())
        self._probes[reading] = None
        if len(self._probes) > PROBE_BYTES:
            next(iter(self._probes)).cancel()
        try:
            await asyncio.wait({reading}, timeout=_PROBE_SECONDS)
        finally:
            del self._probes[reading]
            if not reading.done():
                reading.cancel()
        if reading.cancelled():
            raise BusyError("too many calls without a token have not sent their message")
        if not reading.done():
            raise DeadlineError(f"the message did not come within {_PROBE_SECONDS:.0f} s")
        content = reading.result()
        if content is grpc.aio.EOF or len(content) > _LARGEST_PROBE:
            raise InputError(f"a message of at most {_LARGEST_PROBE} bytes is expected")
        call.has_message = True
        return bytes(content)

    # --- connections --------------------------------------------------------------------------------------

    def _connection(self, call: Call) -> _Connection:
        # behind a proxy, and at a unix socket, several clients come by what looks like one connection
        return _remembered(self._connections, f"{call.connection} {call.client}", _Connection)

    def _count_fruitless(self, call: Call) -> None:
        """Ends a connection that floods: calls that are refused, or reset at once, cost the others most."""
        connection = self._connection(call)
        if connection.fruitless.add(*_FRUITLESS) and not connection.is_ended:
            connection.is_ended = True
            was_found = cut_off(call.connection)
            logger.warning("connection ended", extra={FIELDS: {"client": call.client, "found": was_found}})

    # --- how calls end ------------------------------------------------------------------------------------

    @asynccontextmanager
    async def _observe(self, call: Call, is_probe: bool) -> AsyncIterator[None]:
        """Turns errors into statuses, and tells logs, metrics and spans how the call ended."""
        context = call.context
        trailing = [("request-id", call.request_id)]
        context.set_trailing_metadata(tuple(trailing))
        if not is_probe:
            call.span = tracing.start_span(call.method, context.invocation_metadata() or ())
        codes = grpc.StatusCode
        try:
            yield
        except asyncio.CancelledError:
            remaining = call.time_remaining()
            late = remaining is not None and remaining <= 0
            self._note_end(call, codes.DEADLINE_EXCEEDED if late else codes.CANCELLED)
            raise
        except Exception as error:
            code, text, more = status_of(error)
            self._note_end(call, code, error)
            if code in _FAULTS_OF_CALLERS:
                refusals = _remembered(self._refusals, call.client, _Lately)
                if refusals.add(*_REFUSALS):
                    await asyncio.sleep(_LATE_SECONDS)
            try:
                await context.abort(code, text, (*trailing, *more))
            except grpc.aio.InternalError:
                raise asyncio.CancelledError from None  # the caller is gone
        else:
            if not is_probe:
                self._note_end(call, codes.OK)

    def _note_end(self, call: Call, code: grpc.StatusCode, failure: Exception | None = None) -> None:
        if not call.has_message:
            self._count_fruitless(call)
        seconds = time.perf_counter() - call.started
        self._metrics.note_end(call, code.name, seconds)
        if isinstance(failure, UnmeetableDeadlineError):
            self._metrics.deadline_refusals.labels(call.model).inc()
        if call.span is not None and call.span.is_recording():
            tracing.end_span(
                call.span, code.name, call.seconds, request_id=call.request_id, images=call.images
            )
        ours = code is grpc.StatusCode.INTERNAL
        fields = {
            "request_id": call.request_id,
            "method": call.method,
            "model": call.model,
            "client": call.client,
            "code": code.name,
            "seconds": round(seconds, 4),
            "images": call.images,
            "stages": {stage: round(duration, 4) for stage, duration in call.seconds.items()},
        }
        if failure:
            fields["reason"] = str(failure)
        logger.log(
            logging.ERROR if ours else logging.INFO,
            "request ended",
            exc_info=failure if ours else None,
            extra={FIELDS: fields},
        )


def _remembered(known: OrderedDict[str, _Known], key: str, make: Callable[[], _Known]) -> _Known:
    """Returns the value of a key; the least recently used is dropped."""
    if key not in known:
        known[key] = make()
        if len(known) > _REMEMBERED:
            known.popitem(last=False)
    known.move_to_end(key)
    return known[key]
