"""The methods of anydoor.v1.CompositorService: from a message to the batcher, and back."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from functools import partial
from typing import Any

import grpc

from runtime.compositor import Compositor
from runtime.errors import InputError, in_field
from runtime.parameters import sampling_parameters
from runtime.request import Request
from runtime.rpc import compositor_pb2 as pb
from runtime.server.answers import answer, stream_answer
from runtime.server.batching import Batcher
from runtime.server.call import Call
from runtime.server.edit_wire import edit_from_message
from runtime.server.editing import Editing
from runtime.server.events import Event, Failed, Finished, Preview
from runtime.server.parsing import parse
from runtime.server.settings import Settings
from runtime.server.ticket import Ticket
from runtime.server.wire import (
    CONDITIONS,
    QUALITIES,
    Message,
    defaults_message,
    event_message,
    request_from_message,
    where_from_message,
)
from runtime.version import version

NAME: str = pb.DESCRIPTOR.services_by_name["CompositorService"].full_name


class CompositorService:
    """Serves the methods; see the .proto file for what they promise.

    A method takes the bytes of its message and the call. It may return an answer as bytes. What it raises
    becomes the status.
    """

    def __init__(self, batcher: Batcher, settings: Settings, filler: Batcher | None = None) -> None:
        self._batcher = batcher
        self._settings = settings
        self._filler = filler
        self._editing = Editing(batcher, filler, self.follow, self._check_previews)

    @property
    def compositor(self) -> Compositor:
        """What makes the pictures."""
        return self._batcher.compositor

    def handler(self) -> grpc.GenericRpcHandler:
        """What `grpc.aio.Server.add_generic_rpc_handlers` takes; `runtime.server.gate` calls the methods."""
        unary, stream = grpc.unary_unary_rpc_method_handler, grpc.unary_stream_rpc_method_handler
        methods: dict[str, grpc.RpcMethodHandler[Any, Any]] = {
            "Composite": unary(partial(self._finish, pb.CompositeRequest)),
            "CompositeStream": stream(partial(self._stream, pb.CompositeStreamRequest)),
            "Draw": unary(partial(self._finish, pb.DrawRequest)),
            "DrawStream": stream(partial(self._stream, pb.DrawStreamRequest)),
            "Edit": unary(self._edit),
            "EditStream": stream(self._edit_stream),
            "Segment": unary(self._segment),
            "GetModelInfo": unary(self._get_model_info),
        }
        return grpc.method_handlers_generic_handler(NAME, methods)

    async def _finish(
        self, kind: type[pb.CompositeRequest] | type[pb.DrawRequest], content: bytes, call: Call
    ) -> bytes:
        """Composite and Draw."""
        # messages of up to 32 MiB are copied, and pictures are joined, beside the event loop
        message: Message = await asyncio.to_thread(parse, kind, content)
        del content
        async with aclosing(self.events(call, *request_from_message(message))) as events:
            del message
            return await self._finished(answer, await _last(events), call)

    async def _stream(
        self, kind: type[pb.CompositeStreamRequest] | type[pb.DrawStreamRequest], content: bytes, call: Call
    ) -> None:
        """CompositeStream and DrawStream."""
        message: Any = await asyncio.to_thread(parse, kind, content)
        del content
        with in_field("request"):
            request, every = request_from_message(message.request), message.preview_every
            async with aclosing(self.events(call, *request, every)) as events:
                del message, request
                await self._write(events, call)

    async def _write(self, events: AsyncGenerator[Event, None], call: Call) -> None:
        """Sends events as they come, and the pictures last."""
        async for event in events:
            if isinstance(event, Finished):
                await call.write(await self._finished(stream_answer, event, call))
                continue
            await call.write(event_message(event, call.request_id))
            if isinstance(event, Preview):
                call.account.add(-len(event.image))

    async def _edit(self, content: bytes, call: Call) -> bytes:
        message = await asyncio.to_thread(parse, pb.EditRequest, content)
        del content
        async with aclosing(self._edit_events(call, message)) as events:
            del message
            return await self._finished(answer, await _last(events), call)

    async def _edit_stream(self, content: bytes, call: Call) -> None:
        message = await asyncio.to_thread(parse, pb.EditStreamRequest, content)
        del content
        with in_field("request"):
            async with aclosing(self._edit_events(call, message.request, message.preview_every)) as events:
                del message
                await self._write(events, call)

    def _edit_events(
        self, call: Call, message: pb.EditRequest, preview_every: int = 0
    ) -> AsyncGenerator[Event, None]:
        edit, file_format = edit_from_message(message)
        return self._editing.events(call, edit, file_format, preview_every)

    async def _segment(self, content: bytes, call: Call) -> pb.SegmentResponse:
        message = await asyncio.to_thread(parse, pb.SegmentRequest, content)
        del content
        where = where_from_message(message.where)
        accept = partial(self._batcher.segment, message.picture, where)
        del message, where
        follow = self.follow(call, accept)
        del accept
        async with aclosing(follow) as events:
            finished = await _last(events)
        mask = finished.images[0].image
        call.account.set(2 * len(mask))
        return pb.SegmentResponse(
            mask=mask, request_id=call.request_id, seconds=finished.seconds, warnings=finished.warnings
        )

    async def _get_model_info(self, content: bytes, call: Call) -> pb.GetModelInfoResponse:
        parse(pb.GetModelInfoRequest, content)
        return self.model_info()

    async def _finished(self, make: Callable[[Finished, str], bytes], event: Finished, call: Call) -> bytes:
        """The last answer; from now on the request takes no more memory than that."""
        content = await asyncio.to_thread(make, event, call.request_id)
        call.account.set(2 * len(content))  # the transport has a copy
        return content

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
            fills=abilities.fills,
            automatic_masks=compositor.segmenter.finds_main_object,
            clicks=compositor.segmenter.takes_clicks,
            filler=self._filler.compositor.bundle.manifest.system if self._filler else "",
        )

    async def events(
        self, call: Call, request: Request, file_format: str, preview_every: int = 0
    ) -> AsyncGenerator[Event, None]:
        """Submits a request and yields its events up to `Finished`; closing it earlier cancels the request.

        Args:
            call: that asks for it.
            request: its pictures as the bytes of files; who calls keeps it no longer.
            file_format: of the finished pictures.
            preview_every: steps between previews; 0 for none.

        Raises:
            Exception: what the request failed with.
        """
        if preview_every:
            self._check_previews(preview_every, request)
        follow = self.follow(call, partial(self._batcher.submit, request), file_format, preview_every)
        del request  # a request that waits is kept once
        async with aclosing(follow) as events:
            async for event in events:
                yield event

    async def follow(
        self, call: Call, accept: Callable[[Ticket], None], file_format: str = "PNG", preview_every: int = 0
    ) -> AsyncGenerator[Event, None]:
        """Has a ticket accepted, and yields its events, like `events`."""
        events = asyncio.Queue[Event]()
        soon: Callable[..., object] = asyncio.get_running_loop().call_soon_threadsafe
        remaining = call.time_remaining()
        ticket = Ticket(
            notify=partial(soon, events.put_nowait),
            client=call.client,
            deadline=None if remaining is None else time.monotonic() + remaining,
            file_format=file_format,
            preview_every=preview_every,
            account=call.account,
        )
        accept(ticket)
        del accept
        try:
            event: Event | None = None
            while not isinstance(event, Finished):
                event = await events.get()
                if isinstance(event, Failed):
                    raise event.error
                if isinstance(event, Finished):
                    call.seconds, call.images = event.seconds, len(event.images)
                    ticket.encoded.clear()  # the event has the files, until they are sent
                yield event
        finally:
            if ticket.open:
                self._batcher.cancel(ticket)

    def _check_previews(self, every: int, request: Request) -> None:
        with in_field("sampling"):
            steps = sampling_parameters(request.sampling, self._batcher.compositor.defaults).steps
        most = self._settings.max_previews
        # no preview of the last step of a placement: the picture itself comes then
        previews = len(request.placements) * ((steps - 1) // every)
        if previews > most:
            with in_field("preview_every"):
                raise InputError(f"{previews} previews of each picture; at most {most} are made")


async def _last(events: AsyncGenerator[Event, None]) -> Finished:
    """How a request ends that nobody watches."""
    async for event in events:
        if isinstance(event, Finished):
            return event
    raise AssertionError("unreachable")
