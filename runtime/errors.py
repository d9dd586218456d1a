"""Defines the errors and warnings of the runtime; see `engines.errors` for the base class."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from engines.errors import AnyDoorError


class InputError(AnyDoorError, ValueError):
    """A picture, mask, box or parameter is invalid; the message is one sentence."""

    field: str = ""
    """The invalid part of the request, like "placements[0].box"; empty if it is not a single one."""


class MissingModelError(InputError):
    """A request needs a model that is not loaded; the message names the option that loads it."""


class InputWarning(UserWarning):
    """A picture or a mask was read in a way that its owner may not expect."""


_collected: ContextVar[list[str] | None] = ContextVar("collected", default=None)


@contextmanager
def in_field(name: str) -> Iterator[None]:
    """Adds the field of the request to errors raised inside; may be nested."""
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
    """Warns once that something was read in a way that its owner may not expect.

    Goes to the surrounding `collecting_warnings`; outside of one it becomes a Python warning, `InputWarning`.
    """
    found = _collected.get()
    if found is None:
        warnings.warn(text, InputWarning, stacklevel=3)
    elif text not in found:
        found.append(text)
