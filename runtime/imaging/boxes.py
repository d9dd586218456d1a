"""Rectangles of pixels: bounding box, expansion, square, padding.

The formulas are those of AnyDoor's datasets/data_utils.py, because trained weights depend on where the
crop lies to the pixel. All ratios are explicit arguments; nothing here draws a random number.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

SMALLEST_MASK_AREA = 10
"""Pixels. The original takes a smaller mask for the whole picture, which is a mistake more often than a
wish."""


class Box(NamedTuple):
    """A half-open rectangle of pixels: columns x0..x1-1 and rows y0..y1-1."""

    x0: int
    y0: int
    x1: int
    y1: int

    @property
    def width(self) -> int:
        """Number of columns."""
        return self.x1 - self.x0

    @property
    def height(self) -> int:
        """Number of rows."""
        return self.y1 - self.y0

    @property
    def is_empty(self) -> bool:
        """Whether no pixel lies inside."""
        return self.width <= 0 or self.height <= 0

    @property
    def slices(self) -> tuple[slice, slice]:
        """Index of the box in an array whose first axes are rows and columns."""
        return slice(self.y0, self.y1), slice(self.x0, self.x1)

    def clip(self, size: tuple[int, int]) -> Box:
        """Returns the part inside a picture of `size` (width, height)."""
        return self.intersection(Box(0, 0, *size))

    def intersection(self, other: Box) -> Box:
        """Returns the pixels that lie in both; empty where there are none."""
        low = max(self.x0, other.x0), max(self.y0, other.y0)
        return Box(*low, min(self.x1, other.x1), min(self.y1, other.y1))

    def union(self, other: Box) -> Box:
        """Returns the smallest box around both."""
        low = min(self.x0, other.x0), min(self.y0, other.y0)
        return Box(*low, max(self.x1, other.x1), max(self.y1, other.y1))

    def shift(self, x: int, y: int) -> Box:
        """Returns the same box moved x columns to the right and y rows down."""
        return Box(self.x0 + x, self.y0 + y, self.x1 + x, self.y1 + y)

    def shrink(self, margin: int) -> Box:
        """Returns the box without `margin` pixels at each side."""
        return Box(self.x0 + margin, self.y0 + margin, self.x1 - margin, self.y1 - margin)


class Padding(NamedTuple):
    """Pixels added at each side of a picture."""

    left: int = 0
    top: int = 0
    right: int = 0
    bottom: int = 0


def mask_extent(mask: NDArray[Any]) -> Box:
    """First and **last** column and row of a mask, the numbers that the original expands.

    The ends are the last indices themselves, so read as a half-open box they leave out the object's last
    column and row, and a mask one pixel wide gives a box of width 0. A mask of fewer than 10 pixels,
    empty ones included, gives the whole picture, with exclusive ends. Source: `get_bbox_from_mask`.

    mask: (H, W), zero outside the object.
    """
    height, width = mask.shape
    inside = mask.astype(bool, copy=False)
    if np.count_nonzero(inside) < SMALLEST_MASK_AREA:
        return Box(0, 0, width, height)
    columns = np.flatnonzero(inside.any(axis=0))
    rows = np.flatnonzero(inside.any(axis=1))
    return Box(int(columns[0]), int(rows[0]), int(columns[-1]), int(rows[-1]))


def smallest_box(mask: NDArray[np.bool_]) -> Box:
    """Returns the smallest box around all pixels of a mask (H, W) that is not empty."""
    columns, rows = np.flatnonzero(mask.any(axis=0)), np.flatnonzero(mask.any(axis=1))
    return Box(int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1)


def box_extent(box: Box) -> Box:
    """`mask_extent` of the filled mask of a box, without the rule for small masks."""
    return Box(box.x0, box.y0, box.x1 - 1, box.y1 - 1)


def bounding_box(mask: NDArray[Any]) -> Box:
    """Crop of a mask's object: `mask_extent`, widened to one pixel where that is empty.

    The widening is ours: of an object one pixel wide or high the original sees nothing at all.

    mask: (H, W), zero outside the object. Fewer than 10 pixels give the whole picture.
    """
    return _at_least_one_pixel(mask_extent(mask))


def expand(box: Box, ratio: float, size: tuple[int, int]) -> Box:
    """Scales a box around its centre and clips it to the picture.

    The original adds 1 to the sides, whether the ends are inclusive (first call, on a mask's extent) or
    already exclusive (second call, for the crop). Source: `expand_bbox`.

    size: (width, height) of the picture.
    """
    x0, x1 = _expand_axis(box.x0, box.x1, ratio)
    y0, y1 = _expand_axis(box.y0, box.y1, ratio)
    return _at_least_one_pixel(Box(x0, y0, x1, y1).clip(size))


def square(box: Box, size: tuple[int, int]) -> Box:
    """Lengthens the shorter side to the longer one, around the centre.

    Not always a square: an odd side gives a box one pixel short, and at the picture's border the box is
    clipped, not moved. Source: `box2squre`.

    size: (width, height) of the picture.
    """
    return to_aspect(box, (1, 1), size)


def to_aspect(box: Box, aspect: tuple[int, int], size: tuple[int, int]) -> Box:
    """`square` for any ratio of the sides: lengthens the one that is too short, around the centre.

    aspect: width and height, or anything in proportion to them. size: (width, height) of the picture.
    """
    width, height = aspect
    x_centre, y_centre = (box.x0 + box.x1) // 2, (box.y0 + box.y1) // 2
    if box.height * width >= box.width * height:
        half = box.height * width // height // 2
        box = Box(x_centre - half, box.y0, x_centre + half, box.y1)
    else:
        half = box.width * height // width // 2
        box = Box(box.x0, y_centre - half, box.x1, y_centre + half)
    return _at_least_one_pixel(box.clip(size))


def box_in_box(inner: Box, outer: Box) -> Box:
    """`inner` in the coordinates of a crop taken at `outer`."""
    return inner.shift(-outer.x0, -outer.y0)


def square_padding(width: int, height: int) -> Padding:
    """Padding that makes a picture square; the odd pixel goes right or below. Source: `pad_to_square`."""
    return aspect_padding(width, height, (1, 1))


def aspect_padding(width: int, height: int, aspect: tuple[int, int]) -> Padding:
    """`square_padding` for any ratio of the sides, given as for `to_aspect`."""
    return _centred_padding(
        width,
        height,
        max(width, -(-height * aspect[0] // aspect[1])),
        max(height, -(-width * aspect[1] // aspect[0])),
    )


def expansion_padding(width: int, height: int, ratio: float) -> Padding:
    """Padding that enlarges a picture by `ratio` >= 1 on both axes. Source: `expand_image_mask`."""
    return _centred_padding(width, height, int(width * ratio), int(height * ratio))


def _expand_axis(low: int, high: int, ratio: float) -> tuple[int, int]:
    centre = 0.5 * (low + high)
    length = ratio * (high - low + 1)
    return int(centre - length * 0.5), int(centre + length * 0.5)


def _centred_padding(width: int, height: int, new_width: int, new_height: int) -> Padding:
    left, top = (new_width - width) // 2, (new_height - height) // 2
    return Padding(left, top, new_width - width - left, new_height - height - top)


def _at_least_one_pixel(box: Box) -> Box:
    """Widens a box that begins inside the picture to a pixel, where it is empty."""
    return box.union(Box(box.x0, box.y0, box.x0 + 1, box.y0 + 1))
