"""Pastes the networks' picture back into the scene, with a hard edge as the original AnyDoor, or a soft
one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from runtime.errors import InputError, in_field
from runtime.imaging.boxes import Box, box_in_box
from runtime.imaging.geometry import Geometry
from runtime.imaging.resize import resize_linear

_BAND_ROWS = 256

HARD, SOFT = EDGES = ("hard", "soft")
"""The edges of a pasted rectangle: as in the original, or blended into the scene."""

FEATHER = 8 / 512
"""Share of the networks' picture over which a soft edge fades. A VAE does not return what it was given, so a
hard one would show."""


@dataclass(frozen=True)
class PasteRule:
    """The part of the networks' picture that is pasted into the scene."""

    margin: int
    """Pixels at the crop's border that are never pasted."""
    keep_background: bool
    """Whether only the target box is pasted, not the whole crop."""


WHOLE_CROP = PasteRule(margin=5, keep_background=False)
"""run_inference.py."""

TARGET_BOX = PasteRule(margin=3, keep_background=True)
"""run_gradio_demo.py."""


def check_edge(name: object) -> str:
    """Refuses a name that is no edge.

    Raises:
        InputError: lists those that there are.
    """
    with in_field("edge"):
        if name not in EDGES:
            raise InputError(f"there is no edge '{name}': choose one of {', '.join(EDGES)}")
    return str(name)


def pasted_region(geometry: Geometry, rule: PasteRule) -> Box:
    """Returns the only part of the scene that may change, in scene coordinates; at least one pixel.

    The crop without its margin, or what of the target box lies in that, if the rule keeps the background.
    Where the margin would leave nothing it is made smaller; the original then pastes nothing.
    """
    target = geometry.box if rule.keep_background else geometry.crop
    margin = rule.margin
    while (region := geometry.crop.shrink(margin).intersection(target)).is_empty:
        margin -= 1
    return region


def paste_back(
    picture: NDArray[np.uint8] | NDArray[np.float32],
    scene: NDArray[np.uint8],
    geometry: Geometry,
    rule: PasteRule,
) -> NDArray[np.uint8]:
    """Returns a copy of the scene with the picture at its place.

    Like the original, drops the picture's first row and truncates to uint8 instead of rounding.
    Source: `crop_back` and its callers in run_inference.py and run_gradio_demo.py.

    picture: (R, R, 3) RGB, uint8 or float32 in 0..255. scene: (H, W, 3) uint8 RGB, left untouched.
    Returns (H, W, 3) uint8 RGB, bit-identical to the scene outside `pasted_region`.
    """
    without_first_row = picture[1:].astype(np.float32)
    composite: NDArray[np.uint8] = scene.copy()
    for band in _bands(pasted_region(geometry, rule)):
        in_padded_crop = box_in_box(band, geometry.crop).shift(geometry.padding.left, geometry.padding.top)
        pixels = resize_linear(without_first_row, geometry.padded_size, window=in_padded_crop)
        composite[band.slices] = pixels.astype(np.uint8)
    return composite


def feathered_region(geometry: Geometry, weights: NDArray[np.float32]) -> Box:
    """Returns the only part of the scene that `paste_feathered` may change, in scene coordinates."""
    ends = []
    for axis, (first, before) in enumerate(
        ((geometry.crop.y0, geometry.padding.top), (geometry.crop.x0, geometry.padding.left))
    ):
        along = weights.max(axis=1 - axis)[:, None]
        reached = np.flatnonzero(resize_linear(along, (1, geometry.padded_size[1 - axis])) > 0)
        ends.append((first + int(reached[0]) - before, first + int(reached[-1]) + 1 - before))
    (y0, y1), (x0, x1) = ends
    return Box(x0, y0, x1, y1).intersection(geometry.crop)


def paste_feathered(
    picture: NDArray[np.uint8],
    scene: NDArray[np.uint8],
    geometry: Geometry,
    weights: NDArray[np.float32],
) -> NDArray[np.uint8]:
    """Returns a copy of the scene with the picture at its place, faded into it.

    Where the scene goes on beyond the crop, the picture fades towards the crop's edge, too.

    picture: (H, W, 3) RGB. scene: (H, W, 3) RGB, of another size and left untouched. weights: (H, W) in 0..1,
    of the picture's size; see `runtime.imaging.masked_scene`.
    Returns (H, W, 3) uint8 RGB of the scene's size, bit-identical to it where the weights are 0.
    """
    region = feathered_region(geometry, weights)
    return blend(
        picture, scene, geometry, region, lambda part: place_share(weights, geometry, scene.shape, part)
    )


def blend(
    picture: NDArray[np.uint8],
    scene: NDArray[np.uint8],
    geometry: Geometry,
    region: Box,
    share_of: Callable[[Box], NDArray[np.float32]],
) -> NDArray[np.uint8]:
    """Returns a copy of the scene, (H, W, 3), with a share of the picture, (H, W, 3) RGB, in a region of its
    crop.

    Args:
        picture: see `paste_feathered`.
        scene: see `paste_feathered`.
        geometry: of the picture's crop.
        region: inside the crop, in scene coordinates.
        share_of: gives the share for a part of the region, (H, W) of that part, 0..1.
    """
    drawn = picture.astype(np.float32)
    composite: NDArray[np.uint8] = scene.copy()
    for band in _bands(region):
        window = box_in_box(band, geometry.crop).shift(geometry.padding.left, geometry.padding.top)
        before = scene[band.slices].astype(np.float32)
        change = resize_linear(drawn, geometry.padded_size, window=window) - before
        composite[band.slices] = np.rint(before + share_of(band)[..., None] * change).astype(np.uint8)
    return composite


def place_share(
    weights: NDArray[np.float32], geometry: Geometry, scene_shape: tuple[int, ...], part: Box
) -> NDArray[np.float32]:
    """Returns how much of what was drawn `paste_feathered` puts into a part of the crop, (H, W) of that part,
    0..1.

    Args:
        weights: see `paste_feathered`.
        geometry: of the crop.
        scene_shape: (height, width, ...).
        part: in scene coordinates.
    """
    crop, padded = geometry.crop, geometry.padded_size
    within = box_in_box(part, crop)
    window = within.shift(geometry.padding.left, geometry.padding.top)
    share: NDArray[np.float32] = resize_linear(weights, padded, window=window)
    width = max(1.0, min(weights.shape) * FEATHER * padded[0] / weights.shape[1])
    rows = fading_ends(crop.height, width, crop.y0 > 0, crop.y1 < scene_shape[0])[:, None]
    columns = fading_ends(crop.width, width, crop.x0 > 0, crop.x1 < scene_shape[1])[None]
    share *= np.minimum(rows[within.slices[0]], columns[:, within.slices[1]])
    return share


def fading_ends(length: int, width: float, first: bool, last: bool) -> NDArray[np.float32]:
    """1 along an axis, (length,), that falls to 0 over `width` towards the ends that are asked for."""
    inside = np.arange(length) + 0.5
    share = np.ones(length)
    if first:
        share = np.minimum(share, inside / width)
    if last:
        share = np.minimum(share, inside[::-1] / width)
    return share.astype(np.float32)


def _bands(region: Box) -> Iterator[Box]:
    """Yields the region in bands of rows: a large crop as float32 would take four times the scene's
    memory."""
    for y0 in range(region.y0, region.y1, _BAND_ROWS):
        yield region._replace(y0=y0, y1=min(y0 + _BAND_ROWS, region.y1))
