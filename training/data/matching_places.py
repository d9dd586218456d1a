"""Which part of the reference belongs to a cell of the latent, if both show the object from the same side."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_BOX_RATIO = 1.1
"""`PairRules.box_ratio`."""
_REFERENCE_RATIO = 1.2
"""The middle of the example model's `PairRules.reference_ratios`."""


def matching_places(mask: NDArray[np.bool_], cells: int, tokens: int) -> NDArray[np.float32]:
    """Computes where in the reference is what a cell of the latent shows.

    Args:
        mask: (R, R), the place of the object in the hint.
        cells: per side of the latent.
        tokens: per side of the reference.

    Returns:
        (cells, cells, 2) row and column in tokens from the reference's upper left corner, nan where it is not
        known: outside the mask, and everywhere if the mask is not a box that lies wholly inside the picture.
    """
    places = np.full((cells, cells, 2), np.nan, np.float32)
    rows, columns = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
    if not len(rows):
        return places
    side = len(mask)
    ends = [(int(axis[0]), int(axis[-1]) + 1) for axis in (rows, columns)]
    whole = mask.sum() == np.prod([end - start for start, end in ends])
    if not whole or any(start == 0 or end == side for start, end in ends):
        return places
    object_side = max(end - start for start, end in ends) / _BOX_RATIO
    middles = (np.arange(cells) + 0.5) * side / cells
    per_axis = [
        (middles - (start + end) / 2) / object_side * tokens / _REFERENCE_RATIO + tokens / 2
        for start, end in ends
    ]
    inside = [(middles > start) & (middles < end) for start, end in ends]
    known = np.ix_(*inside)
    places[..., 0][known] = per_axis[0][inside[0]][:, None]
    places[..., 1][known] = per_axis[1][inside[1]][None, :]
    return places
