"""Parses numbers of command lines."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from typing import TypeVar

_Number = TypeVar("_Number", int, float)


def positive(kind: type[_Number]) -> Callable[[str], _Number]:
    """Return a parser of finite numbers above zero, for argparse's `type`."""

    def parse(text: str) -> _Number:
        number = kind(text)
        if not 0 < number < math.inf:
            raise argparse.ArgumentTypeError(f"'{text}' is not a finite number above 0")
        return number

    parse.__name__ = kind.__name__  # of argparse's "invalid int value"
    return parse
