"""Converts values that several messages share: enums by name, and files of pictures."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

from PIL import Image

from runtime.errors import InputError, in_field
from runtime.imaging.mask_levels import check_mask_level
from runtime.imaging.sources import PictureLike, read_source
from runtime.imaging.target import is_integer
from runtime.rpc import compositor_pb2 as pb


def _numbers(enum: Any, prefix: str) -> dict[str, Any]:
    """Returns name -> number on the wire, of every value of an enum but UNSPECIFIED."""
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

_TIFF_ONLY = ("F", "I", "CMYK", "LAB", "YCbCr")
_NEITHER_PNG_NOR_TIFF = {"HSV": "RGB", "RGBX": "RGB", "RGBa": "RGBA", "La": "LA", "PA": "RGBA"}
"""Modes of Pillow images that no file format on the wire has -> the mode that is sent."""


def name_of(number: int, numbers: Mapping[str, int], field: str, what: str) -> str | None:
    """Returns the name of an enum's value; None if it is unspecified."""
    if not number:
        return None
    for name, known in numbers.items():
        if known == number:
            return name
    with in_field(field):
        raise InputError(f"there is no {what} {number}")


def number_of(name: str | None, numbers: Mapping[str, int], field: str, what: str) -> Any:
    """Returns the number of an enum's value; None, which leaves the field unset, if it is open."""
    if name is None:
        return None
    with in_field(field):
        if name not in numbers:
            raise InputError(f"there is no {what} '{name}': choose one of {', '.join(numbers)}")
    return numbers[name]


def unsigned_of(number: int | None, field: str, bits: int = 32) -> int | None:
    """Returns a whole number that a field of so many bits can hold; None, which leaves the field unset."""
    if number is not None and not (is_integer(number) and 0 <= number < 2**bits):
        with in_field(field):
            raise InputError(
                f"{field} is {number!r}, which cannot be sent: a whole number from 0 to {2**bits - 1} is "
                "expected"
            )
    return number


def level_of(level: str | int | None) -> Any:
    """Returns the number of a mask level on the wire."""
    if level is None:
        return None
    with in_field("mask_level"):
        return LEVELS[check_mask_level(level)]


def file_of(picture: PictureLike, name: str) -> bytes:
    """Returns the bytes of a picture's file; pictures in memory become a PNG, or a TIFF if a PNG cannot hold
    them."""
    found = read_source(picture, name)
    if isinstance(found, bytes):
        return found
    buffer = io.BytesIO()
    try:
        if found.mode in _NEITHER_PNG_NOR_TIFF:
            found = found.convert(_NEITHER_PNG_NOR_TIFF[found.mode])
        _save(found, buffer)
    except (OSError, ValueError) as error:
        raise InputError(f"{name} is a Pillow image that is closed, damaged or cut short") from error
    return buffer.getvalue()


def _save(image: Image.Image, buffer: io.BytesIO) -> None:
    metadata = {key: image.info[key] for key in ("icc_profile", "exif", "dpi") if key in image.info}
    image.save(buffer, "TIFF" if image.mode in _TIFF_ONLY else "PNG", **metadata)
