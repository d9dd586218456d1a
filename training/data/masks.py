"""Operations on masks, (H, W) of bool: what pieces they have, and rough shapes as a user would draw them."""

from __future__ import annotations

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from scipy import ndimage

from runtime.imaging.boxes import Box, mask_extent

Mask = NDArray[np.bool_]

_MOST_CHANGES = 30
"""After so many a rough shape is taken as it is."""

_CHANGE_OF_SIZE = 0.7
"""Probability that a change of the shape grows or shrinks it."""

_MOSTLY_SMALLER, _MOSTLY_LARGER = 0.1, 0.9
"""Share of growing among the changes of size of one shape. Whoever draws too large keeps drawing too large:
growing and shrinking would cancel each other out."""

_OTHER_CHANGE = 0.15
"""Probability of each other change: a coarser outline, and a patch that is filled or cleared."""


def largest_piece(mask: Mask) -> float:
    """Computes the share of a mask's area in its largest connected piece (by sides); 0 if it is empty."""
    pieces, _ = ndimage.label(mask)
    areas = np.bincount(pieces.ravel())[1:]
    return float(areas.max() / areas.sum()) if len(areas) else 0.0


def shrink(mask: Mask, rim: int) -> Mask:
    """Erodes a mask by `rim` pixels; what lies beyond the picture does not count as outside."""
    inner: Mask = ndimage.minimum_filter(mask, 2 * rim + 1, mode="constant", cval=1)
    return inner


def grow(mask: Mask, height: int, width: int) -> Mask:
    """Dilates a mask by a rectangle."""
    larger: Mask = ndimage.maximum_filter(mask, (height, width), mode="constant", cval=0)
    return larger


def perturb_mask(mask: Mask, overlap: float, rng: Generator) -> Mask:
    """Makes a hand-drawn-like version of a mask: grown, shrunk and coarsened until it overlaps only so much.

    Section 3.3 simulates user shapes so. Stops at the first change whose intersection over union with the
    mask is below `overlap`, at the latest after 30.

    Args:
        mask: (H, W).
        overlap: 0..1.
        rng: source of randomness.

    Returns:
        (H, W), never empty where the mask is not.
    """
    box = mask_extent(mask)
    reach = max(2, max(box.width, box.height) // 10)
    growing = _CHANGE_OF_SIZE * rng.choice([_MOSTLY_SMALLER, _MOSTLY_LARGER])
    probabilities = [growing, _CHANGE_OF_SIZE - growing, _OTHER_CHANGE, _OTHER_CHANGE]
    rough, changed = mask, mask
    for _ in range(_MOST_CHANGES):
        height, width = (int(rng.integers(1, reach + 1)) for _ in range(2))
        operation = rng.choice(["grow", "shrink", "coarsen", "patch"], p=probabilities)
        if operation == "grow":
            changed = grow(rough, height, width)
        elif operation == "shrink":
            changed = np.logical_not(grow(~rough, height, width)).astype(bool)
        elif operation == "coarsen":
            changed = _coarsen(rough, max(height, width))
        else:
            changed = _patch(rough, box, reach, rng)
        if not changed.any():
            continue
        rough = changed
        if (rough & mask).sum() / max((rough | mask).sum(), 1) < overlap:
            break
    return rough


def _coarsen(mask: Mask, cell: int) -> Mask:
    """Returns the mask as seen on a grid of cells: each takes the value of its middle."""
    rows, columns = (np.minimum(np.arange(n) // cell * cell + cell // 2, n - 1) for n in mask.shape)
    coarse: Mask = mask[rows][:, columns]
    return coarse


def _patch(mask: Mask, box: Box, reach: int, rng: Generator) -> Mask:
    """Sets or clears a small rectangle somewhere in the object's box."""
    patched: Mask = mask.copy()
    x, y = int(rng.integers(box.x0, box.x1 + 1)), int(rng.integers(box.y0, box.y1 + 1))
    width, height = (int(rng.integers(1, 2 * reach + 1)) for _ in range(2))
    patched[y : y + height, x : x + width] = bool(rng.random() < 0.5)
    return patched
