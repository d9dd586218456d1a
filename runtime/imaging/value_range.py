"""Converts values of more than 8 bits, or in floating point, to 8 bits."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.errors import InputError

_DEPTHS = (8, 10, 12, 14, 16)
"""Bits that cameras and scanners fill of the 16 that a file has for them."""
_OUTLIERS = 0.01
"""Share of the values that may lie outside of 0 to 1 in a picture of that range: what sharpening and resizing
overshoot."""


def to_8_bits(values: NDArray[Any], name: str) -> tuple[NDArray[np.uint8], str]:
    """Scales values to 0..255.

    Integers fill the fewest of 8, 10, 12, 14 and 16 bits that hold the largest of them. Numbers in floating
    point go from 0 to 1, else from 0 to 255, else from 0 to 65535, whichever holds the largest; those up to 1
    may be overshot by one value in a hundred, which is clipped.

    Args:
        values: integers or floating point, of any shape, at least one.
        name: what to call them in an error.

    Returns:
        The values as uint8 of the same shape, and what a caller should be told of the range, if anything.

    Raises:
        InputError: a value is negative, too large, or not a number.
    """
    low, high = values.min(), values.max()
    if values.dtype.kind == "f":
        return _from_floats(values, float(low), float(high), name)
    if low < 0 or high > 0xFFFF:
        raise InputError(f"{name} has values from {low} to {high}; integers from 0 to 65535 are read")
    bits = next(bits for bits in _DEPTHS if high < 2**bits)
    guess = f"has 16-bit values up to {high}, which are read as {bits}-bit" if 8 < bits < 16 else ""
    if bits == 8:
        return values.astype(np.uint8), guess
    scaled = values.astype(np.uint32)
    scaled *= 255
    scaled //= 2**bits - 1
    return scaled.astype(np.uint8), guess


def _from_floats(values: NDArray[Any], low: float, high: float, name: str) -> tuple[NDArray[np.uint8], str]:
    most = values.size * _OUTLIERS
    if not np.isfinite(low + high):
        raise InputError(f"{name} has values that are not finite numbers")
    if high > 0xFFFF or np.count_nonzero(values < 0) > most:
        raise InputError(
            f"{name} has values from {low:g} to {high:g}; floating point is read from 0 to 1, 0 to 255 or "
            "0 to 65535"
        )
    top = 1 if np.count_nonzero(values > 1) <= most else 255 if high <= 255 else 65535
    guess = (
        f"has values from {low:g} to {high:g}, which are read as 0 to {top}" if low < 0 or high > 1 else ""
    )
    scaled = values.astype(np.float32)
    scaled *= 255 / top
    scaled += 0.5 if top == 1 else 0
    return np.clip(scaled, 0, 255, out=scaled).astype(np.uint8), guess
