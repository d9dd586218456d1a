"""Between messages on the wire (proto/anydoor/v1/compositor.proto) and the runtime's own types."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from runtime.diffusion.presets import DEFAULT, preset
from runtime.errors import InputError, in_field
from runtime.imaging.boxes import Box
from runtime.imaging.collage import Ratios
from runtime.imaging.pictures import PictureLike, load_picture
from runtime.job import Composite
from runtime.request import Placement, Request, Sampling
from runtime.rpc import compositor_pb2 as pb
from runtime.server.ticket import Event, Finished, FinishedImage, Preview, Queued, StepDone

MODES = {
    "crop": pb.PLACEMENT_MODE_CROP,
    "shape": pb.PLACEMENT_MODE_SHAPE,
    "keep_background": pb.PLACEMENT_MODE_KEEP_BACKGROUND,
}
SAMPLERS = {"ddim": pb.SAMPLER_DDIM, "dpm_solver_2m": pb.SAMPLER_DPM_SOLVER_2M}
QUALITIES = {
    "exact": pb.QUALITY_EXACT,
    "balanced": pb.QUALITY_BALANCED,
    "fast": pb.QUALITY_FAST,
}
FORMATS = {"PNG": pb.IMAGE_FORMAT_PNG, "JPEG": pb.IMAGE_FORMAT_JPEG, "WEBP": pb.IMAGE_FORMAT_WEBP}

_MODE_NAMES = {number: name for name, number in MODES.items()} | {pb.PLACEMENT_MODE_UNSPECIFIED: "crop"}
_SAMPLER_NAMES = {number: name for name, number in SAMPLERS.items()}
_QUALITY_NAMES = {number: name for name, number in QUALITIES.items()} | {pb.QUALITY_UNSPECIFIED: DEFAULT}
_FORMAT_NAMES = {number: name for name, number in FORMATS.items()} | {pb.IMAGE_FORMAT_UNSPECIFIED: "PNG"}


# ---- requests


def request_from_message(message: pb.CompositeRequest) -> tuple[Request, str]:
    """The request, and the name of the file format for its results.

    Raises:
        InputError: the value of an enum is unknown, or a ratio is out of range. All else is checked later, by
            `Compositor.accept`.
    """
    with in_field("output_format"):
        if message.output_format not in _FORMAT_NAMES:
            raise InputError(f"there is no image format {message.output_format}")
    placements = []
    for index, placement in enumerate(message.placements):
        with in_field(f"placements[{index}]"):
            placements.append(_placement(placement))
    request = Request(
        scene=message.scene,
        placements=placements,
        seed=message.seed if message.HasField("seed") else None,
        sampling=sampling_from_message(message.sampling),
        num_images=message.num_images if message.HasField("num_images") else 1,
    )
    return request, _FORMAT_NAMES[message.output_format]


def _placement(message: pb.Placement) -> Placement:
    with in_field("mode"):
        if message.mode not in _MODE_NAMES:
            raise InputError(f"there is no placement mode {message.mode}")
    target = message.WhichOneof("target")
    box = message.box
    return Placement(
        reference=message.reference,
        reference_mask=message.reference_mask or None,
        box=(box.x0, box.y0, box.x1, box.y1) if target == "box" else None,
        mask=message.mask if target == "mask" else None,
        mode=_MODE_NAMES[message.mode],
        ratios=_ratios(message.ratios),
    )


def _ratios(message: pb.Ratios) -> Ratios:
    given = {field.name: value for field, value in message.ListFields()}
    with in_field("ratios"):
        return Ratios(**given)


def sampling_from_message(message: pb.Sampling) -> Sampling:
    """The parameters of the message's quality, and in their place those that are set.

    Raises:
        InputError: the value of an enum is unknown.
    """
    given = {field.name: value for field, value in message.ListFields()}
    quality = given.pop("quality", pb.QUALITY_UNSPECIFIED)
    with in_field("sampling"):
        with in_field("quality"):
            if quality not in _QUALITY_NAMES:
                raise InputError(f"there is no quality {quality}")
        if "sampler" in given:
            with in_field("sampler"):
                if message.sampler not in _SAMPLER_NAMES:
                    raise InputError(f"there is no sampler {message.sampler}")
            given["sampler"] = _SAMPLER_NAMES[message.sampler]
    if "guidance_interval" in given:
        given["guidance_interval"] = (message.guidance_interval.first, message.guidance_interval.last)
    return preset(_QUALITY_NAMES[quality], **given)


def message_from_sampling(sampling: Sampling) -> pb.Sampling:
    """The message for sampling parameters, every one of them set.

    Raises:
        InputError: there is no such sampler.
        ValueError, TypeError: a number does not fit the wire.
    """
    if sampling.sampler not in SAMPLERS:
        raise InputError(f"there is no sampler '{sampling.sampler}': choose one of {', '.join(SAMPLERS)}")
    first, last = sampling.guidance_interval
    return pb.Sampling(
        steps=sampling.steps,
        guidance_scale=sampling.guidance_scale,
        control_scale=sampling.control_scale,
        eta=sampling.eta,
        quality=pb.QUALITY_EXACT,
        sampler=SAMPLERS[sampling.sampler],
        guidance_interval=pb.TimestepInterval(first=first, last=last),
        map_steps=sampling.map_steps,
    )


def message_from_request(request: Request, file_format: str = "PNG") -> pb.CompositeRequest:
    """The message for a request.

    Raises:
        InputError: a file cannot be read, a number does not fit the wire, or the request has initial noise
            or exact timesteps, which a server does not take.
    """
    if request.initial_noise is not None or request.sampling.timesteps is not None:
        raise InputError("a server takes no initial noise and no exact timesteps: run without a server")
    try:
        return pb.CompositeRequest(
            scene=_file(request.scene, "the scene"),
            placements=[_placement_message(placement) for placement in request.placements],
            sampling=message_from_sampling(request.sampling),
            seed=request.seed,
            num_images=request.num_images,
            output_format=FORMATS[file_format],
        )
    except (ValueError, TypeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"the request has a number that cannot be sent: {error}") from error


def _placement_message(placement: Placement) -> pb.Placement:
    if placement.mode not in MODES:
        raise InputError(f"there is no mode '{placement.mode}': choose one of {', '.join(MODES)}")
    if placement.box is not None and placement.mask is not None:
        raise InputError("a placement needs either a box or a mask, and not both")
    mask, reference_mask, ratios = placement.mask, placement.reference_mask, placement.ratios
    return pb.Placement(
        reference=_file(placement.reference, "the reference"),
        reference_mask=None if reference_mask is None else _file(reference_mask, "the reference mask"),
        box=None if placement.box is None else box_message(Box(*placement.box)),
        mask=None if mask is None else _file(mask, "the scene mask"),
        mode=MODES[placement.mode],
        ratios=pb.Ratios(reference=ratios.reference, box=ratios.box, crop=ratios.crop),
    )


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
        load_picture(array, name)  # refuses what is no picture
        picture = Image.fromarray(array)
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


# ---- results


def box_message(box: Box) -> pb.Box:
    """The message for a box."""
    return pb.Box(x0=box.x0, y0=box.y0, x1=box.x1, y1=box.y1)


def response_message(finished: Finished, request_id: str) -> pb.CompositeResponse:
    """The message for finished pictures."""
    images = [_image_message(image) for image in finished.images]
    return pb.CompositeResponse(images=images, request_id=request_id, seconds=finished.seconds)


def _image_message(image: FinishedImage) -> pb.CompositeImage:
    regions = [box_message(region) for region in image.regions]
    return pb.CompositeImage(image=image.image, seed=image.seed, regions=regions)


def event_message(event: Event, request_id: str) -> pb.CompositeStreamResponse:
    """The message for a piece of news; `Failed` has none, it becomes a status."""
    message = pb.CompositeStreamResponse(request_id=request_id)
    if isinstance(event, Queued):
        message.queued.position = event.position
    elif isinstance(event, StepDone):
        message.step_done.done, message.step_done.total = event.done, event.total
    elif isinstance(event, Preview):
        message.preview.image_index, message.preview.image = event.image_index, event.image
    elif isinstance(event, Finished):
        message.result.CopyFrom(response_message(event, request_id))
    return message


def composites_from_message(message: pb.CompositeResponse) -> list[Composite]:
    """The finished pictures, decoded."""
    seconds = dict(message.seconds)
    return [
        Composite(
            image=load_picture(image.image, "the server's picture").rgb,
            seed=image.seed,
            regions=_boxes(image.regions),
            seconds=seconds,
        )
        for image in message.images
    ]


def _boxes(messages: Sequence[pb.Box]) -> tuple[Box, ...]:
    return tuple(Box(box.x0, box.y0, box.x1, box.y1) for box in messages)
