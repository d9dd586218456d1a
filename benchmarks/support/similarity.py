"""How similar two pictures or tensors are: PSNR, SSIM, gradients, relative error."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.imaging.boxes import Box

Picture = NDArray[np.uint8]
Array = NDArray[np.float64]

_LUMINANCE = 0.299, 0.587, 0.114
_RADIUS, _SIGMA = 5, 1.5
_STABILISERS = (0.01 * 255) ** 2, (0.03 * 255) ** 2


def psnr(found: NDArray[Any], expected: NDArray[Any], peak: float) -> float:
    """Return the peak signal-to-noise ratio in dB, infinite if equal; `peak` is the largest value."""
    error = float(np.mean((found.astype(np.float64) - expected.astype(np.float64)) ** 2))
    return math.inf if error == 0 else 10 * math.log10(peak**2 / error)


def relative_error(found: NDArray[Any], expected: NDArray[Any]) -> float:
    """Return the norm of the difference over the norm of what was expected."""
    expected = expected.astype(np.float64)
    return float(np.linalg.norm(found.astype(np.float64) - expected) / np.linalg.norm(expected))


def region_psnr(found: Picture, expected: Picture, box: Box) -> float:
    """Return the PSNR in dB inside a box. Pictures: (H, W, 3) uint8."""
    return psnr(found[box.slices], expected[box.slices], peak=255)


def region_ssim(found: Picture, expected: Picture, box: Box) -> float:
    """Return the mean of `ssim_map` inside a box. Windows at its border include pixels outside of it.

    found, expected: (H, W, 3) uint8.
    """
    return float(ssim_map(found, expected)[box.slices].mean())


def ssim_map(found: Picture, expected: Picture) -> Array:
    """Compute the structural similarity around every pixel, per channel, at most 1.

    Source: Wang, Bovik, Sheikh and Simoncelli, "Image quality assessment", 2004: Gaussian windows of 11 x 11
    pixels and sigma 1.5, K1 = 0.01, K2 = 0.03. They compare luminance; here every channel counts, so that a
    wrong colour of the right lightness lowers the score. Pictures are mirrored at their borders.

    found, expected: (H, W, 3) uint8. Returns (H, W, 3).
    """
    assert found.shape == expected.shape
    x, y = found.astype(np.float64), expected.astype(np.float64)
    mean_x, mean_y = _windowed(x), _windowed(y)
    variance_x = _windowed(x * x) - mean_x**2
    variance_y = _windowed(y * y) - mean_y**2
    covariance = _windowed(x * y) - mean_x * mean_y
    c1, c2 = _STABILISERS
    likeness = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    result: Array = likeness / ((mean_x**2 + mean_y**2 + c1) * (variance_x + variance_y + c2))
    return result


def gradient_similarity(found: Picture, expected: Picture, mask: NDArray[np.bool_]) -> float:
    """Compare the luminance gradients of two pictures inside a mask: 1 if they are equal, 0 without likeness.

    Twice the inner product of both fields over the sum of their energies. Blur lowers it, because a weak
    gradient does not make up for a strong one; flat parts, which SSIM rewards, add nothing. The terms are
    those of gradient magnitude similarity (Xue, Zhang, Mou and Bovik, 2014), with directions, and summed
    before they are divided.

    found, expected: (H, W, 3) uint8. mask: (H, W).
    """
    ours, theirs = _gradients(found)[:, mask], _gradients(expected)[:, mask]
    energy = float((ours**2).sum() + (theirs**2).sum())
    return 1.0 if energy == 0 else 2 * float((ours * theirs).sum()) / energy


def _gradients(picture: Picture) -> Array:
    """Compute Prewitt's gradients (2, H, W) of the luminance, mirrored at the border."""
    luminance = np.pad(picture.astype(np.float64) @ _LUMINANCE, 1, mode="symmetric")
    across, down = luminance[:, 2:] - luminance[:, :-2], luminance[2:] - luminance[:-2]
    rows = across[:-2] + across[1:-1] + across[2:]
    columns = down[:, :-2] + down[:, 1:-1] + down[:, 2:]
    return np.stack([rows, columns]) / 3


def _windowed(values: Array) -> Array:
    """Compute the Gaussian mean around every pixel of (H, W, 3)."""
    offsets = np.arange(-_RADIUS, _RADIUS + 1)
    kernel = np.exp(-0.5 * (offsets / _SIGMA) ** 2)
    kernel /= kernel.sum()
    for axis in (0, 1):
        pads = [(0, 0)] * values.ndim
        pads[axis] = (_RADIUS, _RADIUS)
        padded, length = np.pad(values, pads, mode="symmetric"), values.shape[axis]
        values = sum(
            (
                weight * padded.take(np.arange(start, start + length), axis)
                for start, weight in enumerate(kernel)
            ),
            np.zeros_like(values),
        )
    return values
