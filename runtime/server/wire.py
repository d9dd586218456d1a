"""Between messages on the wire (proto/anydoor/v1/compositor.proto) and the runtime's own types.

Only what is set travels: an open field stays open, and is filled in where the model is.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from PIL import Image

from runtime.errors import InputError, in_field
from runtime.imaging.clicks import Click, check_clicks
from runtime.imaging.mask_levels import check_mask_level
from runtime.imaging.pictures import WRITABLE_FORMATS
from runtime.imaging.sources import PictureLike, read_source
from runtime.imaging.target import whole_box
from runtime.request import (
    AUTOMATIC,
    Blank,
    Placement,
    Request,
    Sampling,
    Where,
    check_prompt,
    is_automatic,
)
from runtime.rpc import compositor_pb2 as pb


def _numbers(enum: Any, prefix: str) -> dict[str, Any]:
    """Name -> number on the wire, of every value of an enum but UNSPECIFIED."""
    return {name.removeprefix(prefix): number for name, number in enum.items() if number}


def _lower(numbers: Mapping[str, Any]) -> dict[str, Any]:
    return {name.lower(): number for name, number in numbers.items()}


MODES = _lower(_numbers(pb.PlacementMode, "PLACEMENT_MODE_"))
EDGES = _lower(_numbers(pb.Edge, "EDGE_"))
LEVELS = _lower(_numbers(pb.MaskLevel, "MASK_LEVEL_"))
SAMPLERS = _lower(_numbers(pb.Sampler, "SAMPLER_"))
QUALITIES = _lower(_numbers(pb.Quality, "QUALITY_"))
CONDITIONS = _lower(_numbers(pb.Condition, "CONDITION_"))
FORMATS = _numbers(pb.ImageFormat, "IMAGE_FORMAT_")

_TIFF_ONLY = ("F", "CMYK", "LAB", "YCbCr")
_NEITHER_PNG_NOR_TIFF = ("HSV", "RGBa", "La", "PA")
"""Modes of Pillow images that no file format on the wire has."""


# ---- requests


Message = pb.CompositeRequest | pb.DrawRequest
"""What asks for pictures."""


def request_from_message(message: Message) -> tuple[Request, str]:
    """The request, and the name of the file format for its results.

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
    """The name of the file format for results.

    Raises:
        InputError: it is unknown, or this server does not write it.
    """
    file_format = _name_of(number, FORMATS, "output_format", "image format") or "PNG"
    if file_format not in WRITABLE_FORMATS.values():
        with in_field("output_format"):
            raise InputError(f"this server does not write {file_format}")
    return file_format


def _content(message: Message) -> dict[str, Any]:
    """Scene and placements."""
    if isinstance(message, pb.DrawRequest):
        size = {name: getattr(message, name) for name in ("width", "height") if message.HasField(name)}
        return {
            "scene": Blank(**size),
            "placements": [Placement(prompt=message.prompt, **_negative(message))],
        }
    placements = []
    for index, placement in enumerate(message.placements):
        with in_field(f"placements[{index}]"):
            placements.append(placement_from_message(placement))
    return {"scene": message.scene, "placements": placements}


def _negative(message: pb.Placement | pb.DrawRequest) -> dict[str, Any]:
    return {"negative_prompt": message.negative_prompt} if message.HasField("negative_prompt") else {}


def placement_from_message(message: pb.Placement) -> Placement:
    """The placement in a message; raises for unknown values of enums."""
    target = message.WhichOneof("target")
    box = message.box
    ratios = {f"{field.name}_ratio": value for field, value in message.ratios.ListFields()}
    clicks = message.reference_clicks
    if message.automatic_mask and message.reference_mask:
        with in_field("automatic_mask"):
            raise InputError("a reference mask is given: leave out automatic_mask")
    return Placement(
        reference=message.reference or None,
        reference_mask=message.reference_mask or (AUTOMATIC if message.automatic_mask else None),
        reference_clicks=clicks_from_message(clicks) if clicks else None,
        prompt=message.prompt if message.HasField("prompt") else None,
        **_negative(message),
        box=(box.x0, box.y0, box.x1, box.y1) if target == "box" else None,
        mask=message.mask if target == "mask" else None,
        mode=_name_of(message.mode, MODES, "mode", "placement mode"),
        mask_level=_name_of(message.mask_level, LEVELS, "mask_level", "mask level"),
        edge=_name_of(message.edge, EDGES, "edge", "edge"),
        keep_specks=message.keep_specks,
        **ratios,
    )


def clicks_from_message(points: Iterable[pb.Point]) -> list[Click]:
    """Clicks from points."""
    return [Click(point.x, point.y, not point.outside) for point in points]


def where_from_message(message: pb.Where) -> Where:
    """Where an object is, as a message says it."""
    box, what = message.box, message.WhichOneof("what")
    return Where(
        box=(box.x0, box.y0, box.x1, box.y1) if what == "box" else None,
        mask=message.mask if what == "mask" else None,
        clicks=clicks_from_message(message.clicks.points) if what == "clicks" else None,
    )


def message_from_where(where: Where) -> pb.Where:
    """The message for where an object is.

    Raises:
        InputError: several things say it, or one cannot be sent.
    """
    if sum(given is not None for given in vars(where).values()) > 1:
        raise InputError("an object is in a box, in a mask, or where clicks are: give one of them")
    if where.box is not None:
        with in_field("box"):
            return pb.Where(box=pb.Box(**whole_box(where.box)._asdict()))
    if where.clicks is not None:
        with in_field("clicks"):
            return pb.Where(clicks=pb.Clicks(points=points_of(where.clicks)))
    return pb.Where(mask=None if where.mask is None else file_of(where.mask, "the mask"))


def points_of(clicks: Sequence[Sequence[int]]) -> list[pb.Point]:
    """Points from clicks.

    Raises:
        InputError: one is no click, or cannot be sent.
    """
    return [pb.Point(x=click.x, y=click.y, outside=not click.inside) for click in check_clicks(clicks)]


def sampling_from_message(message: pb.Sampling) -> Sampling:
    """The sampling in a message; likewise."""
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


def message_from_request(request: Request, file_format: str = "PNG") -> Message:
    """The message for a request.

    Raises:
        InputError: a file cannot be read, a name, a number or a prompt cannot be sent, or the request has
            initial noise or exact timesteps, which a server does not take.
    """
    if request.initial_noise is not None or request.sampling.timesteps is not None:
        raise InputError("a server takes no initial noise and no exact timesteps: run without a server")
    try:
        common = {
            "sampling": sampling_message(request.sampling),
            "seed": request.seed,
            "num_images": request.num_images,
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
        raise InputError("without a scene a server draws one prompt and nothing else: give a scene")
    return {**_prompts(first), "width": blank.width, "height": blank.height}


def _prompts(placement: Placement) -> dict[str, str | None]:
    prompts = {"prompt": placement.prompt, "negative_prompt": placement.negative_prompt}
    for name, prompt in prompts.items():
        with in_field(name):
            if prompt is not None:
                check_prompt(prompt)
    return prompts


def placement_message(placement: Placement) -> pb.Placement:
    """The message for a placement.

    Raises:
        InputError: something about it cannot be sent.
    """
    if placement.box is not None and placement.mask is not None:
        raise InputError("a placement needs either a box or a mask, and not both")
    mask, reference, reference_mask = placement.mask, placement.reference, placement.reference_mask
    box = None
    if placement.box is not None:
        with in_field("box"):
            box = pb.Box(**whole_box(placement.box)._asdict())
    automatic, points = is_automatic(reference_mask), None
    if placement.reference_clicks is not None:
        with in_field("reference_clicks"):
            points = points_of(placement.reference_clicks)
    return pb.Placement(
        reference=None if reference is None else file_of(reference, "the reference"),
        reference_mask=None
        if reference_mask is None or automatic
        else file_of(reference_mask, "the reference mask"),
        automatic_mask=automatic,
        reference_clicks=points,
        **_prompts(placement),
        box=box,
        mask=None if mask is None else file_of(mask, "the scene mask"),
        mode=number_of(placement.mode, MODES, "mode", "mode"),
        mask_level=_level(placement.mask_level),
        edge=number_of(placement.edge, EDGES, "edge", "edge"),
        ratios=pb.Ratios(
            reference=placement.reference_ratio, box=placement.box_ratio, crop=placement.crop_ratio
        ),
        keep_specks=placement.keep_specks,
    )


def sampling_message(sampling: Sampling) -> pb.Sampling:
    """The message for what is said of sampling; likewise."""
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
            quality=number_of(sampling.quality, QUALITIES, "quality", "quality"),
            sampler=number_of(sampling.sampler, SAMPLERS, "sampler", "sampler"),
            guidance_interval=interval,
            map_steps=sampling.map_steps,
        )


def number_of(name: str | None, numbers: Mapping[str, int], field: str, what: str) -> Any:
    """The number of an enum's value; None, which leaves the field unset, if it is open."""
    if name is None:
        return None
    with in_field(field):
        if name not in numbers:
            raise InputError(f"there is no {what} '{name}': choose one of {', '.join(numbers)}")
    return numbers[name]


def _level(level: str | int | None) -> Any:
    """The number of a mask level on the wire."""
    if level is None:
        return None
    with in_field("mask_level"):
        return LEVELS[check_mask_level(level)]


def segment_request(picture: PictureLike, where: Where) -> pb.SegmentRequest:
    """The message that asks where an object is.

    Raises:
        InputError: the picture cannot be read, or something cannot be sent.
    """
    with in_field("where"):
        place = message_from_where(where)
    with in_field("picture"):
        return pb.SegmentRequest(picture=file_of(picture, "the picture"), where=place)


def file_of(picture: PictureLike, name: str) -> bytes:
    """The bytes of a picture's file; pictures in memory become a PNG, or a TIFF if a PNG cannot hold them."""
    found = read_source(picture, name)
    if isinstance(found, bytes):
        return found
    buffer = io.BytesIO()
    try:
        if found.mode in _NEITHER_PNG_NOR_TIFF:
            found = found.convert("RGBA" if found.mode.endswith("a") else "RGB")
        _save(found, buffer)
    except (OSError, ValueError) as error:
        raise InputError(f"{name} is a Pillow image that is closed, damaged or cut short") from error
    return buffer.getvalue()


def _save(image: Image.Image, buffer: io.BytesIO) -> None:
    metadata = {key: image.info[key] for key in ("icc_profile", "exif", "dpi") if key in image.info}
    image.save(buffer, "TIFF" if image.mode in _TIFF_ONLY else "PNG", **metadata)


# ---- answers


def defaults_message(defaults: Mapping[str, Any]) -> pb.ModelDefaults:
    """The message for a model's defaults.

    Args:
        defaults: parameter -> value, as `Compositor.defaults`.
    """
    names = set(pb.Sampling.DESCRIPTOR.fields_by_name) - {"quality"}
    return pb.ModelDefaults(
        sampling=sampling_message(Sampling(**{name: defaults.get(name) for name in names})),
        mode=number_of(defaults.get("mode"), MODES, "mode", "mode"),
        mask_level=_level(defaults.get("mask_level")),
        edge=number_of(defaults.get("edge"), EDGES, "edge", "edge"),
        ratios=pb.Ratios(
            **{name: defaults.get(f"{name}_ratio") for name in pb.Ratios.DESCRIPTOR.fields_by_name}
        ),
    )
