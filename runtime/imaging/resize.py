"""Resizes pictures as OpenCV's `cv2.resize`, which the original uses, in NumPy.

Linear interpolation here means two taps per axis at any scale, without antialiasing when shrinking.
Only the rows and columns that are needed are read, and padding is never built: a large picture costs
little more than its result.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from runtime.imaging.boxes import Box, Padding

_Scalar = TypeVar("_Scalar", bound=np.generic)

_COEFFICIENT_SCALE = np.float32(1 << 11)
_NO_PADDING = Padding()
_BLOCK_VALUES = 1 << 16  # a block of result rows this large stays in the processor's cache


class _Taps(NamedTuple):
    """The two neighbours of each result pixel along one axis, and how far it lies between them."""

    low: NDArray[np.intp]
    high: NDArray[np.intp]
    fraction: NDArray[np.floating[Any]]


def resize_linear(
    array: NDArray[_Scalar],
    size: tuple[int, int],
    padding: Padding = _NO_PADDING,
    fill: float = 0,
    window: Box | None = None,
) -> NDArray[_Scalar]:
    """Equals `cv2.resize(array, size, interpolation=cv2.INTER_LINEAR)`.

    uint8 is bit-exact (fixed-point arithmetic with 11-bit coefficients). float32 and float64 follow
    OpenCV's x86 builds, which compute coordinates in double precision: equal to the last few bits.

    array: (H, W) or (H, W, C), uint8, float32 or float64.
    size: (width, height) of the result.
    padding, fill: resize as if the array had been padded with this value first.
    window: compute only this part of the result.
    """
    width, height = size
    window = window or Box(0, 0, width, height)
    padded_width, padded_height = _padded_size(array, padding)
    fixed_point = array.dtype == np.uint8
    if fixed_point and (padded_width, padded_height) == (2 * width, 2 * height):
        return _halve(array, size, padding, fill)[window.slices]

    taps = _fixed_point_taps if fixed_point else _float_taps
    y_part, x_part = window.slices
    x, y = taps(padded_width, width, x_part), taps(padded_height, height, y_part)
    rows, position = np.unique([y.low, y.high], return_inverse=True)
    low_row, high_row = position.reshape(2, -1)
    y = _Taps(low_row, high_row, y.fraction)
    strip = _take(array, rows, 0, padding.top, fill)
    low = _take(strip, x.low, 1, padding.left, fill)
    high = _take(strip, x.high, 1, padding.left, fill)
    if fixed_point:
        x_fraction = np.where(x.low == x.high, np.float32(0), x.fraction)
        return _interpolate_fixed_point(low, high, x_fraction, y)
    return _interpolate_float(low, high, x.fraction, y)


def resize_nearest(
    array: NDArray[_Scalar], size: tuple[int, int], padding: Padding = _NO_PADDING, fill: float = 0
) -> NDArray[_Scalar]:
    """Equals `cv2.resize(array, size, interpolation=cv2.INTER_NEAREST)`, for any dtype.

    array: (H, W) or (H, W, C). size: (width, height) of the result.
    padding, fill: resize as if the array had been padded with this value first.
    """
    width, height = size
    padded_width, padded_height = _padded_size(array, padding)
    rows = _take(array, _nearest(padded_height, height), 0, padding.top, fill)
    return _take(rows, _nearest(padded_width, width), 1, padding.left, fill)


def _padded_size(array: NDArray[Any], padding: Padding) -> tuple[int, int]:
    height, width = array.shape[:2]
    return width + padding.left + padding.right, height + padding.top + padding.bottom


def _scale(length: int, new_length: int) -> float:
    # The inverse of the inverse: OpenCV rounds twice, which moves a nearest neighbour now and then.
    return 1.0 / (new_length / length)


def _nearest(length: int, new_length: int) -> NDArray[np.intp]:
    index = np.floor(np.arange(new_length) * _scale(length, new_length))
    return np.asarray(np.minimum(index, length - 1), np.intp)


def _float_taps(length: int, new_length: int, part: slice) -> _Taps:
    # of a part alone: what a place in a request asks for may be far larger than any picture
    position = (np.arange(part.start, part.stop) + 0.5) * (length / new_length) - 0.5
    position = position.clip(0, length - 1)
    low = np.floor(position).astype(np.intp)
    return _Taps(low, np.minimum(low + 1, length - 1), position - low)


def _fixed_point_taps(length: int, new_length: int, part: slice) -> _Taps:
    position = ((np.arange(part.start, part.stop) + 0.5) * _scale(length, new_length) - 0.5).astype(
        np.float32
    )
    low = np.floor(position)
    # At the border both taps become the same pixel but rows keep their weights: OpenCV truncates each
    # vertical product by itself, so a row with weights 0.3 + 0.7 is not a row with weight 1.
    first, second = (np.clip(low + tap, 0, length - 1).astype(np.intp) for tap in (0, 1))
    return _Taps(first, second, position - low)


def _take(
    array: NDArray[_Scalar], index: NDArray[np.intp], axis: int, before: int, fill: float
) -> NDArray[_Scalar]:
    """Returns rows (axis 0) or columns (axis 1) of the array as padded by `before` and enough behind."""
    inner = index - before
    last = array.shape[axis] - 1
    taken = np.take(array, inner.clip(0, last), axis=axis)
    outside = (inner < 0) | (inner > last)
    if outside.any():
        taken[(slice(None),) * axis + (outside,)] = fill
    return taken


def _along_columns(weights: NDArray[_Scalar], ndim: int) -> NDArray[_Scalar]:
    return weights.reshape((1, -1) + (1,) * (ndim - 2))


def _along_rows(weights: NDArray[_Scalar], ndim: int) -> NDArray[_Scalar]:
    return weights.reshape((-1,) + (1,) * (ndim - 1))


def _interpolate_float(
    left: NDArray[Any], right: NDArray[Any], x_fraction: NDArray[np.floating[Any]], y: _Taps
) -> NDArray[Any]:
    dtype, ndim = left.dtype, left.ndim
    strip = left + (right - left) * _along_columns(x_fraction.astype(dtype), ndim)
    fraction = _along_rows(y.fraction.astype(dtype), ndim)
    result = np.empty((len(y.low), *left.shape[1:]), dtype)
    for block in _blocks(result):
        above = strip[y.low[block]]
        below = strip[y.high[block]]
        below -= above
        below *= fraction[block]
        np.add(above, below, out=result[block])
    return result


def _interpolate_fixed_point(
    left: NDArray[Any], right: NDArray[Any], x_fraction: NDArray[np.floating[Any]], y: _Taps
) -> NDArray[Any]:
    ndim = left.ndim
    # a row's values in one axis: NumPy is slow where the last axis is as short as a pixel
    left_weight, right_weight = (w.repeat(math.prod(left.shape[2:])) for w in _coefficients(x_fraction))
    strip = left.reshape(len(left), -1) * left_weight
    strip += right.reshape(len(right), -1) * right_weight
    strip >>= 4
    strip = strip.reshape(left.shape)
    upper_weight, lower_weight = (_along_rows(w, ndim) for w in _coefficients(y.fraction))
    result = np.empty((len(y.low), *left.shape[1:]), np.uint8)
    for block in _blocks(result):
        above = strip[y.low[block]]
        above *= upper_weight[block]
        above >>= 16
        below = strip[y.high[block]]
        below *= lower_weight[block]
        below >>= 16
        above += below
        above += 2
        above >>= 2
        result[block] = above
    return result


def _coefficients(fraction: NDArray[np.floating[Any]]) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    low, high = (np.rint(w * _COEFFICIENT_SCALE).astype(np.int32) for w in (1 - fraction, fraction))
    return low, high


def _blocks(result: NDArray[Any]) -> list[slice]:
    step = max(1, _BLOCK_VALUES // result[0].size)
    return [slice(start, start + step) for start in range(0, len(result), step)]


def _halve(array: NDArray[Any], size: tuple[int, int], padding: Padding, fill: float) -> NDArray[Any]:
    """Returns the mean of 2x2 pixels: what OpenCV computes for INTER_LINEAR when both axes are exactly
    halved."""
    width, height = size
    rows = _take(array, np.arange(2 * height), 0, padding.top, fill)
    padded = _take(rows, np.arange(2 * width), 1, padding.left, fill)
    pairs = padded[0::2].astype(np.uint16) + padded[1::2]
    total = pairs[:, 0::2] + pairs[:, 1::2]
    return np.asarray((total + 2) >> 2, np.uint8)
