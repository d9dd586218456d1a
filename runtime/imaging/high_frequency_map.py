"""Computes the high-frequency map: the edges of the reference in its own colours, which carry fine detail."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from runtime.imaging.resize import resize_linear

_WORKING_SIZE = (256, 256)
_EROSION = 9  # a 5x5 erosion applied twice removes what one 9x9 erosion removes
_EROSION_STEPS = (1, 2, 4, 1)  # one after the other they look at 2, 4, 8 and 9 pixels
_THRESHOLD = 50  # weaker edges are dropped


def high_frequency_map(image: NDArray[np.uint8], mask: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Sobel edges inside the eroded mask, multiplied with the image. Source: data_utils.py, `sobel`.

    image: (H, W, 3) uint8 RGB.
    mask: (H, W) uint8, 0 outside to 255 inside; grey edges as resizing leaves them.
    Returns (H, W, 3) uint8 RGB, black where there is no edge.
    """
    height, width = image.shape[:2]
    image = resize_linear(image, _WORKING_SIZE)
    inside = _erode(resize_linear(mask / 255, _WORKING_SIZE) > 0.5)
    edges = _edge_strength(image)
    kept = inside & (edges >= _THRESHOLD)
    colours = np.zeros_like(image)
    colours[kept] = edges[kept, None].astype(np.float32) / 255 * image[kept].astype(np.float32)
    return resize_linear(colours, (width, height))


def _edge_strength(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Returns mean of the horizontal and the vertical 3x3 Sobel response, each saturated to 0..255, of that
    colour of each pixel (H, W) which has the strongest."""
    planes = np.ascontiguousarray(image.transpose(2, 0, 1), np.int16)
    padded = np.pad(planes, ((0, 0), (1, 1), (1, 1)), mode="reflect")
    rows = padded[:, :-2] + 2 * padded[:, 1:-1] + padded[:, 2:]
    columns = padded[..., :-2] + 2 * padded[..., 1:-1] + padded[..., 2:]
    horizontal = np.minimum(np.abs(rows[..., 2:] - rows[..., :-2]), 255)
    vertical = np.minimum(np.abs(columns[:, 2:] - columns[:, :-2]), 255)
    total = (horizontal + vertical).max(axis=0)
    # OpenCV rounds halves to the even neighbour
    return np.asarray((total + (total >> 1 & 1)) >> 1, np.uint8)


def _erode(inside: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Erosion by a 9x9 square, for which everything beyond the picture counts as inside."""
    eroded = np.pad(inside, _EROSION // 2, constant_values=True)
    for step in _EROSION_STEPS:
        eroded = eroded[step:] & eroded[:-step]
        eroded = eroded[:, step:] & eroded[:, :-step]
    return eroded
