"""Reads the pictures of an object in a placement: its reference, and more views of it."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from runtime.errors import in_field
from runtime.imaging.reference import load_reference
from runtime.request import Placement

CutOut = tuple[NDArray[np.uint8], NDArray[np.bool_]]
"""A picture (H, W, 3) sRGB, and where the object is in it, (H, W)."""


def load_views(placement: Placement, max_pixels: int) -> list[CutOut]:
    """Decodes the reference of a placement and its views, the reference first.

    Raises:
        InputError: one cannot be used, or nothing says where the object is in it.
    """
    assert placement.reference is not None
    specks = placement.keep_specks
    read = [load_reference(placement.reference, placement.reference_mask, max_pixels, specks)]
    for index, view in enumerate(placement.views or ()):
        with in_field(f"views[{index}]"):
            read.append(load_reference(view.picture, view.mask, max_pixels, specks, ("picture", "mask")))
    return read
