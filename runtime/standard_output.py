"""Gives up a standard output whose reader has gone."""

from __future__ import annotations

import os
import sys
from contextlib import suppress


def forget_output() -> None:
    """Redirects standard output to the null device, or Python would try to flush it again at exit."""
    with suppress(OSError, ValueError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
