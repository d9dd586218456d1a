"""Covers a place larger than the networks' picture with tiles, and blends their pictures.

Neighbours overlap by at least a quarter of a tile. Each fades out over its outer half of that, so a tile that
comes later covers all of the seam of the one before.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from runtime.imaging.boxes import Box, box_in_box
from runtime.imaging.geometry import Geometry
from runtime.imaging.paste_back import blend, fading_ends, place_share

OVERLAP = 0.25
"""Least overlap of neighbouring tiles, relative to their side."""

MOST = 4
"""Tiles along an axis. Of larger places the tiles are enlarged, too, though less than the whole."""

MAX_TILES = MOST**2


def tiles_of(region: Box, scene_size: tuple[int, int], side: int) -> list[Box]:
    """Covers a region with tiles.

    Args:
        region: what is to be covered, in scene coordinates.
        scene_size: (width, height).
        side: of the networks' picture, in pixels; that of a tile in the scene, where `MOST` are enough.

    Returns:
        Boxes of one size inside the scene, from left to right and from top to bottom: squares, but where the
        scene is smaller.
    """
    longest = max(region.width, region.height)
    side = max(side, math.ceil(longest / (MOST - (MOST - 1) * OVERLAP)))
    width, height = min(side, scene_size[0]), min(side, scene_size[1])
    columns = _starts(region.x0, region.x1, width, scene_size[0])
    rows = _starts(region.y0, region.y1, height, scene_size[1])
    return [Box(x, y, x + width, y + height) for y in rows for x in columns]


def _starts(first: int, end: int, side: int, length: int) -> list[int]:
    """Returns where the tiles of an axis begin, evenly spread over first..end - 1 of 0..length - 1."""
    if end - first <= side:
        middle = (first + end - side) // 2
        return [min(max(middle, 0), length - side)]
    overlap = math.floor(side * OVERLAP)
    count = math.ceil((end - first - overlap) / (side - overlap))
    return [first + (end - first - side) * index // (count - 1) for index in range(count)]


def paste_tile(
    picture: NDArray[np.uint8],
    scene: NDArray[np.uint8],
    tile: Geometry,
    region: Box,
    place: Geometry,
    fade: NDArray[np.float32] | None,
) -> NDArray[np.uint8]:
    """Returns a copy of the scene with the picture of a tile in it.

    Args:
        picture: (R, R, 3) RGB.
        scene: (H, W, 3) RGB, left untouched.
        tile: where the tile is.
        region: what the place may change of the scene.
        place: the place's own crop.
        fade: (R, R), share of the place's picture that is pasted, 0..1; None for all of the region.

    Returns:
        (H, W, 3), bit-identical to the scene outside of tile and region.
    """
    crop = tile.crop
    rows = _share(crop.y0, crop.y1, region.y0, region.y1)[:, None]
    columns = _share(crop.x0, crop.x1, region.x0, region.x1)[None]

    def share_of(part: Box) -> NDArray[np.float32]:
        within = box_in_box(part, crop)
        share = rows[within.slices[0]] * columns[:, within.slices[1]]
        return share if fade is None else share * place_share(fade, place, scene.shape, part)

    return blend(picture, scene, tile, region.intersection(crop), share_of)


def _share(first: int, end: int, region_first: int, region_end: int) -> NDArray[np.float32]:
    """1 along a tile's axis, falling towards those ends behind which the region goes on."""
    width = max((end - first) * OVERLAP / 2, 1.0)
    return fading_ends(end - first, width, first > region_first, end < region_end)
