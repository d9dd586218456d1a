"""The high-frequency map: the edges of the reference in its own colours, AnyDoor's carrier of fine detail."""

from __future__ import annotations

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from runtime.imaging.resize import resize_linear

_WORKING_SIZE = (256, 256)
_EROSION = 9  # a 5x5 erosion applied twice removes what one 9x9 erosion removes
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
    edges = _edge_strength(image).max(axis=-1)
    edges[~inside | (edges < _THRESHOLD)] = 0
    colours = edges[..., None].astype(np.float32) / 255 * image.astype(np.float32)
    return resize_linear(colours.astype(np.uint8), (width, height))


def _edge_strength(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Mean of the horizontal and the vertical 3x3 Sobel response, each saturated to 0..255."""
    padded = np.pad(image.astype(np.int16), ((1, 1), (1, 1), (0, 0)), mode="reflect")
    rows = padded[:-2] + 2 * padded[1:-1] + padded[2:]
    columns = padded[:, :-2] + 2 * padded[:, 1:-1] + padded[:, 2:]
    horizontal = np.abs(rows[:, 2:] - rows[:, :-2]).clip(max=255)
    vertical = np.abs(columns[2:] - columns[:-2]).clip(max=255)
    # OpenCV rounds halves to the even neighbour, as NumPy does.
    mean = np.rint((horizontal + vertical) * 0.5)
    return np.asarray(mean, np.uint8)


def _erode(inside: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Erosion by a 9x9 square, for which everything beyond the picture counts as inside."""
    padded = np.pad(inside, _EROSION // 2, constant_values=True)
    rows = sliding_window_view(padded, _EROSION, axis=0).all(axis=-1)
    return np.asarray(sliding_window_view(rows, _EROSION, axis=1).all(axis=-1))
