"""Converts between messages on the wire (proto/anydoor/v1/compositor.proto) and the runtime's types.

Only what is set travels: an open field stays open, and is filled in where the model is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from runtime.errors import InputError, collecting_warnings, in_field
from runtime.imaging.boxes import Box
from runtime.imaging.pictures import WRITABLE_FORMATS, load_picture
from runtime.imaging.sources import PictureLike
from runtime.request import Blank, Placement, Request, Sampling, Where
from runtime.result import Composite
from runtime.rpc import compositor_pb2 as pb
from runtime.server.events import Event, Preview, Queued, StepDone
from runtime.server.placement_wire import (
    checked_prompts,
    message_from_where,
    negative_prompt_of,
    placement_from_message,
    placement_message,
)
from runtime.server.wire_values import (
    EDGES,
    FORMATS,
    MODES,
    QUALITIES,
    SAMPLERS,
    file_of,
    level_of,
    name_of,
    number_of,
    unsigned_of,
)

# ---- requests


Message = pb.CompositeRequest | pb.DrawRequest
"""Requests for pictures."""


def request_from_message(message: Message) -> tuple[Request, str]:
    """Returns the request, and the name of the file format for its results.

    Raises:
        InputError: the value of an enum is unknown. All else is checked later, by `Compositor.accept`.
    """
    request = Request(
        **_content(message),
        seed=message.seed if message.HasField("seed") else None,
        sampling=sampling_from_message(message.sampling),
        num_images=message.num_images if message.HasField("num_images") else 1,
    )
    return request, file_format_of(message.output_format)


def file_format_of(number: int) -> str:
    """Returns the name of the file format for results.

    Raises:
        InputError: it is unknown, or this server does not write it.
    """
    file_format = name_of(number, FORMATS, "output_format", "image format") or "PNG"
    if file_format not in WRITABLE_FORMATS.values():
        with in_field("output_format"):
            raise InputError(f"this server does not write {file_format}")
    return file_format


def _content(message: Message) -> dict[str, Any]:
    """Reads scene and placements."""
    if isinstance(message, pb.DrawRequest):
        size = {name: getattr(message, name) for name in ("width", "height") if message.HasField(name)}
        return {
            "scene": Blank(**size),
            "placements": [Placement(prompt=message.prompt, **negative_prompt_of(message))],
        }
    placements = []
    for index, placement in enumerate(message.placements):
        with in_field(f"placements[{index}]"):
            placements.append(placement_from_message(placement))
    return {"scene": message.scene, "placements": placements}


def sampling_from_message(message: pb.Sampling) -> Sampling:
    """Returns the sampling in a message; likewise."""
    given: dict[str, Any] = {field.name: value for field, value in message.ListFields()}
    with in_field("sampling"):
        given["quality"] = name_of(message.quality, QUALITIES, "quality", "quality")
        given["sampler"] = name_of(message.sampler, SAMPLERS, "sampler", "sampler")
    if "guidance_interval" in given:
        given["guidance_interval"] = (message.guidance_interval.first, message.guidance_interval.last)
    return Sampling(**given)


def message_from_request(request: Request, file_format: str = "PNG") -> Message:
    """Returns the message for a request.

    Raises:
        InputError: a file cannot be read, a name, a number or a prompt cannot be sent, or the request has
            initial noise or exact timesteps, which a server does not take.
    """
    if request.initial_noise is not None or request.sampling.timesteps is not None:
        raise InputError("a server does not take initial noise or timesteps: run without a server")
    if request.scene_size is not None:
        with in_field("scene_size"):
            raise InputError("a server does not take the size that a scene must have: check it before")
    try:
        common = {
            "sampling": sampling_message(request.sampling),
            "seed": unsigned_of(request.seed, "seed", bits=64),
            "num_images": unsigned_of(request.num_images, "num_images"),
            "output_format": number_of(file_format, FORMATS, "output_format", "image format"),
        }
        if isinstance(request.scene, Blank):
            return pb.DrawRequest(**_drawing_fields(request, request.scene), **common)
        with in_field("scene"):
            scene = file_of(request.scene, "the scene")
        placements = []
        for index, placement in enumerate(request.placements):
            with in_field(f"placements[{index}]"):
                placements.append(placement_message(placement))
        return pb.CompositeRequest(scene=scene, placements=placements, **common)
    except (ValueError, TypeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"the request has a number that cannot be sent: {error}") from error


def _drawing_fields(request: Request, blank: Blank) -> dict[str, Any]:
    first = next(iter(request.placements), Placement())
    plain = Placement(prompt=first.prompt, negative_prompt=first.negative_prompt)
    if len(request.placements) != 1 or vars(first) != vars(plain):
        raise InputError("without a scene, a server draws a single prompt: give a scene")
    return {**checked_prompts(first), "width": blank.width, "height": blank.height}


def sampling_message(sampling: Sampling) -> pb.Sampling:
    """Returns the message for what is said of sampling; likewise."""
    interval = None
    if sampling.guidance_interval is not None:
        with in_field("sampling.guidance_interval"):
            if not isinstance(sampling.guidance_interval, Sequence) or len(sampling.guidance_interval) != 2:
                raise InputError("a lower and a higher timestep are expected")
        first, last = sampling.guidance_interval
        interval = pb.TimestepInterval(first=first, last=last)
    with in_field("sampling"):
        return pb.Sampling(
            steps=unsigned_of(sampling.steps, "steps"),
            guidance_scale=sampling.guidance_scale,
            control_scale=sampling.control_scale,
            eta=sampling.eta,
            quality=number_of(sampling.quality, QUALITIES, "quality", "quality"),
            sampler=number_of(sampling.sampler, SAMPLERS, "sampler", "sampler"),
            guidance_interval=interval,
            map_steps=unsigned_of(sampling.map_steps, "map_steps"),
        )


def segment_request(picture: PictureLike, where: Where) -> pb.SegmentRequest:
    """Returns the message that asks where an object is.

    Raises:
        InputError: the picture cannot be read, or something cannot be sent.
    """
    with in_field("where"):
        place = message_from_where(where)
    with in_field("picture"):
        return pb.SegmentRequest(picture=file_of(picture, "the picture"), where=place)


# ---- answers


def defaults_message(defaults: Mapping[str, Any]) -> pb.ModelDefaults:
    """Returns the message for a model's defaults.

    Args:
        defaults: parameter -> value, as `Compositor.defaults`.
    """
    names = set(pb.Sampling.DESCRIPTOR.fields_by_name) - {"quality"}
    return pb.ModelDefaults(
        sampling=sampling_message(Sampling(**{name: defaults.get(name) for name in names})),
        mode=number_of(defaults.get("mode"), MODES, "mode", "mode"),
        mask_level=level_of(defaults.get("mask_level")),
        edge=number_of(defaults.get("edge"), EDGES, "edge", "edge"),
        refine=defaults.get("refine"),
        strength=defaults.get("strength"),
        ratios=pb.Ratios(
            **{name: defaults.get(f"{name}_ratio") for name in pb.Ratios.DESCRIPTOR.fields_by_name}
        ),
    )


def event_message(event: Event, request_id: str) -> pb.CompositeStreamResponse:
    """Returns the message for an event; of `Finished` see `runtime.server.answers`, and `Failed` becomes a
    status."""
    message = pb.CompositeStreamResponse(request_id=request_id)
    if isinstance(event, Queued):
        message.queued.position = event.position
    elif isinstance(event, StepDone):
        message.step_done.done, message.step_done.total = event.done, event.total
    elif isinstance(event, Preview):
        message.preview.image_index, message.preview.image = event.image_index, event.image
    return message


def composites_from_message(message: pb.CompositeResponse) -> list[Composite]:
    """Returns the finished pictures, decoded."""
    with (
        collecting_warnings()
    ):  # of the pictures that the server made; those of the request are in the message
        pictures = [load_picture(image.image, "the server's picture") for image in message.images]
    return [
        Composite(
            image=picture.pixels,
            seed=image.seed,
            regions=tuple(Box(box.x0, box.y0, box.x1, box.y1) for box in image.regions),
            seconds=dict(message.seconds),
            metadata=picture.metadata,
            warnings=tuple(message.warnings),
            filler=message.filler,
        )
        for picture, image in zip(pictures, message.images)
    ]
