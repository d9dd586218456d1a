"""Between messages on the wire (proto/anydoor/v1/compositor.proto) and the runtime's own types.

Only what is set travels: an open field stays open, and is filled in where the model is.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from runtime.errors import InputError, in_field
from runtime.imaging.boxes import Box
from runtime.imaging.pictures import PictureLike, load_picture
from runtime.request import Placement, Request, Sampling
from runtime.result import Composite
from runtime.rpc import compositor_pb2 as pb
from runtime.server.events import Event, Preview, Queued, StepDone


def _numbers(enum: Any, prefix: str) -> dict[str, int]:
    """Name -> number on the wire, of every value of an enum but UNSPECIFIED."""
    return {name.removeprefix(prefix): number for name, number in enum.items() if number}


def _lower(numbers: Mapping[str, int]) -> dict[str, int]:
    return {name.lower(): number for name, number in numbers.items()}


MODES = _lower(_numbers(pb.PlacementMode, "PLACEMENT_MODE_"))
SAMPLERS = _lower(_numbers(pb.Sampler, "SAMPLER_"))
QUALITIES = _lower(_numbers(pb.Quality, "QUALITY_"))
FORMATS = _numbers(pb.ImageFormat, "IMAGE_FORMAT_")


# ---- requests


def request_from_message(message: pb.CompositeRequest) -> tuple[Request, str]:
    """The request, and the name of the file format for its results.

    Raises:
        InputError: the value of an enum is unknown. All else is checked later, by `Compositor.accept`.
    """
    placements = []
    for index, placement in enumerate(message.placements):
        with in_field(f"placements[{index}]"):
            placements.append(_placement(placement))
    request = Request(
        scene=message.scene,
        placements=placements,
        seed=message.seed if message.HasField("seed") else None,
        sampling=_sampling(message.sampling),
        num_images=message.num_images if message.HasField("num_images") else 1,
    )
    return request, _name_of(message.output_format, FORMATS, "output_format", "image format") or "PNG"


def _placement(message: pb.Placement) -> Placement:
    target = message.WhichOneof("target")
    box = message.box
    ratios = {f"{field.name}_ratio": value for field, value in message.ratios.ListFields()}
    return Placement(
        reference=message.reference,
        reference_mask=message.reference_mask or None,
        box=(box.x0, box.y0, box.x1, box.y1) if target == "box" else None,
        mask=message.mask if target == "mask" else None,
        mode=_name_of(message.mode, MODES, "mode", "placement mode"),
        **ratios,
    )


def _sampling(message: pb.Sampling) -> Sampling:
    given: dict[str, Any] = {field.name: value for field, value in message.ListFields()}
    with in_field("sampling"):
        given["quality"] = _name_of(message.quality, QUALITIES, "quality", "quality")
        given["sampler"] = _name_of(message.sampler, SAMPLERS, "sampler", "sampler")
    if "guidance_interval" in given:
        given["guidance_interval"] = (message.guidance_interval.first, message.guidance_interval.last)
    return Sampling(**given)


def _name_of(number: int, numbers: Mapping[str, int], field: str, what: str) -> str | None:
    """The name of an enum's value; None if it is unspecified."""
    if not number:
        return None
    for name, known in numbers.items():
        if known == number:
            return name
    with in_field(field):
        raise InputError(f"there is no {what} {number}")


def message_from_request(request: Request, file_format: str = "PNG") -> pb.CompositeRequest:
    """The message for a request.

    Raises:
        InputError: a file cannot be read, a name or a number cannot be sent, or the request has initial noise
            or exact timesteps, which a server does not take.
    """
    if request.initial_noise is not None or request.sampling.timesteps is not None:
        raise InputError("a server takes no initial noise and no exact timesteps: run without a server")
    try:
        with in_field("scene"):
            scene = _file(request.scene, "the scene")
        placements = []
        for index, placement in enumerate(request.placements):
            with in_field(f"placements[{index}]"):
                placements.append(_placement_message(placement))
        return pb.CompositeRequest(
            scene=scene,
            placements=placements,
            sampling=_sampling_message(request.sampling),
            seed=request.seed,
            num_images=request.num_images,
            output_format=_number_of(file_format, FORMATS, "output_format", "image format"),
        )
    except (ValueError, TypeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"the request has a number that cannot be sent: {error}") from error


def _placement_message(placement: Placement) -> pb.Placement:
    if placement.box is not None and placement.mask is not None:
        raise InputError("a placement needs either a box or a mask, and not both")
    mask, reference_mask = placement.mask, placement.reference_mask
    return pb.Placement(
        reference=_file(placement.reference, "the reference"),
        reference_mask=None if reference_mask is None else _file(reference_mask, "the reference mask"),
        box=None if placement.box is None else pb.Box(**Box(*placement.box)._asdict()),
        mask=None if mask is None else _file(mask, "the scene mask"),
        mode=_number_of(placement.mode, MODES, "mode", "mode"),
        ratios=pb.Ratios(
            reference=placement.reference_ratio, box=placement.box_ratio, crop=placement.crop_ratio
        ),
    )


def _sampling_message(sampling: Sampling) -> pb.Sampling:
    interval = None
    if sampling.guidance_interval is not None:
        first, last = sampling.guidance_interval
        interval = pb.TimestepInterval(first=first, last=last)
    with in_field("sampling"):
        return pb.Sampling(
            steps=sampling.steps,
            guidance_scale=sampling.guidance_scale,
            control_scale=sampling.control_scale,
            eta=sampling.eta,
            quality=_number_of(sampling.quality, QUALITIES, "quality", "quality"),
            sampler=_number_of(sampling.sampler, SAMPLERS, "sampler", "sampler"),
            guidance_interval=interval,
            map_steps=sampling.map_steps,
        )


def _number_of(name: str | None, numbers: Mapping[str, int], field: str, what: str) -> Any:
    """The number of an enum's value; None, which leaves the field unset, if it is open."""
    if name is None:
        return None
    with in_field(field):
        if name not in numbers:
            raise InputError(f"there is no {what} '{name}': choose one of {', '.join(numbers)}")
    return numbers[name]


def _file(picture: PictureLike | NDArray[np.bool_], name: str) -> bytes:
    """The bytes of a picture's file; pictures in memory become a PNG."""
    if isinstance(picture, bytes):
        return picture
    if isinstance(picture, str | Path):
        try:
            return Path(picture).read_bytes()
        except OSError as error:
            raise InputError(f"cannot read {name} '{picture}': {error.strerror}") from error
    if isinstance(picture, np.ndarray):
        array: NDArray[Any] = picture.astype(np.uint8) if picture.dtype == np.bool_ else picture
        load_picture(array, name)  # refuses arrays that are not pictures
        picture = Image.fromarray(array)
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


# ---- answers


def defaults_message(defaults: Mapping[str, Any]) -> pb.ModelDefaults:
    """The message for a model's defaults.

    Args:
        defaults: parameter -> value, as `Compositor.defaults`.
    """
    names = set(pb.Sampling.DESCRIPTOR.fields_by_name) - {"quality"}
    return pb.ModelDefaults(
        sampling=_sampling_message(Sampling(**{name: defaults.get(name) for name in names})),
        mode=_number_of(defaults.get("mode"), MODES, "mode", "mode"),
        ratios=pb.Ratios(
            **{name: defaults.get(f"{name}_ratio") for name in pb.Ratios.DESCRIPTOR.fields_by_name}
        ),
    )


def event_message(event: Event, request_id: str) -> pb.CompositeStreamResponse:
    """The message for an event; of `Finished` see `runtime.server.answers`, and `Failed` becomes a status."""
    message = pb.CompositeStreamResponse(request_id=request_id)
    if isinstance(event, Queued):
        message.queued.position = event.position
    elif isinstance(event, StepDone):
        message.step_done.done, message.step_done.total = event.done, event.total
    elif isinstance(event, Preview):
        message.preview.image_index, message.preview.image = event.image_index, event.image
    return message


def composites_from_message(message: pb.CompositeResponse) -> list[Composite]:
    """The finished pictures, decoded."""
    return [
        Composite(
            image=load_picture(image.image, "the server's picture").rgb,
            seed=image.seed,
            regions=tuple(Box(box.x0, box.y0, box.x1, box.y1) for box in image.regions),
            seconds=dict(message.seconds),
        )
        for image in message.images
    ]
