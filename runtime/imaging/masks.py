"""Reads masks of scenes and references, from files and arrays."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from runtime.errors import InputError, warn
from runtime.imaging.boxes import SMALLEST_MASK_AREA
from runtime.imaging.decoding import FIRST_SWAPPED, MAX_PIXELS, UPRIGHT, Decoded, decode, turned, upright
from runtime.imaging.sources import PictureLike

MASK_THRESHOLD = 128
"""A pixel of a mask or of an alpha channel (0..255) is covered above this value, as in the original."""
_MOST_LABELS = 32
_MOST_NAMED = 6
"""Values that a refusal lists; of more it says the range."""


class TransparentPlace(bytes):
    """The file of a picture whose transparent part is what is meant, as in image edits of OpenAI's API."""


@dataclass(frozen=True)
class MaskedPicture:
    """The picture that a mask belongs to."""

    name: str
    """Its name in errors."""
    shape: tuple[int, ...]
    """(H, W, ...), upright."""
    orientation: int = UPRIGHT
    """EXIF orientation in which it was stored."""


def load_mask(
    source: PictureLike, name: str, max_pixels: int = MAX_PIXELS, of: MaskedPicture | None = None
) -> NDArray[np.bool_]:
    """Returns a mask (H, W), read by the first of these rules that applies.

    1. Transparency with pixels on both sides of 128: what is more opaque than that.
    2. No value above 1, but 1 itself, in no lossy format: what is not 0.
    3. Labels - a palette with colours or without anything brighter than 128, or at most 32 different colours
       of at most 128 in no lossy format: everything but the most frequent value of the border.
    4. What has a channel above 128. Where that is everything, what has the first channel above it, as in the
       original.

    The mask of a picture that was turned upright is turned, too, if it lies as that was stored.

    Args:
        source: a picture or an array; bool is taken as it is. Of a `TransparentPlace` no rule applies but its
            own.
        name: what to call it in an error.
        max_pixels: a larger one is refused before it is decoded.
        of: the picture that it must fit.

    Raises:
        InputError: it is not a picture, is damaged or too large; it does not fit the picture; or no pixel,
            of a picture fewer than 10, is inside by the rule that applies: says which that is, and the
            values.
    """
    decoded = decode(source, name, max_pixels)
    marks = _transparent if isinstance(source, TransparentPlace) else _inside
    if of:
        decoded = _turned_like(decoded, of, name)
        width, height = decoded.image.size
        if (height, width) != of.shape[:2]:
            raise InputError(
                f"{name} is {width} x {height} and {of.name} is {of.shape[1]} x {of.shape[0]} pixels: "
                "they must have the same size"
            )
    inside, rule = marks(decoded)
    check_area(inside, name, rule, SMALLEST_MASK_AREA if of else 1)
    return inside


def check_area(inside: NDArray[np.bool_], name: str, rule: str, least: int = SMALLEST_MASK_AREA) -> None:
    """Refuses a mask with next to nothing in it.

    Args:
        inside: (H, W).
        name: what to call it in an error.
        rule: how it was read, as a clause.
        least: pixels that must be set.

    Raises:
        InputError: says how many pixels are set.
    """
    pixels = int(np.count_nonzero(inside))
    if pixels < least:
        what = "is empty" if pixels == 0 else f"has only {pixels} pixel{'s' * (pixels > 1)} inside"
        raise InputError(f"{name} {what}; at least {least} must be inside: {rule}")


def _turned_like(decoded: Decoded, of: MaskedPicture, name: str) -> Decoded:
    """Returns the mask of a turned picture: turned, if its size says that it lies as the picture was
    stored."""
    if of.orientation == UPRIGHT or decoded.orientation != UPRIGHT:
        return decoded
    height, width = of.shape[:2]
    if of.orientation < FIRST_SWAPPED or height == width:
        warn(
            f"{of.name} is rotated by its EXIF, but {name} is not: rotate it if it was made by a tool "
            "that ignores EXIF"
        )
    elif decoded.image.size == (height, width):
        warn(f"{of.name} is rotated by its EXIF; {name} has the size before rotation, and is rotated too")
        image, stored = (turned(each, of.orientation) for each in (decoded.image, decoded.stored))
        return replace(decoded, image=image, stored=stored)
    return decoded


def _inside(decoded: Decoded) -> tuple[NDArray[np.bool_], str]:
    """Reads the inside of a mask; returns it with the rule that was used."""
    image = decoded.image
    if not has_transparency(image):
        return _from_colours(decoded)
    alpha = opacity(image)
    inside = mask_from_alpha(alpha)
    if inside.any() and not inside.all():
        return inside, "inside is what is opaque"
    inside, rule = _from_colours(decoded)
    if alpha.min() != alpha.max() and inside.all():
        # painted with too little strength: that everything is the place is not what is meant
        inside = np.zeros_like(inside)
    return inside, f"{rule}; its opacity goes from {alpha.min()} to {alpha.max()}, not to both sides of 128"


def _transparent(decoded: Decoded) -> tuple[NDArray[np.bool_], str]:
    image = decoded.image
    if not has_transparency(image):
        return np.zeros(
            (image.height, image.width), np.bool_
        ), "inside is what is transparent, and nothing is"
    return ~mask_from_alpha(opacity(image)), "inside is what is transparent"


def has_transparency(image: Image.Image) -> bool:
    """Returns whether an image has an alpha channel, a transparent palette entry or a transparent colour."""
    # one of Lab's channels is called A, too
    return (image.mode != "LAB" and "A" in image.getbands()) or "transparency" in image.info


def in_rgb(image: Image.Image) -> Image.Image:
    """Returns an image in RGB, without its transparency."""
    if image.mode == "P" and has_transparency(image):
        # of the opacities of a palette's entries, Pillow warns that they are lost
        image = image.convert("RGBA")
    return image.convert("RGB")


def opacity(image: Image.Image) -> NDArray[np.uint8]:
    """Returns (H, W), 0 to 255."""
    return np.asarray(image.convert("RGBA").getchannel("A"))


def mask_from_alpha(alpha: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Returns the mask of a picture's opaque part, as the original takes it: more than 128."""
    return alpha > MASK_THRESHOLD


def values_of(values: NDArray[np.uint8]) -> str:
    """Returns the values of a mask, as a clause of a refusal."""
    found = np.flatnonzero(np.bincount(values.reshape(-1), minlength=256)).tolist()
    if len(found) > _MOST_NAMED:
        return f"its {len(found)} values go from {found[0]} to {found[-1]}"
    return (
        f"its values are {', '.join(map(str, found))}" if len(found) > 1 else f"it is {found[0]} everywhere"
    )


def _from_colours(decoded: Decoded) -> tuple[NDArray[np.bool_], str]:
    image = decoded.image
    if image.mode == "1":
        return np.asarray(image), "inside is what is white"
    colours = in_rgb(image)
    rgb = np.asarray(colours)
    value = rgb.max(axis=2)
    if decoded.exact and value.max() == 1:
        return value > 0, "inside is what is 1"
    is_coloured = bool((rgb.min(axis=2) != value).any())
    is_dark = value.max() <= MASK_THRESHOLD
    as_labels = "it is read as labels, of which the most frequent of the border is outside"
    if image.mode == "P" and (is_coloured or is_dark):
        labels = np.asarray(image)
        return _from_labels(labels), f"{as_labels}, and {values_of(labels)}"
    if is_dark and decoded.exact and colours.getcolors(_MOST_LABELS):
        if decoded.stored.mode.startswith("I"):
            codes = np.asarray(upright(decoded.stored))  # in 8 bits, small labels beside large ones are 0
        else:
            codes = np.asarray(colours.convert("RGBA")).view(np.uint32)[..., 0]
        return _from_labels(codes), f"{as_labels}, and {values_of(value)}"
    inside = value > MASK_THRESHOLD
    if is_coloured and inside.all() and not (red := rgb[..., 0] > MASK_THRESHOLD).all():
        inside = red
    channel = "the largest channel" if is_coloured else "the value"
    return inside, f"inside is where {channel} is above {MASK_THRESHOLD}, and {values_of(value)}"


def _from_labels(labels: NDArray[Any]) -> NDArray[np.bool_]:
    """Returns all pixels except those with the most frequent value of the border."""
    border = np.concatenate([labels[0], labels[-1], labels[1:-1, 0], labels[1:-1, -1]])
    values, counts = np.unique(border, return_counts=True)
    inside: NDArray[np.bool_] = labels != values[counts.argmax()]
    return inside
