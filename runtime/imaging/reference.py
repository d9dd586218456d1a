"""Prepares the reference: reads it, removes its background, centres it in a square and scales it down."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.errors import InputError, in_field, warn
from runtime.imaging.boxes import Padding, bounding_box, expansion_padding, smallest_box, square_padding
from runtime.imaging.decoding import MAX_PIXELS
from runtime.imaging.high_frequency_map import high_frequency_map
from runtime.imaging.masks import (
    MASK_THRESHOLD,
    MaskedPicture,
    check_area,
    load_mask,
    mask_from_alpha,
    values_of,
)
from runtime.imaging.pictures import load_picture, seen
from runtime.imaging.resize import resize_linear
from runtime.imaging.sources import PictureLike
from runtime.imaging.specks import without_specks

WHITE = 255
BACKGROUNDS: Mapping[str, int] = {"white": WHITE, "black": 0}
"""What is around the object in a reference: its name in a bundle -> grey level."""
_FEW_PIXELS = 128
"""Least length of an object's longer side without a warning; the ID encoder takes 224."""


@dataclass(frozen=True, eq=False)
class PreparedReference:
    """A reference ready for the ID encoder and for the collage; S is its size, 224 unless asked otherwise."""

    image: NDArray[np.uint8]  # (S, S, 3) RGB on its background; the ID encoder takes image / 255
    mask: NDArray[np.uint8]  # (S, S), 0 outside to 255 inside, grey at the edges

    @property
    def nbytes(self) -> int:
        """Its memory, with the map."""
        return 2 * self.image.nbytes + self.mask.nbytes

    @cached_property
    def high_frequency_map(self) -> NDArray[np.uint8]:
        """(S, S, 3) uint8 RGB, computed when first asked for."""
        return high_frequency_map(self.image, self.mask)


def load_reference(
    source: PictureLike,
    mask: PictureLike | None,
    max_pixels: int = MAX_PIXELS,
    keep_specks: bool = False,
    fields: tuple[str, str] = ("reference", "reference_mask"),
) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """Decodes the picture of an object, and where the object is in it.

    Args:
        source: the picture.
        mask: where the object is; the picture's opaque part if None.
        max_pixels: of each picture.
        keep_specks: whether pixels far from the object belong to it; see `runtime.imaging.specks`.
        fields: what a request calls the picture, and the mask.

    Returns:
        (H, W, 3) uint8 sRGB and the mask (H, W). What a mask marks is on white where it is transparent; of
        the opaque part, the colours are the file's, as in the original.

    Raises:
        InputError: a picture cannot be used, or nothing says where the object is.
    """
    with in_field(fields[0]):
        picture = load_picture(source, "the reference", max_pixels)
    with in_field(fields[1]):
        if mask is not None:
            name = "the reference mask"
            of = MaskedPicture("the reference", picture.rgb.shape, picture.orientation)
            inside = load_mask(mask, name, max_pixels, of)
        elif picture.alpha is not None:
            name = "the reference's opaque part"
            inside = mask_from_alpha(picture.alpha)
            rule = f"inside is where the opacity is above {MASK_THRESHOLD}, and {values_of(picture.alpha)}"
            check_area(inside, name, f"{rule}; or give a reference mask")
        else:
            raise InputError(
                "the reference has no transparency that shows the object: "
                "give a reference mask, or auto to have the object found"
            )
        if not keep_specks:
            inside = without_specks(inside, name)
    box = smallest_box(inside)
    if max(box.width, box.height) < _FEW_PIXELS:
        warn(
            f"the object has {box.width} x {box.height} pixels in the reference: with fewer than "
            f"{_FEW_PIXELS} details are invented; use a larger picture of it"
        )
    return picture.rgb if mask is None else seen(picture), inside


def prepare_reference(
    image: NDArray[np.uint8],
    mask: NDArray[Any],
    expand_ratio: float = 1.2,
    size: int = 224,
    background: int = WHITE,
) -> PreparedReference:
    """Cuts the object out, puts it on white or `background`, leaves room around it and makes it a square.

    Source: run_inference.py, `process_pairs` (expand_ratio 1.2); run_gradio_demo.py and the training data
    draw the ratio from 1.1, 1.2, 1.3, 1.4.

    image: (H, W, 3) uint8 RGB. mask: (H, W), bool or 0/1; fewer than 10 pixels count as "everything is
    the object" for the crop. expand_ratio: at least 1.
    """
    assert image.shape[:2] == mask.shape
    crop = bounding_box(mask).slices
    inside = mask[crop].astype(bool, copy=False)
    alone = np.where(inside[..., None], image[crop], np.uint8(background))
    padding = _padding(inside.shape[1], inside.shape[0], expand_ratio)
    return PreparedReference(
        resize_linear(alone, (size, size), padding, background),
        resize_linear(inside * np.uint8(255), (size, size), padding),
    )


def square_side(mask: NDArray[np.bool_], expand_ratio: float) -> int:
    """Computes the side of the square that `prepare_reference` makes small, in pixels of the picture."""
    crop = bounding_box(mask)
    padding = _padding(crop.width, crop.height, expand_ratio)
    return padding.left + crop.width + padding.right


def _padding(width: int, height: int, expand_ratio: float) -> Padding:
    """Room around the object first, then the square: the two paddings round separately."""
    room = expansion_padding(width, height, expand_ratio)
    rest = square_padding(room.left + width + room.right, room.top + height + room.bottom)
    return Padding(*(a + b for a, b in zip(room, rest, strict=True)))
