"""Checks clicks on a picture, which mark points on and off the object."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from runtime.errors import InputError
from runtime.imaging.target import is_integer

MAX_CLICKS = 30
_LISTS = Sequence, np.ndarray


class Click(NamedTuple):
    """A pixel of a picture, upright and counted from its top left corner."""

    x: int
    y: int
    inside: bool = True
    """Whether the object is there; False says that it is not."""


def check_clicks(clicks: Sequence[Sequence[int]]) -> list[Click]:
    """Clicks of (x, y), or (x, y, whether the object is there).

    Raises:
        InputError: one is none, there are too many, or none is on the object.
    """
    checked = []
    for click in clicks if isinstance(clicks, _LISTS) else [clicks]:
        whole = isinstance(click, _LISTS) and len(click) in (2, 3) and all(map(is_integer, click[:2]))
        if not whole or not all(isinstance(inside, bool) for inside in click[2:]):
            raise InputError(f"a click must be (x, y) or (x, y, on_object) in whole pixels, not {click!r}")
        checked.append(Click(int(click[0]), int(click[1]), *map(bool, click[2:])))
    if not any(click.inside for click in checked):
        raise InputError("no click is on the object: give at least one that is")
    if len(checked) > MAX_CLICKS:
        raise InputError(f"{len(checked)} clicks are given; at most {MAX_CLICKS} are used")
    return checked


def require_inside(clicks: Sequence[Click], size: tuple[int, int], name: str) -> None:
    """Refuses clicks beside a picture of `size` (width, height).

    Raises:
        InputError: says which click it is.
    """
    for click in clicks:
        if not (0 <= click.x < size[0] and 0 <= click.y < size[1]):
            raise InputError(
                f"the click {click.x},{click.y} lies outside {name}, which has {size[0]} x {size[1]} pixels"
            )
