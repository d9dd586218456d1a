"""Finds the part of the reference that belongs to a cell of the latent, if both show the object from the same
side."""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

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
    covered = np.stack([np.asarray(mask.any(axis)) for axis in (-1, -2)], -2)  # rows, then columns
    starts, ends = covered.argmax(-1), side - covered[..., ::-1].argmax(-1)
    is_box = mask.sum((-2, -1)) == (ends - starts).prod(-1)
    starts *= is_box[..., None]  # as a box that is cut off
    return box_places(torch.from_numpy(starts), torch.from_numpy(ends), side, cells, tokens).numpy()


def box_places(starts: Tensor, ends: Tensor, side: int, cells: int, tokens: int) -> Tensor:
    """Computes `matching_places` of boxes where they lie.

    Args:
        starts, ends: (..., 2), the first row and column of each box, and those behind its last.
        side: of the hint, in pixels.
        cells, tokens: see `matching_places`.
    """
    start, end = starts[..., None].double(), ends[..., None].double()
    middles = (torch.arange(cells, device=start.device) + 0.5).double() * side / cells
    object_side = (end - start).amax(-2, keepdim=True) / _BOX_RATIO
    places = (middles - (start + end) / 2) / object_side * tokens / _REFERENCE_RATIO + tokens / 2
    known = (start > 0) & (end < side) & (middles > start) & (middles < end)
    rows, columns = places.unbind(-2)
    inside = known[..., 0, :, None] & known[..., 1, None, :]
    everywhere = [axis.expand(inside.shape) for axis in (rows[..., :, None], columns[..., None, :])]
    return torch.stack(everywhere, -1).masked_fill(~inside[..., None], math.nan).float()
