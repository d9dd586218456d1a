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
        mask: (..., R, R), the place of the object in the hint.
        cells: per side of the latent.
        tokens: per side of the reference.

    Returns:
        (..., cells, cells, 2) row and column in tokens from the reference's upper left corner, nan where it
        is not known: outside the mask, and everywhere if the mask is not a box that lies wholly inside the
        picture.
    """
    side = mask.shape[-1]
    covered = [np.asarray(mask.any(axis)) for axis in (-1, -2)]  # rows, then columns
    starts = [axis.argmax(-1)[..., None] for axis in covered]
    ends = [side - axis[..., ::-1].argmax(-1)[..., None] for axis in covered]
    sides = [end - start for start, end in zip(starts, ends, strict=True)]
    is_box = mask.sum((-2, -1))[..., None] == sides[0] * sides[1]
    object_side = np.maximum(*sides) / _BOX_RATIO
    middles = (np.arange(cells) + 0.5) * side / cells
    places, known = [], []
    for start, end in zip(starts, ends, strict=True):
        places.append((middles - (start + end) / 2) / object_side * tokens / _REFERENCE_RATIO + tokens / 2)
        known.append(is_box & (start > 0) & (end < side) & (middles > start) & (middles < end))
    everywhere = np.stack(np.broadcast_arrays(places[0][..., :, None], places[1][..., None, :]), -1)
    inside = known[0][..., :, None] & known[1][..., None, :]
    return np.where(inside[..., None], everywhere, np.nan).astype(np.float32)
