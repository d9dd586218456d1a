"""Checks the defaults that a bundle will have, before it is built."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from engines.errors import AnyDoorError
from runtime.errors import InputError
from runtime.validation import check_defaults


def check_build_defaults(system: str, given: Mapping[str, Any]) -> None:
    """Refuses defaults with which a bundle could not be opened, or would refuse every picture.

    Args:
        system: as in the manifest. One that lives outside of `runtime.systems` checks its defaults itself.
        given: parameter -> value, from the checkpoint and the command line.

    Raises:
        AnyDoorError: a value is invalid; names the parameter.
    """
    home = f"runtime.systems.{system}"
    own = getattr(import_module(home), "DEFAULTS", None) if find_spec(home) else None
    if own is None:
        return
    try:
        check_defaults({**own, **given})
    except InputError as error:
        raise AnyDoorError(f"the bundle would refuse every picture, by its defaults: {error}") from error
