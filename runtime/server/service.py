"""The methods of anydoor.v1.CompositorService: from a message to the events of a model, and back."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from functools import partial
from typing import Any

import grpc

from runtime.errors import in_field
from runtime.rpc import compositor_pb2 as pb
from runtime.server.answer_wire import event_message
from runtime.server.answers import answer, stream_answer
from runtime.server.call import Call
from runtime.server.edit_wire import edit_from_message
from runtime.server.events import Event, Finished, Preview
from runtime.server.models import Models
from runtime.server.parsing import parse
from runtime.server.wire import Message, request_from_message, where_from_message

NAME: str = pb.DESCRIPTOR.services_by_name["CompositorService"].full_name


class CompositorService:
    """Serves the methods; see the .proto file for what they promise.

    A method takes the bytes of its message and the call. It may return an answer as bytes. What it raises
    becomes the status.
    """

    def __init__(self, models: Models) -> None:
        self._models = models
        unary, stream = grpc.unary_unary_rpc_method_handler, grpc.unary_stream_rpc_method_handler
        self.methods: dict[str, grpc.RpcMethodHandler[Any, Any]] = {
            "Composite": unary(partial(self._finish, pb.CompositeRequest)),
            "CompositeStream": stream(partial(self._stream, pb.CompositeStreamRequest)),
            "Draw": unary(partial(self._finish, pb.DrawRequest)),
            "DrawStream": stream(partial(self._stream, pb.DrawStreamRequest)),
            "Edit": unary(self._edit),
            "EditStream": stream(self._edit_stream),
            "Segment": unary(self._segment),
            "GetModelInfo": unary(self._get_model_info),
        }
        """Name -> what `runtime.server.gate` serves a call with."""

    def handler(self) -> grpc.GenericRpcHandler:
        """What `grpc.aio.Server.add_generic_rpc_handlers` takes."""
        return grpc.method_handlers_generic_handler(NAME, self.methods)

    async def _finish(
        self, kind: type[pb.CompositeRequest] | type[pb.DrawRequest], content: bytes, call: Call
    ) -> bytes:
        """Composite and Draw."""
        # messages of up to 32 MiB are copied, and pictures are joined, beside the event loop
        message: Message = await asyncio.to_thread(parse, kind, content)
        del content
        async with (
            self._models.use(message.model, call) as model,
            aclosing(model.events(call, *request_from_message(message))) as events,
        ):
            del message
            return await self._finished(answer, await _last(events), call)

    async def _stream(
        self, kind: type[pb.CompositeStreamRequest] | type[pb.DrawStreamRequest], content: bytes, call: Call
    ) -> None:
        """CompositeStream and DrawStream."""
        message: Any = await asyncio.to_thread(parse, kind, content)
        del content
        with in_field("request"):
            async with self._models.use(message.request.model, call) as model:
                request, every = request_from_message(message.request), message.preview_every
                async with aclosing(model.events(call, *request, every)) as events:
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
        async with (
            self._models.use(message.model, call) as model,
            aclosing(model.edit_events(call, *edit_from_message(message))) as events,
        ):
            del message
            return await self._finished(answer, await _last(events), call)

    async def _edit_stream(self, content: bytes, call: Call) -> None:
        message = await asyncio.to_thread(parse, pb.EditStreamRequest, content)
        del content
        with in_field("request"):
            async with self._models.use(message.request.model, call) as model:
                edit, every = edit_from_message(message.request), message.preview_every
                async with aclosing(model.edit_events(call, *edit, every)) as events:
                    del message, edit
                    await self._write(events, call)

    async def _segment(self, content: bytes, call: Call) -> pb.SegmentResponse:
        message = await asyncio.to_thread(parse, pb.SegmentRequest, content)
        del content
        async with self._models.use_any(call) as model:
            follow = model.segment_events(call, message.picture, where_from_message(message.where))
            del message
            async with aclosing(follow) as events:
                finished = await _last(events)
        mask = finished.images[0].image
        call.account.set(2 * len(mask))
        return pb.SegmentResponse(
            mask=mask, request_id=call.request_id, seconds=finished.seconds, warnings=finished.warnings
        )

    async def _get_model_info(self, content: bytes, call: Call) -> pb.GetModelInfoResponse:
        return await self._models.info(parse(pb.GetModelInfoRequest, content).model, call)

    async def _finished(self, make: Callable[[Finished, str], bytes], event: Finished, call: Call) -> bytes:
        """The last answer; from now on the request takes no more memory than that."""
        content = await asyncio.to_thread(make, event, call.request_id)
        call.account.set(2 * len(content))  # the transport has a copy
        return content


async def _last(events: AsyncGenerator[Event, None]) -> Finished:
    """How a request ends that nobody watches."""
    async for event in events:
        if isinstance(event, Finished):
            return event
    raise AssertionError("unreachable")
