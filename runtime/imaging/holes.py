"""Computes the hole that an object leaves in a scene, and how its fill is blended into the scene."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from runtime.errors import InputError
from runtime.imaging.boxes import smallest_box
from runtime.imaging.colour_profile import from_srgb
from runtime.imaging.picture import Picture

_LEAST_ROOM = 4
"""Pixels around an object that belong to its hole: soft edges."""
_ROOM = 0.03
"""Share of its longer side, likewise: shadows."""


def room_around(mask: NDArray[np.bool_]) -> int:
    """Returns pixels by which a hole is larger than its object, (H, W), at each side."""
    box = smallest_box(mask)
    return max(_LEAST_ROOM, round(_ROOM * max(box.width, box.height)))


def grow(mask: NDArray[np.bool_], pixels: int) -> NDArray[np.bool_]:
    """Returns a mask (H, W) and what is at most so many rows and columns away from it."""
    return _window_sums(mask, pixels) > 0


def hole_of(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Returns the hole of an object, (H, W)."""
    return grow(mask, room_around(mask))


def check_hole(hole: NDArray[np.bool_]) -> None:
    """Checks that a hole, (H, W), leaves something to fill it from.

    Raises:
        InputError: it is the whole picture.
    """
    if hole.all():
        raise InputError(
            "the hole covers the whole picture, so nothing is left to fill it from: select a smaller object"
        )


def fade(mask: NDArray[np.bool_]) -> NDArray[np.float32]:
    """Returns how much of what fills the hole of an object is seen, (H, W): 1 at the object, 0 outside the
    hole."""
    room = room_around(mask)
    blur = room // 2
    sums = _window_sums(grow(mask, room - blur), blur)
    # of the pixels that there are: at the picture's border a window is smaller
    return (sums / _window_sums(np.ones_like(mask), blur)).astype(np.float32)


def filled(
    picture: Picture, seen: NDArray[np.uint8], drawn: NDArray[np.uint8], share: NDArray[np.float32]
) -> Picture:
    """Returns a scene with its hole filled. Outside of it every pixel stays as it is.

    Args:
        picture: the scene, upright.
        seen: what networks see of it, (H, W, 3) in sRGB.
        drawn: the same with something else in the hole.
        share: of that, (H, W); see `fade`.
    """
    hole = share > 0
    faded = seen[hole] + share[hole][:, None] * (drawn[hole].astype(np.float32) - seen[hole])
    pixels = np.rint(faded).astype(np.uint8)
    rgb = picture.rgb.copy()
    rgb[hole] = pixels
    own, alpha = rgb, picture.alpha
    if picture.own is not picture.rgb:
        assert picture.metadata.icc_profile
        own = picture.own.copy()
        own[hole] = from_srgb(pixels[None], picture.metadata.icc_profile)[0]
    if alpha is not None:
        alpha = np.where(hole, np.uint8(255), alpha)
    return replace(picture, rgb=rgb, own=own, alpha=alpha)


def _window_sums(mask: NDArray[np.bool_], radius: int) -> NDArray[np.int32]:
    """Returns how many pixels of a mask are in the square around each pixel."""
    sums = mask.astype(np.int32)
    for axis in (0, 1):
        length = mask.shape[axis]
        totals = np.concatenate(
            [np.zeros_like(sums.take([0], axis)), sums.cumsum(axis, dtype=np.int32)], axis
        )
        ends = np.minimum(np.arange(length) + radius + 1, length)
        starts = np.maximum(np.arange(length) - radius, 0)
        sums = totals.take(ends, axis) - totals.take(starts, axis)
    return sums
