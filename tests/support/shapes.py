"""Masks that the tests of pairs are made with."""

from __future__ import annotations

import numpy as np


def disc(size: int = 80, radius: float = 20.0, centre: float = 40.0) -> np.ndarray:  # type: ignore[type-arg]
    row, column = np.mgrid[:size, :size]
    return np.asarray(np.hypot(row - centre, column - centre) < radius)


def box_mask(side: int, rows: tuple[int, int], columns: tuple[int, int]) -> np.ndarray:
    mask = np.zeros((side, side), bool)
    mask[slice(*rows), slice(*columns)] = True
    return mask
