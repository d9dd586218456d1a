"""Guesses the background behind an object without a network: smooth, and good where most of it is covered
again."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from runtime.imaging.boxes import Box, smallest_box

_BAND = 1 << 18
"""Pixels of a scene that are looked at together: what is known of each takes 100 bytes."""


def guess_background(scene: NDArray[np.uint8], hole: Box | NDArray[np.bool_]) -> NDArray[np.uint8]:
    """Fills a hole: each pixel is the mean of the nearest ones outside in its row and column, by inverse
    distance.

    A pixel that has none gets the mean of what is around the hole. A hole of the whole scene stays as it is.

    Args:
        scene: (H, W, C).
        hole: a box inside the scene, or a mask (H, W).
    """
    mask = np.zeros(scene.shape[:2], np.bool_)
    if isinstance(hole, Box):
        mask[hole.slices] = True
    else:
        mask |= hole
    result: NDArray[np.uint8] = scene.copy()
    if 0 < np.count_nonzero(mask) < mask.size:
        # the nearest pixels outside lie in the hole's box or beside it
        part = smallest_box(mask).shrink(-1).clip((scene.shape[1], scene.shape[0])).slices
        result[part] = _guessed(scene[part], mask[part])
    return result


def _guessed(scene: NDArray[np.uint8], mask: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """Fills the hole (H, W) of a scene (H, W, C); it is neither empty nor all of it."""
    result: NDArray[np.uint8] = scene.copy()
    above_below = [_nearest(mask, 0, backwards) for backwards in (False, True)]
    channels = scene.shape[2]
    alone, seen, count = np.zeros_like(mask), np.zeros(channels), 0
    height = max(_BAND // scene.shape[1], 1)
    for top in range(0, len(mask), height):
        band = slice(top, top + height)
        rows, columns = np.nonzero(mask[band])
        total, colours = np.zeros((len(rows), 1)), np.zeros((len(rows), channels))
        beside = [_nearest(mask[band], 1, backwards) for backwards in (False, True)]
        for axis, nearest in [(1, each) for each in beside] + [(0, each[band]) for each in above_below]:
            index = nearest[rows, columns]
            own = columns if axis == 1 else rows + top
            exists = (index >= 0) & (index < scene.shape[axis])
            weight = np.where(exists, 1 / np.maximum(np.abs(own - index), 1), 0.0)[:, None]
            there = np.where(exists, index, own)
            total += weight
            colours += weight * (scene[rows + top, there] if axis == 1 else scene[there, columns])
        known = total[:, 0] > 0
        guessed = colours[known] / total[known]
        result[band][rows[known], columns[known]] = np.rint(guessed).astype(np.uint8)
        seen, count = seen + guessed.sum(axis=0), count + len(guessed)
        alone[band][rows[~known], columns[~known]] = True
    np.copyto(result, np.rint(seen / count).astype(np.uint8), where=alone[..., None])
    return result


def _nearest(mask: NDArray[np.bool_], axis: int, backwards: bool) -> NDArray[np.int32]:
    """Returns index along an axis of the last pixel outside a mask, from one end; out of range if there is
    none."""
    length = mask.shape[axis]
    along = np.arange(length, dtype=np.int32).reshape((-1, 1) if axis == 0 else (1, -1))
    found = np.where(mask, np.int32(length if backwards else -1), along)
    if backwards:
        flipped = np.flip(found, axis)
        np.minimum.accumulate(flipped, axis, out=flipped)
    else:
        np.maximum.accumulate(found, axis, out=found)
    return found
