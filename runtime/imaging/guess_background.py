"""A guess of what is behind an object, without a network: smooth, and good where most of it is drawn over."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from runtime.imaging.boxes import Box

_DIRECTIONS = ((1, False), (1, True), (0, False), (0, True))
"""Axis, and whether to look along it backwards: left, right, up, down."""


def guess_background(scene: NDArray[np.uint8], hole: Box | NDArray[np.bool_]) -> NDArray[np.uint8]:
    """Fills a hole: each pixel is the mean of the nearest ones outside in its row and column, by inverse
    distance.

    A pixel that has none gets the mean of what is around the hole. A hole of the whole scene stays as it is.

    Args:
        scene: (H, W, 3).
        hole: a box inside the scene, or a mask (H, W).
    """
    mask = np.zeros(scene.shape[:2], np.bool_)
    if isinstance(hole, Box):
        mask[hole.slices] = True
    else:
        mask |= hole
    rows, columns = np.nonzero(mask)
    if not 0 < len(rows) < mask.size:
        unchanged: NDArray[np.uint8] = scene.copy()
        return unchanged
    total, colours = np.zeros((len(rows), 1)), np.zeros((len(rows), 3))
    for axis, backwards in _DIRECTIONS:
        nearest = _nearest(mask, axis, backwards)[rows, columns]
        own = columns if axis == 1 else rows
        exists = (nearest >= 0) & (nearest < mask.shape[axis])
        weight = np.where(exists, 1 / np.maximum(np.abs(own - nearest), 1), 0.0)[:, None]
        there = np.where(exists, nearest, own)
        seen = scene[rows, there] if axis == 1 else scene[there, columns]
        total += weight
        colours += weight * seen
    alone = total[:, 0] == 0
    if alone.any():
        colours[alone], total[alone] = (colours[~alone] / total[~alone]).mean(axis=0), 1.0
    result: NDArray[np.uint8] = scene.copy()
    result[rows, columns] = np.rint(colours / total).astype(np.uint8)
    return result


def _nearest(mask: NDArray[np.bool_], axis: int, backwards: bool) -> NDArray[np.intp]:
    """Index along an axis of the last pixel outside a mask, from one end; out of range if there is none."""
    length = mask.shape[axis]
    along = np.arange(length).reshape((-1, 1) if axis == 0 else (1, -1))
    if backwards:
        known = np.where(mask, length, along)
        return np.flip(np.minimum.accumulate(np.flip(known, axis), axis), axis)
    return np.maximum.accumulate(np.where(mask, -1, along), axis)
