"""From the networks' picture back into the scene."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from runtime.imaging.boxes import Box, box_in_box
from runtime.imaging.geometry import Geometry
from runtime.imaging.resize import resize_linear

_BAND_ROWS = 256


@dataclass(frozen=True)
class PasteRule:
    """What of the networks' picture goes back into the scene."""

    margin: int
    """Pixels at the crop's border that are never pasted."""
    keep_background: bool
    """Whether only the target box is pasted, not the whole crop."""


WHOLE_CROP = PasteRule(margin=5, keep_background=False)
"""run_inference.py."""

TARGET_BOX = PasteRule(margin=3, keep_background=True)
"""run_gradio_demo.py."""


def pasted_region(geometry: Geometry, rule: PasteRule) -> Box:
    """The only part of the scene that may change, in scene coordinates; at least one pixel.

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
    """A copy of the scene with the picture at its place.

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


def _bands(region: Box) -> Iterator[Box]:
    """The region in bands of rows: a large crop as float32 would take four times the scene's memory."""
    for y0 in range(region.y0, region.y1, _BAND_ROWS):
        yield region._replace(y0=y0, y1=min(y0 + _BAND_ROWS, region.y1))
