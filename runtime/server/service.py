"""The methods of anydoor.v1.CompositorService: from a message to the batcher, and back."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import math
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from operator import methodcaller
from typing import TYPE_CHECKING, Any

import grpc
from google.protobuf.message import DecodeError

from runtime.errors import InputError, in_field
from runtime.parameters import sampling_parameters
from runtime.request import Request
from runtime.rpc import compositor_pb2 as pb
from runtime.server import tracing
from runtime.server.batching import Batcher
from runtime.server.events import (
    DeadlineError,
    EngineLostError,
    Event,
    Failed,
    Finished,
    QueueFullError,
    ShuttingDownError,
    UnmeetableDeadlineError,
)
from runtime.server.logs import FIELDS
from runtime.server.metrics import Metrics
from runtime.server.settings import Settings
from runtime.server.ticket import Ticket
from runtime.server.wire import (
    CONDITIONS,
    QUALITIES,
    Message,
    defaults_message,
    event_message,
    request_from_message,
    response_message,
)
from runtime.version import version

if TYPE_CHECKING:
    Context = grpc.aio.ServicerContext[Any, Any]

NAME: str = pb.DESCRIPTOR.services_by_name["CompositorService"].full_name

logger = logging.getLogger(__name__)


@dataclass
class _Call:
    """What logs, metrics and spans say of a call."""

    method: str
    client: str
    request_id: str
    span: Any
    """None without OpenTelemetry."""
    started: float = field(default_factory=time.perf_counter)
    seconds: dict[str, float] = field(default_factory=dict)
    """Stage -> time, when it is finished."""
    images: int = 0


class CompositorService:
    """Serves the methods; see the .proto file for what they promise."""

    def __init__(self, batcher: Batcher, settings: Settings, metrics: Metrics) -> None:
        self._batcher = batcher
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
            "Composite": unary(partial(self._finish, "Composite", pb.CompositeRequest), None, serialize),
            "CompositeStream": stream(
                partial(self._stream, "CompositeStream", pb.CompositeStreamRequest), None, serialize
            ),
            "Draw": unary(partial(self._finish, "Draw", pb.DrawRequest), None, serialize),
            "DrawStream": stream(partial(self._stream, "DrawStream", pb.DrawStreamRequest), None, serialize),
            "GetModelInfo": unary(self._get_model_info, None, serialize),
        }
        return grpc.method_handlers_generic_handler(NAME, methods)

    async def _finish(
        self,
        method: str,
        kind: type[pb.CompositeRequest] | type[pb.DrawRequest],
        content: bytes,
        context: Context,
    ) -> pb.CompositeResponse:
        """Composite and Draw."""
        async with self._observe(method, context) as call:
            message = kind.FromString(content)
            async with aclosing(self._events(call, context, message)) as events:
                async for event in events:
                    if isinstance(event, Finished):
                        return response_message(event, call.request_id)
        raise AssertionError("unreachable")

    async def _stream(
        self,
        method: str,
        kind: type[pb.CompositeStreamRequest] | type[pb.DrawStreamRequest],
        content: bytes,
        context: Context,
    ) -> None:
        """CompositeStream and DrawStream."""
        async with self._observe(method, context) as call:
            message = kind.FromString(content)
            with in_field("request"):
                async with aclosing(
                    self._events(call, context, message.request, message.preview_every)
                ) as events:
                    async for event in events:
                        await context.write(event_message(event, call.request_id))

    async def _get_model_info(self, content: bytes, context: Context) -> pb.GetModelInfoResponse:
        async with self._observe("GetModelInfo", context):
            pb.GetModelInfoRequest.FromString(content)
            return self.model_info()
        raise AssertionError("unreachable")

    def model_info(self) -> pb.GetModelInfoResponse:
        """The answer to GetModelInfo."""
        settings, compositor = self._settings, self._batcher.compositor
        manifest, abilities = compositor.bundle.manifest, compositor.system.abilities
        height, width = manifest.picture_size
        return pb.GetModelInfoResponse(
            version=version(),
            checkpoint_sha256=str(manifest.checkpoint.get("sha256", "")),
            precision=manifest.precision,
            backend=compositor.engine.backend,
            device=compositor.engine.device,
            resolution=max(width, height),
            max_batch=self._batcher.max_batch,
            limits=pb.Limits(
                message_bytes=settings.max_message_bytes,
                pixels=settings.max_pixels,
                steps=settings.max_steps,
                images=settings.max_images,
                placements=settings.max_placements,
                previews=settings.max_previews,
            ),
            system=manifest.system,
            defaults=defaults_message(compositor.defaults),
            condition=CONDITIONS[abilities.condition],
            picture_width=width,
            picture_height=height,
            scene_channels=int(manifest.architecture.get("scene_channels", 0)),
            qualities=[QUALITIES[quality] for quality in abilities.qualities],
        )

    async def _events(
        self, call: _Call, context: Context, message: Message, preview_every: int = 0
    ) -> AsyncGenerator[Event, None]:
        """Submits a request and yields its events up to `Finished`; closing it earlier cancels the request.

        Raises:
            Exception: what the request failed with.
        """
        request, file_format = request_from_message(message)
        if preview_every:
            self._check_previews(preview_every, request)
        events = asyncio.Queue[Event]()
        soon: Callable[..., object] = asyncio.get_running_loop().call_soon_threadsafe
        remaining = context.time_remaining()
        ticket = Ticket(
            notify=partial(soon, events.put_nowait),
            client=call.client,
            deadline=None if remaining is None else time.monotonic() + remaining,
            file_format=file_format,
            preview_every=preview_every,
        )
        self._batcher.submit(request, ticket)
        del message, request  # a request that waits is kept once
        try:
            event: Event | None = None
            while not isinstance(event, Finished):
                event = await events.get()
                if isinstance(event, Failed):
                    raise event.error
                if isinstance(event, Finished):
                    call.seconds, call.images = event.seconds, len(event.images)
                yield event
        finally:
            if ticket.open:
                self._batcher.cancel(ticket)

    def _check_previews(self, every: int, request: Request) -> None:
        with in_field("sampling"):
            steps = sampling_parameters(request.sampling, self._batcher.compositor.defaults).steps
        most = self._settings.max_previews
        # no preview of the last step: the picture itself comes then
        if (steps - 1) // every > most:
            with in_field("preview_every"):
                raise InputError(f"{(steps - 1) // every} previews of each picture; at most {most} are made")

    @asynccontextmanager
    async def _observe(self, method: str, context: Context) -> AsyncIterator[_Call]:
        """Turns errors into statuses, and tells logs, metrics and spans how the call ended."""
        span = None
        if tracing.TRACER:
            metadata = {
                key: value for key, value in context.invocation_metadata() or () if isinstance(value, str)
            }
            parent = tracing.propagate.extract(metadata)
            span = tracing.TRACER.start_span(f"{NAME}/{method}", parent, tracing.trace.SpanKind.SERVER)
        call = _Call(method, _client_of(context, bool(self._settings.tokens)), uuid.uuid4().hex, span)
        trailing = [("request-id", call.request_id)]
        context.set_trailing_metadata(trailing)
        try:
            yield call
        except asyncio.CancelledError:
            remaining = context.time_remaining()
            late = remaining is not None and remaining <= 0
            self._note_end(call, grpc.StatusCode.DEADLINE_EXCEEDED if late else grpc.StatusCode.CANCELLED)
            raise
        except Exception as error:
            code, text, more = _status(error)
            self._note_end(call, code, error)
            await context.abort(code, text, (*trailing, *more))
        else:
            self._note_end(call, grpc.StatusCode.OK)

    def _note_end(self, call: _Call, code: grpc.StatusCode, failure: Exception | None = None) -> None:
        seconds = time.perf_counter() - call.started
        self._metrics.requests.labels(call.method, code.name).inc()
        self._metrics.request_seconds.labels(call.method).observe(seconds)
        if isinstance(failure, UnmeetableDeadlineError):
            self._metrics.deadline_refusals.inc()
        for stage, duration in call.seconds.items():
            self._metrics.stage_seconds.labels(stage).observe(duration)
        if call.span is not None and call.span.is_recording():
            tracing.end_span(
                call.span, code.name, call.seconds, request_id=call.request_id, images=call.images
            )
        ours = code is grpc.StatusCode.INTERNAL
        fields = {
            "request_id": call.request_id,
            "method": call.method,
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


def _client_of(context: Context, tokens_checked: bool) -> str:
    """A name for the caller that it cannot choose freely: its token, its certificate, or its host."""
    for key, value in context.invocation_metadata() or ():
        if tokens_checked and key == "authorization":
            token = value if isinstance(value, bytes) else value.encode()
            return "token:" + hashlib.sha256(token).hexdigest()[:12]
    certificate = context.auth_context()
    for key in ("x509_common_name", "x509_subject_alternative_name"):
        for name in certificate.get(key, ()):
            return "certificate:" + name.decode("utf-8", "replace")
    # "ipv4:10.0.0.1:4711": a port says nothing about who it is
    peer: str = context.peer()
    return peer.rpartition(":")[0] or peer


def _status(error: Exception) -> tuple[grpc.StatusCode, str, list[tuple[str, str]]]:
    """Status code, text and trailing metadata for an error."""
    if isinstance(error, InputError):
        text = f"{error.field}: {error}" if error.field else str(error)
        return grpc.StatusCode.INVALID_ARGUMENT, text, [("field", error.field)]
    if isinstance(error, DecodeError):
        return grpc.StatusCode.INVALID_ARGUMENT, "the message cannot be parsed", [("field", "")]
    if isinstance(error, QueueFullError):
        milliseconds = str(math.ceil(error.retry_seconds * 1000))
        return grpc.StatusCode.RESOURCE_EXHAUSTED, str(error), [("grpc-retry-pushback-ms", milliseconds)]
    if isinstance(error, ShuttingDownError | EngineLostError):
        return grpc.StatusCode.UNAVAILABLE, str(error), []
    if isinstance(error, DeadlineError):
        # of those that cannot be met as well: RESOURCE_EXHAUSTED would have clients try again within it
        return grpc.StatusCode.DEADLINE_EXCEEDED, str(error), []
    # what went wrong inside is for the log; the request id leads there
    return grpc.StatusCode.INTERNAL, "the engine failed on this request", []
