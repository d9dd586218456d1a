"""Refusals and warnings of the runtime; see `engines.errors` for the base class."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from engines.errors import AnyDoorError


class InputError(AnyDoorError, ValueError):
    """A picture, mask, box or parameter that cannot be used, in one sentence."""

    field: str = ""
    """Which part of the request it is, like "placements[0].box"; empty if no single one is to blame."""


class MissingModelError(InputError):
    """A request that needs a model which was not loaded; names the option that loads it."""


class InputWarning(UserWarning):
    """That a picture or a mask was read in a way its owner may not expect, in one sentence."""


_collected: ContextVar[list[str] | None] = ContextVar("collected", default=None)


@contextmanager
def in_field(name: str) -> Iterator[None]:
    """Lets refusals from inside say which field of the request they are about; may be nested."""
    try:
        yield
    except InputError as error:
        error.field = f"{name}.{error.field}" if error.field else name
        raise


@contextmanager
def collecting_warnings() -> Iterator[list[str]]:
    """Yields a list that `warn` fills while the block runs in this thread."""
    found: list[str] = []
    token = _collected.set(found)
    try:
        yield found
    finally:
        _collected.reset(token)


def warn(text: str) -> None:
    """Says once that something was read in a way its owner may not expect.

    Goes to the surrounding `collecting_warnings`; outside of one it becomes an `InputWarning` of Python's.
    """
    found = _collected.get()
    if found is None:
        warnings.warn(text, InputWarning, stacklevel=3)
    elif text not in found:
        found.append(text)
