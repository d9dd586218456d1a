"""The methods of anydoor.v1.CompositorService: from a message to the scheduler, and back."""

from __future__ import annotations

import asyncio
import logging
import math
import time
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from operator import methodcaller
from typing import TYPE_CHECKING, Any

import grpc
from google.protobuf.message import DecodeError

from runtime.errors import InputError, in_field
from runtime.rpc import compositor_pb2 as pb
from runtime.server.access import client_of
from runtime.server.batching import Scheduler
from runtime.server.logs import log
from runtime.server.metrics import Metrics
from runtime.server.settings import Settings
from runtime.server.ticket import (
    DeadlineError,
    EngineLostError,
    Event,
    Failed,
    Finished,
    Order,
    QueueFullError,
    ShuttingDownError,
)
from runtime.server.tracing import start_request_span
from runtime.server.wire import event_message, request_from_message, response_message

if TYPE_CHECKING:
    Context = grpc.aio.ServicerContext[Any, Any]

NAME: str = pb.DESCRIPTOR.services_by_name["CompositorService"].full_name


logger = logging.getLogger(__name__)


@dataclass
class _Call:
    """What is known of a call, for logs, metrics and spans."""

    method: str
    client: str
    request_id: str = field(default_factory=lambda: uuid.uuid4().hex)
    seconds: dict[str, float] = field(default_factory=dict)
    images: int = 0


class CompositorService:
    """Serves the methods; see the .proto file for what they promise."""

    def __init__(self, scheduler: Scheduler, settings: Settings, metrics: Metrics) -> None:
        self._scheduler = scheduler
        self._settings = settings
        self._metrics = metrics

    def handler(self) -> grpc.GenericRpcHandler:
        """What `grpc.aio.Server.add_generic_rpc_handlers` takes.

        The generated registration would answer a message that cannot be parsed with INTERNAL; it is the
        caller's mistake, so parsing is left to the methods.
        """
        unary, stream = grpc.unary_unary_rpc_method_handler, grpc.unary_stream_rpc_method_handler
        serialize = methodcaller("SerializeToString")
        methods: dict[str, grpc.RpcMethodHandler[Any, Any]] = {
            "Composite": unary(self._composite, None, serialize),
            "CompositeStream": stream(self._composite_stream, None, serialize),
            "GetModelInfo": unary(self._get_model_info, None, serialize),
        }
        return grpc.method_handlers_generic_handler(NAME, methods)

    async def _composite(self, content: bytes, context: Context) -> pb.CompositeResponse:
        async with self._observe("Composite", context) as call:
            async with self._submit(call, _parse(pb.CompositeRequest, content), 0, context) as events:
                while not isinstance(event := await _next(events, call), Finished):
                    pass
            return response_message(event, call.request_id)
        raise AssertionError("unreachable")

    async def _composite_stream(self, content: bytes, context: Context) -> None:
        async with self._observe("CompositeStream", context) as call:
            message = _parse(pb.CompositeStreamRequest, content)
            with in_field("request"):
                async with self._submit(call, message.request, message.preview_every, context) as events:
                    event: Event | None = None
                    while not isinstance(event, Finished):
                        event = await _next(events, call)
                        await context.write(event_message(event, call.request_id))

    async def _get_model_info(self, content: bytes, context: Context) -> pb.GetModelInfoResponse:
        async with self._observe("GetModelInfo", context):
            _parse(pb.GetModelInfoRequest, content)
            return self.model_info()
        raise AssertionError("unreachable")

    def model_info(self) -> pb.GetModelInfoResponse:
        """The answer to GetModelInfo."""
        settings, compositor = self._settings, self._scheduler.compositor
        manifest = compositor.bundle.manifest
        return pb.GetModelInfoResponse(
            version=version("anydoor-runtime"),
            checkpoint_sha256=str(manifest.checkpoint.get("sha256", "")),
            precision=manifest.precision,
            backend=compositor.engine.backend,
            device=compositor.engine.device,
            resolution=manifest.model.resolution,
            max_batch=self._scheduler.max_batch,
            limits=pb.Limits(
                message_bytes=settings.max_message_bytes,
                pixels=settings.max_pixels,
                steps=settings.max_steps,
                images=settings.max_images,
                placements=settings.max_placements,
                previews=settings.max_previews,
            ),
        )

    @asynccontextmanager
    async def _submit(
        self, call: _Call, message: pb.CompositeRequest, preview_every: int, context: Context
    ) -> AsyncIterator[asyncio.Queue[Event]]:
        """Submits a request and gives its events; leaving the block before the last one cancels it."""
        request, file_format = request_from_message(message)
        self._check_previews(preview_every, request.sampling.steps)
        loop, events = asyncio.get_running_loop(), asyncio.Queue[Event]()
        remaining = context.time_remaining()
        ticket = self._scheduler.submit(
            request,
            Order(
                notify=lambda event: loop.call_soon_threadsafe(events.put_nowait, event),
                client=call.client,
                deadline=None if remaining is None else time.monotonic() + remaining,
                file_format=file_format,
                preview_every=preview_every,
            ),
        )
        del message, request  # a request that waits is better kept once
        try:
            yield events
        finally:
            self._scheduler.cancel(ticket)

    def _check_previews(self, every: int, steps: int) -> None:
        most = self._settings.max_previews
        # no preview of the last step: the picture itself comes then
        if every and (steps - 1) // every > most:
            error = InputError(f"{(steps - 1) // every} previews of each picture; at most {most} are made")
            error.field = "preview_every"
            raise error

    @asynccontextmanager
    async def _observe(self, method: str, context: Context) -> AsyncIterator[_Call]:
        """Turns errors into statuses, and tells logs, metrics and spans how the call ended."""
        call = _Call(method, client_of(context, bool(self._settings.tokens)))
        started = time.perf_counter()
        trailing = [("request-id", call.request_id)]
        context.set_trailing_metadata(trailing)
        metadata = {
            key: value for key, value in context.invocation_metadata() or () if isinstance(value, str)
        }
        span = start_request_span(f"{NAME}/{method}", metadata)

        def end(code: grpc.StatusCode, failure: Exception | None = None) -> None:
            self._note_end(call, code, time.perf_counter() - started, failure)
            span.end(code.name, call.seconds, request_id=call.request_id, images=call.images)

        try:
            yield call
        except asyncio.CancelledError:
            remaining = context.time_remaining()
            late = remaining is not None and remaining <= 0
            end(grpc.StatusCode.DEADLINE_EXCEEDED if late else grpc.StatusCode.CANCELLED)
            raise
        except Exception as error:
            code, text, more = _status(error)
            end(code, error)
            await context.abort(code, text, (*trailing, *more))
        else:
            end(grpc.StatusCode.OK)

    def _note_end(
        self, call: _Call, code: grpc.StatusCode, seconds: float, failure: Exception | None
    ) -> None:
        self._metrics.requests.labels(call.method, code.name).inc()
        self._metrics.request_seconds.labels(call.method).observe(seconds)
        for stage, duration in call.seconds.items():
            self._metrics.stage_seconds.labels(stage).observe(duration)
        ours = code is grpc.StatusCode.INTERNAL
        log(
            logger,
            logging.ERROR if ours else logging.INFO,
            "request ended",
            failure if ours else None,
            request_id=call.request_id,
            method=call.method,
            client=call.client,
            code=code.name,
            seconds=round(seconds, 4),
            images=call.images,
            stages={stage: round(duration, 4) for stage, duration in call.seconds.items()},
            **({"reason": str(failure)} if failure else {}),
        )


async def _next(events: asyncio.Queue[Event], call: _Call) -> Event:
    """The next event.

    Raises:
        Exception: what `Failed` holds.
    """
    event = await events.get()
    if isinstance(event, Failed):
        raise event.error
    if isinstance(event, Finished):
        call.seconds, call.images = event.seconds, len(event.images)
    return event


def _parse(kind: Callable[[], Any], content: bytes) -> Any:
    message = kind()
    try:
        message.ParseFromString(content)
    except DecodeError as error:
        raise InputError("the message cannot be parsed") from error
    return message


def _status(error: Exception) -> tuple[grpc.StatusCode, str, list[tuple[str, str]]]:
    """Status code, text and trailing metadata for an error."""
    if isinstance(error, InputError):
        text = f"{error.field}: {error}" if error.field else str(error)
        return grpc.StatusCode.INVALID_ARGUMENT, text, [("field", error.field)]
    if isinstance(error, QueueFullError):
        milliseconds = str(math.ceil(error.retry_seconds * 1000))
        return grpc.StatusCode.RESOURCE_EXHAUSTED, str(error), [("grpc-retry-pushback-ms", milliseconds)]
    if isinstance(error, ShuttingDownError | EngineLostError):
        return grpc.StatusCode.UNAVAILABLE, str(error), []
    if isinstance(error, DeadlineError):
        return grpc.StatusCode.DEADLINE_EXCEEDED, str(error), []
    # what went wrong inside is for the log; the request id leads there
    return grpc.StatusCode.INTERNAL, "the engine failed on this request", []
