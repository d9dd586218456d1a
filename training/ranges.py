"""Checks the ranges of numbers in a recipe."""

from __future__ import annotations

import math

from runtime.errors import InputError


def check_shares(settings: object, *names: str) -> None:
    """Refuses probabilities, or shares, that are none.

    Raises:
        InputError: names the first.
    """
    for name in names:
        if not 0 <= (value := getattr(settings, name)) <= 1:
            raise InputError(f"{name} is {value:g}; expected 0 to 1")


def check_least(settings: object, least: int, *names: str) -> None:
    """Refuses numbers that are too small, infinite, or none.

    Raises:
        InputError: names the first.
    """
    for name in names:
        if not least <= (value := getattr(settings, name)) < math.inf:
            raise InputError(f"{name} is {value:g}; expected at least {least}")
