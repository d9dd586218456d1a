"""Which version of this package runs."""

from __future__ import annotations

UNKNOWN = "0+unknown"
"""The version of a clone that is not installed."""


def version() -> str:
    """The version that is installed, like "0.1.0", or "0+unknown"."""
    # takes longer to import than all of the command line
    from importlib.metadata import PackageNotFoundError
    from importlib.metadata import version as installed

    try:
        return installed("anydoor-runtime")
    except PackageNotFoundError:
        return UNKNOWN
