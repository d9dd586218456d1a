"""Refusals of the runtime; see `engines.errors` for the base class."""

from engines.errors import AnyDoorError


class InputError(AnyDoorError, ValueError):
    """A picture, mask, box or parameter that cannot be used, in one sentence."""
