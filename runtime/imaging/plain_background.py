"""Cuts objects out of plain backgrounds, by a rule."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from runtime.imaging.specks import large_pieces, reached_from_border

_RING = 4
"""Width of the border that is looked at, in pixels."""
_PLAIN = 8.0
"""Largest standard deviation of its levels, in each channel."""
_LIKE = 24
"""Levels by which the background may differ from the border's median, in each channel."""
_SMALLEST = 0.01
"""Least size of a piece relative to the largest; smaller pieces are shades of the background."""


def cut_from_plain(rgb: NDArray[np.uint8]) -> NDArray[np.bool_] | None:
    """Finds the objects, (H, W); returns None if the background is not plain. The mask may be empty.

    The border is plain if its levels hardly differ. What is like it and connected to it is background. So
    holes through an object belong to it.

    Args:
        rgb: (H, W, 3).
    """
    ring = np.concatenate(
        [
            side.reshape(-1, 3)
            for side in (rgb[:_RING], rgb[-_RING:], rgb[_RING:-_RING, :_RING], rgb[_RING:-_RING, -_RING:])
        ]
    )
    if (ring.std(axis=0) > _PLAIN).any():
        return None
    colour = np.median(ring, axis=0).astype(np.int16)
    like = np.ones(rgb.shape[:2], np.bool_)
    for channel in range(3):
        like &= np.abs(rgb[..., channel].astype(np.int16) - colour[channel]) <= _LIKE
    return large_pieces(~reached_from_border(like), _SMALLEST)
