"""Handles image edits and generations in the form of OpenAI's API, for clients with another base URL.

Source: OpenAI's API reference, "Images" and "Image streaming". Their clients send ours by `extra_body`: the
fields of a placement and of a sampling, `reference_image`, and `seed`.
"""

from __future__ import annotations

import asyncio
import base64
import json
import re
import time
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from dataclasses import replace
from typing import Any, cast

from runtime.errors import InputError, in_field
from runtime.imaging.masks import TransparentPlace
from runtime.parameters import sampling_parameters
from runtime.request import Request
from runtime.rpc import compositor_pb2 as pb
from runtime.server.call import Call
from runtime.server.events import Event, Finished, Preview
from runtime.server.http.body import Fields
from runtime.server.http.composites import Composites, send_json
from runtime.server.http.context import JSON, HttpContext, server_sent_event
from runtime.server.http.messages import (
    PLACEMENT,
    SAMPLING,
    choice_of,
    file_of,
    message_of,
    stream_of,
    text_of,
    whole_of,
)
from runtime.server.wire import request_from_message

QUALITIES: Mapping[str, str | None] = {
    "auto": None,
    "high": "exact",
    "standard": "exact",
    "medium": "balanced",
    "low": "fast",
}
"""Theirs -> ours; None leaves it to the model."""
FORMATS = ("png", "jpeg", "webp")
MOST_PARTIAL_IMAGES = 3

WITHOUT_EFFECT = ("user", "background", "moderation", "input_fidelity", "output_compression")
_SETTLED = {"response_format": ["b64_json"], "background": ["auto", "opaque"]}
_SIZE = re.compile(r"(\d{1,5})x(\d{1,5})")
_NO_TOKENS = {"input_tokens": 0, "output_tokens": 0, "total_tokens": 0}


class Images:
    """Answers POST /v1/images/edits and /v1/images/generations, and GET /v1/models."""

    def __init__(self, composites: Composites) -> None:
        self._composites = composites
        self._models = composites.models

    async def models(self, content: bytes, call: Call) -> None:
        """GET /v1/models, and /v1/models/NAME."""
        name = cast(HttpContext, call.context).path.get("name")
        if name is not None:
            await send_json(call, self._described(self._models.find(name)))
            return
        models = [self._described(each) for each in self._models.names]
        await send_json(call, {"object": "list", "data": models})

    def _described(self, name: str) -> Fields:
        fields: Fields = {"id": name, "object": "model", "created": self._models.bundles.created(name)}
        return {**fields, "owned_by": "anydoor", "status": self._models.status(name)}

    async def edit(self, content: bytes, call: Call) -> None:
        """POST /v1/images/edits."""
        fields = await self._composites.fields(content, call)
        await self._answer("image_edit", self._edit_fields, fields, call)

    async def generate(self, content: bytes, call: Call) -> None:
        """POST /v1/images/generations."""
        fields = await self._composites.fields(content, call)
        await self._answer("image_generation", self._generation_fields, fields, call)

    async def _answer(self, kind: str, translate: Any, fields: Fields, call: Call) -> None:
        is_stream = stream_of(fields)
        with in_field("partial_images"):
            partial = _partial_images(fields.pop("partial_images", None))
        with in_field("model"):
            given = fields.pop("model", None)
            name = self._models.find("" if given is None else text_of(given))
        request, file_format = await asyncio.to_thread(translate, fields)
        defaults = {"output_format": "png", "quality": "auto", "size": "auto"}
        described = {name: fields.get(name) or default for name, default in defaults.items()}
        described["background"] = "opaque"
        fields.clear()
        context = cast(HttpContext, call.context)
        async with self._models.use(name, call) as model:
            every = _preview_every(request, partial, model.compositor.defaults) if is_stream else 0
            async with aclosing(model.events(call, request, file_format, every)) as events:
                del request
                if is_stream:
                    context.head_of_events()
                    await self._stream(kind, partial, described, events, call)
                    return
                async for event in events:
                    if isinstance(event, Finished):
                        answer = await asyncio.to_thread(_answer_of, event, described)
                        call.account.set(2 * len(answer))
                        context.head(JSON)
                        await call.write(answer)

    async def _stream(
        self, kind: str, partial: int, more: Fields, events: AsyncGenerator[Event, None], call: Call
    ) -> None:
        told: dict[int, int] = {}
        async for event in events:
            if isinstance(event, Preview):
                index = told.get(event.image_index, 0)
                told[event.image_index] = index + 1
                if index < partial:
                    more_of_it = {"partial_image_index": index, "output_format": "jpeg"}
                    await _send(kind, "partial_image", event.image, {**more, **more_of_it}, call)
                call.account.add(-len(event.image))
            elif isinstance(event, Finished):
                call.account.set(3 * sum(len(image.image) for image in event.images))
                while event.images:
                    image = event.images.pop(0)
                    ours = {"seed": image.seed, "warnings": event.warnings, "usage": _NO_TOKENS}
                    await _send(kind, "completed", image.image, {**more, **ours}, call)

    def _edit_fields(self, fields: Fields) -> tuple[Request, str]:
        """Returns the request of an edit."""
        fields = self._common(fields)
        with in_field("image"):
            given = fields.pop("image", None)
            images = [file_of(each) for each in (given if isinstance(given, list) else [given])]
            if not images:
                raise InputError("the scene is expected, or a list of the scene and pictures of the object")
        with in_field("size"):
            size = _size(fields.pop("size", None))
        mask = fields.pop("mask", None)
        if fields.get("prompt") == "":  # which their clients always send
            del fields["prompt"]
        placement = {name: fields.pop(name) for name in list(fields) if name in PLACEMENT}
        if len(images) > 1:
            placement = _joined(placement, {"reference": images[1:]})
        if "reference_image" in fields:
            placement = _joined(placement, {"reference": fields.pop("reference_image")})
        fields = _joined(fields, {"scene": images[0], "placements": [placement]})
        message, _ = message_of(fields, pb.CompositeRequest)
        request, file_format = request_from_message(message)
        place = request.placements[0]
        if mask is not None:
            with in_field("mask"):
                if place.box is not None:
                    raise InputError("give either box or mask, not both")
                place = replace(place, mask=TransparentPlace(file_of(mask)))
        elif place.box is None:
            # by their rule, a scene is its own mask
            place = replace(place, mask=TransparentPlace(images[0]))
        return replace(request, placements=[place], scene_size=size), file_format

    def _generation_fields(self, fields: Fields) -> tuple[Request, str]:
        """Returns the request of a generation."""
        fields = self._common(fields)
        with in_field("size"):
            size = _size(fields.pop("size", None))
        if size is not None:
            fields = _joined(fields, {"width": size[0], "height": size[1]})
        message, _ = message_of(fields, pb.DrawRequest)
        return request_from_message(message)

    def _common(self, given: Fields) -> Fields:
        """Fields that are the same in both, in our names."""
        fields = {name: value for name, value in given.items() if value is not None}
        for name, allowed in _SETTLED.items():
            with in_field(name):
                if name in fields and fields[name] not in allowed:
                    raise InputError(f"only {allowed[0]} is offered")
        for name in (*WITHOUT_EFFECT, "response_format"):
            fields.pop(name, None)
        if "n" in fields:
            fields = _joined(fields, {"num_images": fields.pop("n")})
        with in_field("quality"):
            quality = choice_of(fields.pop("quality", "auto"), QUALITIES)
        with in_field("output_format"):
            choice_of(fields.get("output_format", "png"), FORMATS)
        sampling = {name: fields.pop(name) for name in list(fields) if name in SAMPLING}
        if QUALITIES[quality] is not None:
            sampling["quality"] = QUALITIES[quality]
        return _joined(fields, {"sampling": sampling}) if sampling else fields


def _joined(fields: Fields, ours: Fields) -> Fields:
    """Fields, and those that others of OpenAI's stand for, which must not be there twice."""
    for name in fields.keys() & ours.keys():
        with in_field(name):
            raise InputError("another field of the request says this, too: leave one of them out")
    return fields | ours


def _preview_every(request: Request, partial: int, defaults: Mapping[str, Any]) -> int:
    """Returns steps between previews, for a number of partial images."""
    if not partial:
        return 0
    with in_field("sampling"):
        steps = sampling_parameters(request.sampling, defaults).steps
    return max(1, -(-steps // (partial + 1)))


def _partial_images(value: Any) -> int:
    return 0 if value in (None, "") else whole_of(value, 0, MOST_PARTIAL_IMAGES)


def _size(value: Any) -> tuple[int, int] | None:
    if value in (None, "auto"):
        return None
    found = _SIZE.fullmatch(value) if isinstance(value, str) else None
    if not found:
        raise InputError("a size like 1024x1024 is expected, or auto")
    return int(found[1]), int(found[2])


def _answer_of(finished: Finished, described: Fields) -> bytes:
    data = []
    while finished.images:
        image = finished.images.pop(0)
        data.append({"b64_json": base64.b64encode(image.image).decode(), "seed": image.seed})
    ours = {"warnings": finished.warnings}
    return json.dumps({"created": int(time.time()), "data": data, **described, **ours}).encode()


async def _send(kind: str, what: str, image: bytes, more: Fields, call: Call) -> None:
    def event() -> bytes:
        content = base64.b64encode(image).decode()
        name = f"{kind}.{what}"
        fields = {"type": name, "b64_json": content, "created_at": int(time.time()), **more}
        return server_sent_event(name, fields)

    await call.write(await asyncio.to_thread(event))
