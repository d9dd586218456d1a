"""Seeded pictures for tests: a scene, an object with transparency around it, and a placement of both."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from runtime.request import Placement

Pixels = NDArray[np.uint8]


def picture(height: int, width: int, seed: int = 0) -> Pixels:
    """Noise, (height, width, 3) RGB."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def cutout(size: int = 40, seed: int = 1) -> Pixels:
    """An object with transparency around it, (size, size, 4) RGBA."""
    rgba = np.dstack([picture(size, size, seed), np.zeros((size, size), np.uint8)])
    rgba[5:-5, 8:-8, 3] = 255
    return rgba


SCENE = picture(90, 120)
PLACEMENT = Placement(cutout(), box=(30, 20, 80, 70))
