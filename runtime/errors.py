"""Refusals of the runtime; see `engines.errors` for the base class."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from engines.errors import AnyDoorError


class InputError(AnyDoorError, ValueError):
    """A picture, mask, box or parameter that cannot be used, in one sentence."""

    field: str = ""
    """Which part of the request it is, like "placements[0].box"; empty if no single one is to blame."""


@contextmanager
def in_field(name: str) -> Iterator[None]:
    """Lets refusals from inside say which field of the request they are about; may be nested."""
    try:
        yield
    except InputError as error:
        error.field = f"{name}.{error.field}" if error.field else name
        raise
