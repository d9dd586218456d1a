"""Computes the target box in the scene, and the zoom-in crop around it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.errors import InputError, in_field, warn
from runtime.imaging.boxes import Box, Padding, aspect_padding, box_extent, expand, mask_extent, to_aspect

_LARGEST_RATIO = 100
_MUCH_LARGER = 3


@dataclass(frozen=True)
class Ratios:
    """Margins and enlargements, each 1 to 100.

    The original draws them at random, in steps of 0.1. run_inference.py: reference 1.2, box 1.1,
    crop 1.5..2.9. run_gradio_demo.py and training: reference 1.1..1.4, box 1.1, crop 1.3..2.9.
    """

    reference: float = 1.2  # white around the reference object
    box: float = 1.1  # target box around the mask
    crop: float = 2.0  # zoom-in crop around the target box

    def __post_init__(self) -> None:
        for name, ratio in vars(self).items():
            valid = isinstance(ratio, int | float | np.number) and not isinstance(ratio, bool)
            if not valid or not 1 <= ratio <= _LARGEST_RATIO:
                with in_field(name):
                    raise InputError(f"the {name} ratio is {ratio}; expected 1 to {_LARGEST_RATIO}")


@dataclass(frozen=True)
class Geometry:
    """The position in the scene of the picture that the networks see."""

    crop: Box  # the zoom-in crop, in scene coordinates
    box: Box  # the expanded target box, in scene coordinates; inside the crop, unless that is a tile
    aspect: tuple[int, int] = (1, 1)  # width and height of the networks' picture, or in proportion to them

    @property
    def crop_size(self) -> tuple[int, int]:
        """(width, height) of the crop before padding."""
        return self.crop.width, self.crop.height

    @property
    def padding(self) -> Padding:
        """The padding that gives the crop the aspect ratio of the networks' picture."""
        return aspect_padding(*self.crop_size, self.aspect)

    @property
    def padded_size(self) -> tuple[int, int]:
        """(width, height) of the crop after padding."""
        left, top, right, bottom = self.padding
        return self.crop.width + left + right, self.crop.height + top + bottom


def zoom_in(
    target: NDArray[Any] | Box, size: tuple[int, int], ratios: Ratios, aspect: tuple[int, int] = (1, 1)
) -> Geometry:
    """Target box and zoom-in crop for a place in a scene of `size` (width, height).

    target: (H, W) mask, bool or 0/1, of which fewer than 10 pixels stand for the whole scene; or a box in
    scene coordinates, which is clipped to the scene and then treated like its filled mask, however small.
    aspect: of the networks' picture, see `Geometry`.
    """
    extent = box_extent(_clip(target, size)) if isinstance(target, Box) else mask_extent(target)
    box = expand(extent, ratios.box, size)
    crop = to_aspect(expand(box, ratios.crop, size), aspect, size)
    # Ratios near 1 and odd sides can cost the crop a column or row of the box, which the original fails on.
    return Geometry(crop.union(box), box, aspect)


def warn_of_enlargement(
    geometry: Geometry, picture_size: tuple[int, int], sharper: str = "a smaller place is sharper"
) -> None:
    """Warns where the networks' picture is enlarged so much that the result is soft.

    Args:
        geometry: of the place.
        picture_size: (height, width) of the networks' picture, in pixels.
        sharper: what to do about it.
    """
    height, width = picture_size
    scale = max(geometry.padded_size[0] / width, geometry.padded_size[1] / height)
    if scale > _MUCH_LARGER:
        crop = geometry.crop
        warn(
            f"the crop around the place has {crop.width} x {crop.height} pixels, but the model draws "
            f"{width} x {height}: enlarged {scale:.1f} times, it is soft; {sharper}"
        )


def _clip(box: Box, size: tuple[int, int]) -> Box:
    clipped = box.clip(size)
    if clipped.is_empty:
        raise InputError(f"the box {tuple(box)} has no pixel inside the scene of {size[0]}x{size[1]} pixels")
    return clipped
