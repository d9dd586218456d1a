"""Implements the methods of anydoor.v1.CompositorService."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from functools import partial
from typing import Any

import grpc

from runtime.errors import in_field
from runtime.rpc import compositor_pb2 as pb
from runtime.server.answers import answer, stream_answer
from runtime.server.call import Call
from runtime.server.edit_wire import Asked, asked_from_message
from runtime.server.events import Event, Finished, Preview
from runtime.server.models import Models
from runtime.server.parsing import parse
from runtime.server.wire import event_message

AskedStream = pb.CompositeStreamRequest | pb.DrawStreamRequest | pb.EditStreamRequest

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
            "Edit": unary(partial(self._finish, pb.EditRequest)),
            "EditStream": stream(partial(self._stream, pb.EditStreamRequest)),
            "Segment": unary(self._segment),
            "GetModelInfo": unary(self._get_model_info),
        }
        """Name -> what `runtime.server.gate` serves a call with."""

    def handler(self) -> grpc.GenericRpcHandler:
        """Returns what `grpc.aio.Server.add_generic_rpc_handlers` takes."""
        return grpc.method_handlers_generic_handler(NAME, self.methods)

    async def _finish(self, kind: type[Asked], content: bytes, call: Call) -> bytes:
        """Handles Composite, Draw and Edit."""
        # messages of up to 32 MiB are copied, and pictures are joined, beside the event loop
        message: Asked = await asyncio.to_thread(parse, kind, content)
        del content
        async with (
            self._models.use(message.model, call) as model,
            aclosing(model.events(call, *asked_from_message(message))) as events,
        ):
            del message
            return await self._finished(answer, await _last(events), call)

    async def _stream(self, kind: type[AskedStream], content: bytes, call: Call) -> None:
        """CompositeStream, DrawStream and EditStream."""
        message: Any = await asyncio.to_thread(parse, kind, content)
        del content
        with in_field("request"):
            async with self._models.use(message.request.model, call) as model:
                request, every = asked_from_message(message.request), message.preview_every
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

    async def _segment(self, content: bytes, call: Call) -> pb.SegmentResponse:
        message = await asyncio.to_thread(parse, pb.SegmentRequest, content)
        del content
        async with self._models.use_any(call) as model:
            return await model.segment(call, message)

    async def _get_model_info(self, content: bytes, call: Call) -> pb.GetModelInfoResponse:
        return await self._models.info(parse(pb.GetModelInfoRequest, content).model, call)

    async def _finished(self, make: Callable[[Finished, str], bytes], event: Finished, call: Call) -> bytes:
        """Returns the last answer; from now on the request takes no more memory than that."""
        content = await asyncio.to_thread(make, event, call.request_id)
        call.account.set(2 * len(content))  # the transport has a copy
        return content


async def _last(events: AsyncGenerator[Event, None]) -> Finished:
    """Returns the last event of a request."""
    async for event in events:
        if isinstance(event, Finished):
            return event
    raise AssertionError("unreachable")
