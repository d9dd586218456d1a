"""Reads the place of an object in the scene: a box or a mask."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from runtime.errors import InputError, in_field
from runtime.imaging.boxes import Box
from runtime.imaging.decoding import MAX_PIXELS
from runtime.imaging.masks import MaskedPicture, load_mask
from runtime.imaging.sources import PictureLike
from runtime.imaging.specks import without_specks

SCENE_MASK = "the scene mask"


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
            raise InputError("a placement needs either a box or a mask for the place of the object, not both")
    if box is not None:
        with in_field("box"):
            return check_box(box, (scene.shape[1], scene.shape[0]))
    assert mask is not None
    with in_field("mask"):
        inside = load_mask(mask, SCENE_MASK, max_pixels, of=MaskedPicture("the scene", scene.shape[:2]))
        return inside if keep_specks else without_specks(inside, SCENE_MASK)


def whole_box(box: Sequence[float]) -> Box:
    """Returns a box of four whole numbers, which may be floating point, NumPy's or of a tensor.

    Raises:
        InputError: it is something else.
    """
    values = box.tolist() if hasattr(box, "tolist") else box
    if not isinstance(values, Sequence) or len(values) != 4 or not all(map(_is_whole, values)):
        raise InputError(f"a box is four whole numbers x0,y0,x1,y1, not {values}")
    return Box(*map(int, values))


def check_box(box: Sequence[float], size: tuple[int, int]) -> Box:
    """Returns the box, if any of it lies in a scene of `size` (width, height).

    Raises:
        InputError: it is not four whole numbers, has no area, or lies outside.
    """
    checked = whole_box(box)
    if checked.is_empty:
        raise InputError(f"the box {tuple(checked)} has no area: x1 must exceed x0, and y1 exceed y0")
    if checked.clip(size).is_empty:
        raise InputError(f"the box {tuple(checked)} lies outside the scene of {size[0]} x {size[1]} pixels")
    return checked


def _is_whole(value: object) -> bool:
    return is_integer(value) or (isinstance(value, float | np.floating) and float(value).is_integer())


def is_integer(value: object) -> bool:
    """Returns whether a value is a whole number; True and False are not."""
    return isinstance(value, int | np.integer) and not isinstance(value, bool)
