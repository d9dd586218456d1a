"""The place in the scene where an object goes: a box or a mask."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from runtime.errors import InputError, in_field, warn
from runtime.imaging.boxes import SMALLEST_MASK_AREA, Box
from runtime.imaging.decoding import FIRST_SWAPPED, MAX_PIXELS, UPRIGHT, decode, turned
from runtime.imaging.masks import load_mask, read_mask
from runtime.imaging.pictures import Picture
from runtime.imaging.sources import PictureLike
from runtime.imaging.specks import without_specks


def load_target(
    box: Sequence[float] | None,
    mask: PictureLike | None,
    scene: NDArray[np.uint8],
    max_pixels: int = MAX_PIXELS,
    keep_specks: bool = False,
) -> Box | NDArray[np.bool_]:
    """Decodes and checks the place of an object; one of `box` and `mask` is needed.

    Args:
        box: x0, y0, x1, y1 in pixels of the scene, x1 and y1 exclusive.
        mask: picture or array of the scene's size.
        scene: (H, W, 3) uint8 RGB.
        max_pixels: of the mask.
        keep_specks: whether pixels far from the place belong to it; see `runtime.imaging.specks`.

    Returns:
        The box, or the mask (H, W).

    Raises:
        InputError: none or both are given, or the place cannot be used.
    """
    if (box is None) == (mask is None):
        with in_field("target"):
            raise InputError(
                "a placement needs either a box or a mask that says where the object goes, and not both"
            )
    if box is not None:
        with in_field("box"):
            return check_box(box, (scene.shape[1], scene.shape[0]))
    assert mask is not None
    with in_field("mask"):
        inside = load_mask(mask, "the scene mask", max_pixels)
        check_mask(inside, scene.shape, "the scene mask", "the scene")
        return inside if keep_specks else without_specks(inside, "the scene mask")


def turned_mask(
    source: PictureLike, picture: Picture, name: str, of: str, max_pixels: int = MAX_PIXELS
) -> NDArray[np.bool_]:
    """Reads the mask of a picture, and turns it like the picture if it was made of that unturned.

    Cameras store pictures turned, and say so in EXIF. Masks from tools that ignore it lie as the picture is
    stored.

    Args:
        source: picture or array.
        picture: what it is a mask of.
        name: what to call the mask in an error.
        of: what to call the picture.
        max_pixels: of the mask.

    Raises:
        InputError: see `load_mask`.
    """
    decoded = decode(source, name, max_pixels)
    mask, orientation = read_mask(decoded, name), picture.orientation
    height, width = picture.rgb.shape[:2]
    if orientation == UPRIGHT or decoded.orientation != UPRIGHT:
        return mask
    if orientation >= FIRST_SWAPPED and height != width:
        if mask.shape == (width, height):
            warn(
                f"{of} is turned, as its EXIF says; {name} has the size that it had before, and is turned too"
            )
            return np.asarray(turned(Image.fromarray(mask), orientation))
    elif mask.shape == (height, width):
        warn(
            f"{of} is turned, as its EXIF says, and {name} is not: if it was made by a tool that ignores EXIF, "
            "turn it"
        )
    return mask


def whole_box(box: Sequence[float]) -> Box:
    """A box of four whole numbers, which may be floating point, NumPy's or of a tensor.

    Raises:
        InputError: it is something else.
    """
    values = box.tolist() if hasattr(box, "tolist") else box
    if not isinstance(values, Sequence) or len(values) != 4 or not all(map(_is_whole, values)):
        raise InputError(f"a box is four whole numbers x0,y0,x1,y1, not {values}")
    return Box(*map(int, values))


def check_box(box: Sequence[float], size: tuple[int, int]) -> Box:
    """The box, if any of it lies in a scene of `size` (width, height).

    Raises:
        InputError: it is not four whole numbers, has no area, or lies outside.
    """
    checked = whole_box(box)
    if checked.is_empty:
        raise InputError(f"the box {tuple(checked)} has no area: x1 must exceed x0, and y1 exceed y0")
    if checked.clip(size).is_empty:
        raise InputError(f"the box {tuple(checked)} lies outside the scene of {size[0]} x {size[1]} pixels")
    return checked


def check_mask(mask: NDArray[np.bool_], shape: tuple[int, ...], name: str, of: str) -> None:
    """Refuses a mask that does not fit its picture, or has next to nothing in it.

    Args:
        mask: (H, W).
        shape: (H, W, ...) of the picture.
        name: what to call the mask in an error.
        of: what to call the picture.

    Raises:
        InputError: says both sizes, or how many pixels are set.
    """
    if mask.shape != shape[:2]:
        raise InputError(
            f"{name} is {mask.shape[1]} x {mask.shape[0]} and {of} is "
            f"{shape[1]} x {shape[0]} pixels: they must have the same size"
        )
    pixels = int(np.count_nonzero(mask))
    if pixels < SMALLEST_MASK_AREA:
        what = "is empty" if pixels == 0 else f"has only {pixels} pixels set"
        raise InputError(f"{name} {what}; at least {SMALLEST_MASK_AREA} pixels must be")


def _is_whole(value: object) -> bool:
    return is_integer(value) or (isinstance(value, float | np.floating) and float(value).is_integer())


def is_integer(value: object) -> bool:
    """Whether a value is a whole number; True and False are not."""
    return isinstance(value, int | np.integer) and not isinstance(value, bool)
