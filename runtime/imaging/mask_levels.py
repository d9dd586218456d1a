"""Coarsens masks to four levels, each a superset of the one before.

A network draws inside the mask only. A precise one says which pose the object takes; a coarse one leaves it
room for another pose, for shadows and for what the object touches. After SmartBrush (Xie et al., 2023), which
blurs an instance's mask more and more until its box is left; IMPRINT (section 3.2) takes its four levels from
there. How much they blur is not published: widths and thresholds are ours.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from runtime.errors import InputError
from runtime.imaging.boxes import Box, bounding_box, smallest_box

MaskLevel = Literal["exact", "outline", "blob", "box"]

MASK_LEVELS: tuple[MaskLevel, ...] = get_args(MaskLevel)
"""From the most precise one to the coarsest."""

_BLURS = {"outline": (0.02, 0.10), "blob": (0.08, 0.05)}
"""Level -> standard deviation of the Gaussian, in longer sides of the object's box, and share of the blurred
mask from which on a pixel belongs to it. Shares below a half only ever add to a mask."""

_REACH = 3
"""Standard deviations after which a Gaussian has ended, for all that a byte can tell."""

_MOST_BLURRED = 1 << 24
"""Pixels that are blurred; a larger mask is reduced first, which its wide Gaussian does not tell."""


def check_mask_level(level: object) -> MaskLevel:
    """Returns the name of a level that is given by its name or its number, 0 (exact) to 3 (box).

    Raises:
        InputError: there is no such level.
    """
    if isinstance(level, int | str) and not isinstance(level, bool):
        for number, name in enumerate(MASK_LEVELS):
            if level in (number, name):
                return name
    levels = ", ".join(f"{number} ({name})" for number, name in enumerate(MASK_LEVELS))
    raise InputError(f"there is no mask level {level!r}: choose one of {levels}")


def coarsen_mask(mask: NDArray[Any], level: MaskLevel, box: Box, spread: float = 1.0) -> NDArray[np.bool_]:
    """Makes a mask as coarse as a level, so that everything in it stays inside.

    Args:
        mask: (H, W), bool or 0/1, not empty.
        level: how coarse.
        box: the place of the object in the picture; the coarsest level, beyond which no other goes.
        spread: factor on the widths of the blurs; training draws it, so that no outline is always as far off.

    Returns:
        (H, W), a superset of `mask` and of all finer levels with the same box and spread.
    """
    coarse = mask.astype(bool)
    for each in MASK_LEVELS[1 : MASK_LEVELS.index(level) + 1]:
        if each == "box":
            coarse[box.slices] = True
        else:
            coarse[box.slices] |= _blurred(mask, each, box, spread)
    return coarse


def _blurred(mask: NDArray[Any], level: MaskLevel, box: Box, spread: float) -> NDArray[np.bool_]:
    """Returns the part of a blurred mask that lies in the box."""
    width, share = _BLURS[level]
    sides = bounding_box(mask)  # the original's, which leaves out the last row and column
    sigma = width * spread * max(sides.width, sides.height)
    object_box = smallest_box(mask.astype(bool))
    margin = int(np.ceil(_REACH * sigma))
    reach = (object_box.width + 2 * margin) * (object_box.height + 2 * margin)
    factor = max(int(np.ceil((reach / _MOST_BLURRED) ** 0.5)), 1)
    alone = Image.fromarray(mask[object_box.slices].astype(bool).astype(np.uint8) * 255).reduce(factor)
    edge = -(-margin // factor)
    around = Image.fromarray(_with_margin(np.asarray(alone), edge, object_box, mask.shape))
    reached = np.asarray(around.filter(ImageFilter.GaussianBlur(sigma / factor))) > 255 * share
    rows = (np.arange(box.y0, box.y1) - object_box.y0) // factor + edge
    columns = (np.arange(box.x0, box.x1) - object_box.x0) // factor + edge
    height, width = reached.shape
    inner: NDArray[np.bool_] = reached[np.ix_(rows.clip(0, height - 1), columns.clip(0, width - 1))]
    inner &= ((rows >= 0) & (rows < height))[:, None] & (columns >= 0) & (columns < width)
    return inner


def _with_margin(alone: NDArray[np.uint8], margin: int, box: Box, size: tuple[int, ...]) -> NDArray[np.uint8]:
    """Pads the mask of an object; what the picture's border cuts off goes on beyond it.

    Args:
        alone: (h, w), the mask in the object's box.
        margin: pixels at each side.
        box: of the object, in the picture.
        size: (H, W) of the picture.
    """
    height, width = size[:2]
    for axis, cut_off in enumerate(((box.y0 == 0, box.y1 == height), (box.x0 == 0, box.x1 == width))):
        for side, goes_on in enumerate(cut_off):
            pads = [(0, 0), (0, 0)]
            pads[axis] = (0, margin) if side else (margin, 0)
            alone = np.pad(alone, pads, "edge") if goes_on else np.pad(alone, pads)
    return alone
