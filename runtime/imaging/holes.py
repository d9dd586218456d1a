"""Computes the hole that an object leaves in a scene, and how its fill is blended into the scene."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from runtime.errors import InputError
from runtime.imaging.boxes import Box, smallest_box
from runtime.imaging.colour_profile import from_srgb
from runtime.imaging.picture import Picture
from runtime.imaging.pictures import BACKGROUND

_LEAST_ROOM = 4
"""Pixels around an object that belong to its hole: soft edges."""
_ROOM = 0.03
"""Share of its longer side, likewise: shadows."""


def room_around(mask: NDArray[np.bool_]) -> int:
    """Returns pixels by which a hole is larger than its object, (H, W), at each side."""
    box = smallest_box(mask)
    return max(_LEAST_ROOM, round(_ROOM * max(box.width, box.height)))


def grow(mask: NDArray[np.bool_], pixels: int) -> NDArray[np.bool_]:
    """Returns a mask (H, W), which is not empty, and what is at most so many rows and columns away from
    it."""
    grown = np.zeros_like(mask)
    part = _box_around(mask, pixels).slices
    grown[part] = _window_sums(mask[part], pixels) > 0
    return grown


def hole_of(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Returns the hole of an object, (H, W)."""
    return grow(mask, room_around(mask))


def hole_box(mask: NDArray[np.bool_]) -> Box:
    """Returns the smallest box around the hole of an object, (H, W)."""
    return _box_around(mask, room_around(mask))


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
    share = np.zeros(mask.shape, np.float32)
    # all that the windows of the hole's pixels reach
    part = _box_around(mask, room + blur).slices
    sums = _window_sums(grow(mask[part], room - blur), blur)
    # of the pixels that there are: at the picture's border a window is smaller
    share[part] = sums / _window_sums(np.ones_like(mask[part]), blur)
    return share


def filled(
    picture: Picture, seen: NDArray[np.uint8], drawn: NDArray[np.uint8], share: NDArray[np.float32]
) -> Picture:
    """Returns a scene with its hole filled. Outside of it every pixel stays as it is.

    Args:
        picture: the scene, upright.
        seen: what networks see of it, (H, W, 3) in sRGB.
        drawn: the same with something else in the hole: (H, W, 3), which is opaque, or, of a transparent
            scene, (H, W, 4) with its opacity.
        share: of that, (H, W), not 0 everywhere; see `fade`.
    """
    part = smallest_box(share > 0).slices
    hole = share[part] > 0
    alpha, before = picture.alpha, seen[part][hole]
    if alpha is not None and drawn.shape[2] == 4:
        before = np.column_stack([before, alpha[part][hole]])
    blended = drawn[part][hole].astype(np.float32)
    blended -= before
    blended *= share[part][hole][:, None]
    blended += before
    colours, opacity = blended[:, :3], blended[:, 3:]
    if opacity.size:
        # what looks like this on white
        colours -= BACKGROUND
        colours *= 255 / np.maximum(opacity, 1)
        colours += BACKGROUND
        np.clip(colours, 0, 255, out=colours)
    if alpha is not None:
        alpha = alpha.copy()
        alpha[part][hole] = np.rint(opacity[:, 0]) if opacity.size else 255
    pixels = np.rint(colours).astype(np.uint8)
    rgb = picture.rgb.copy()
    rgb[part][hole] = pixels
    own = rgb
    if picture.own is not picture.rgb:
        assert picture.metadata.icc_profile
        own = picture.own.copy()
        own[part][hole] = from_srgb(pixels[None], picture.metadata.icc_profile)[0]
    return replace(picture, rgb=rgb, own=own, alpha=alpha)


def _box_around(mask: NDArray[np.bool_], pixels: int) -> Box:
    """Returns the smallest box around a mask, larger by so many pixels at each side where the picture is."""
    height, width = mask.shape
    return smallest_box(mask).shrink(-pixels).clip((width, height))


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
