"""Reads the version of AnyDoor Runtime."""

from __future__ import annotations


def version() -> str:
    """Returns the installed version, "0+unknown" in a clone that is not installed."""
    from importlib import metadata  # takes a while to import

    try:
        return metadata.version("anydoor-runtime")
    except metadata.PackageNotFoundError:
        return "0+unknown"
