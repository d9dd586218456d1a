"""Amounts of memory as people write them."""

from __future__ import annotations

import argparse

from runtime.errors import InputError

_UNITS = {"K": 10**3, "M": 10**6, "G": 10**9}


def parse_size(text: str) -> int:
    """`6G`, `1.5G`, `800M`, `64K` or a plain number as bytes; units are powers of 1000.

    Raises:
        InputError: it is not.
    """
    unit = _UNITS.get(text[-1:].upper(), 1)
    try:
        value = float(text[:-1] if unit > 1 else text) * unit
        if value >= 0:
            return int(value)
    except (ValueError, OverflowError):
        pass
    raise InputError(f"'{text}' is not a size: a number is expected, like 6G or 800M")


def size_text(size: int) -> str:
    """Writes bytes as `parse_size` reads them, to one decimal: 33554432 is '33.6M'."""
    for unit, factor in reversed(_UNITS.items()):
        if size >= factor:
            return f"{round(size / factor, 1):g}{unit}"
    return str(size)


def size_flag(text: str) -> int:
    """`parse_size` as the type of an argument of `argparse`, which keeps the sentence of this error only."""
    try:
        return parse_size(text)
    except InputError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
