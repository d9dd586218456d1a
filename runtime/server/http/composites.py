"""Handles POST /v1/composite, /v1/draw, /v1/edit and /v1/segment: the whole contract, as JSON or as a form.

What a model is is at /v1/model.

A picture comes back in JSON; as a file to who accepts image/ only; or as events on the way to who accepts
text/event-stream, or asks to `stream`.
"""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Mapping, Sequence
from contextlib import aclosing
from http import HTTPStatus
from typing import Any, cast

from runtime.errors import InputError, in_field
from runtime.rpc import compositor_pb2 as pb
from runtime.server.call import Call
from runtime.server.edit_wire import Asked, asked_from_message
from runtime.server.events import Event, Finished, Preview, Queued, StepDone
from runtime.server.http.body import Fields, read_fields
from runtime.server.http.context import EVENTS, JSON, HttpContext, server_sent_event
from runtime.server.http.messages import message_of, plain, segment_message, stream_of
from runtime.server.models import Models

MEDIA_TYPES = {"PNG": "image/png", "JPEG": "image/jpeg", "WEBP": "image/webp", "AVIF": "image/avif"}
_COPIES = 4
"""Copies of a body while it is parsed: itself, its text, the files in it, and the message."""


class Composites:
    """Answers the requests for pictures in the runtime's own form."""

    def __init__(self, models: Models, addresses: Sequence[str]) -> None:
        """Keeps the models, and where gRPC answers, for the commands that the studio shows."""
        self.models = models
        ports = (address.rpartition(":")[2] for address in addresses)
        port = next(filter(str.isdecimal, ports), "")
        self._grpc = {"x_grpc_port": port} if port else {}

    async def fields(self, content: bytes, call: Call) -> Fields:
        """Returns the fields of a body, read beside the event loop.

        Raises:
            InputError: it cannot be read.
            LoadingError, ShuttingDownError, EngineLostError: requests are not accepted.
        """
        self.models.check_accepting()
        call.account.set(_COPIES * len(content))
        context = cast(HttpContext, call.context)
        if (coding := context.header("content-encoding")) not in ("", "identity"):
            raise InputError(f"a body that is encoded ({coding[:100]}) is not read: send it as it is")
        return await asyncio.to_thread(read_fields, content, context.header("content-type"))

    async def composite(self, content: bytes, call: Call) -> None:
        """POST /v1/composite."""
        fields = await self.fields(content, call)
        if "scene" not in fields:
            with in_field("scene"):
                raise InputError("give a scene; /v1/draw draws without one")
        await self._answer(fields, pb.CompositeRequest, call)

    async def draw(self, content: bytes, call: Call) -> None:
        """POST /v1/draw."""
        fields = await self.fields(content, call)
        if "scene" in fields:
            with in_field("scene"):
                raise InputError("a drawing has no scene; /v1/composite draws into one")
        await self._answer(fields, pb.DrawRequest, call)

    async def edit(self, content: bytes, call: Call) -> None:
        """POST /v1/edit."""
        await self._answer(await self.fields(content, call), pb.EditRequest, call)

    async def segment(self, content: bytes, call: Call) -> None:
        """POST /v1/segment."""
        fields = await self.fields(content, call)
        message = await asyncio.to_thread(segment_message, fields)
        fields.clear()
        context = cast(HttpContext, call.context)
        async with self.models.use_any(call) as model:
            found = await model.segment(call, message)
        if context.wants("image/"):
            more = warning_header(found.warnings)
            if found.HasField("score"):
                more["x_score"] = f"{found.score:g}"
            context.head(MEDIA_TYPES["PNG"], HTTPStatus.OK, **more)
            await call.write(found.mask)
        else:
            await send_json(call, {**plain(found), "warnings": list(found.warnings)})

    async def model(self, content: bytes, call: Call) -> None:
        """GET /v1/model, or /v1/model?model=NAME: as GetModelInfo."""
        name = cast(HttpContext, call.context).query("model")
        info = plain(await self.models.info(name, call))
        await send_json(call, info, HTTPStatus.OK, **self._grpc)

    async def _answer(self, fields: Fields, kind: type[Asked], call: Call) -> None:
        context = cast(HttpContext, call.context)
        is_stream = stream_of(fields) or context.wants(EVENTS)
        message, every = await asyncio.to_thread(message_of, fields, kind)
        fields.clear()
        name, (request, file_format) = message.model, asked_from_message(message)
        is_file = context.wants("image/") and not is_stream
        if is_file:
            with in_field("num_images"):
                check_is_single(request.num_images)
        del message
        async with (
            self.models.use(name, call) as model,
            aclosing(model.events(call, request, file_format, every)) as events,
        ):
            del request
            if is_stream:
                context.head_of_events()
            async for event in events:
                if isinstance(event, Finished) and is_file:
                    await send_file(event, file_format, call)
                elif isinstance(event, Finished):
                    answer = await finished_json(event, call)
                    if not is_stream:
                        context.head(JSON)
                        await call.write(answer)
                    else:
                        await call.write(b"event: result\ndata: " + answer + b"\n\n")
                elif is_stream:
                    await call.write(server_sent_event(*plain_event(event)))
                if isinstance(event, Preview):
                    call.account.add(-len(event.image))


async def send_json(
    call: Call, fields: Mapping[str, Any], status: HTTPStatus = HTTPStatus.OK, **headers: str
) -> None:
    """Answers with a small object; in names of headers _ stands for -."""
    cast(HttpContext, call.context).head(JSON, status, **headers)
    await call.write(json.dumps(fields).encode())


async def finished_json(finished: Finished, call: Call) -> bytes:
    """Returns the answer, made beside the event loop; from then on the request takes no more memory than
    that."""
    content = await asyncio.to_thread(_json_of, finished, call.request_id)
    call.account.set(2 * len(content))  # the transport has a copy
    return content


def _json_of(finished: Finished, request_id: str) -> bytes:
    images = []
    while finished.images:
        image = finished.images.pop(0)
        regions = [list(region) for region in image.regions]
        images.append(
            {"image": base64.b64encode(image.image).decode(), "seed": image.seed, "regions": regions}
        )
    rest = {"request_id": request_id, "seconds": finished.seconds, "warnings": finished.warnings}
    filler = {"filler": finished.filler} if finished.filler else {}
    return json.dumps({"images": images, **rest, **filler}).encode()


async def send_file(finished: Finished, file_format: str, call: Call) -> None:
    """Answers with the picture alone; its seed and what is to be known are in headers."""
    context, image = cast(HttpContext, call.context), finished.images[0]
    more = {"x_seed": str(image.seed), **warning_header(finished.warnings)}
    context.head(MEDIA_TYPES[file_format], HTTPStatus.OK, **more)
    await call.write(image.image)


def check_is_single(count: int) -> None:
    """Checks that so many pictures can be a file.

    Raises:
        InputError: they cannot.
    """
    if count != 1:
        raise InputError(
            "only a single picture can be returned as a file: accept application/json for several"
        )


def warning_header(warnings: Sequence[str]) -> dict[str, str]:
    """Returns the header for what is to be known."""
    return {"x_warnings": json.dumps(list(warnings))} if warnings else {}


def plain_event(event: Event) -> tuple[str, dict[str, Any]]:
    """Returns name and fields of an event on the way."""
    if isinstance(event, Queued):
        return "queued", {"position": event.position}
    if isinstance(event, StepDone):
        return "step_done", {"done": event.done, "total": event.total}
    assert isinstance(event, Preview)
    return "preview", {
        "image_index": event.image_index,
        "image": base64.b64encode(event.image).decode(),
    }
