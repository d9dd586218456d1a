"""Checks the defaults that a bundle will have, before it is built."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from engines.errors import AnyDoorError
from runtime.diffusion.ddim import LAST_TIMESTEP, exact_timesteps
from runtime.errors import InputError
from runtime.imaging.mask_levels import check_mask_level
from runtime.imaging.modes import check_mode
from runtime.imaging.paste_back import check_edge
from runtime.imaging.target import is_integer
from runtime.sampling.passes import check_refine, check_strength
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
    defaults = {**own, **given}
    try:
        check_defaults(defaults)
        for name, check in _CHECKS.items():
            if name in own or defaults.get(name) is not None:
                check(defaults[name])
    except InputError as error:
        raise AnyDoorError(f"the bundle would refuse every picture, by its defaults: {error}") from error


def _check_timesteps(timesteps: Any) -> None:
    if timesteps is None:
        return
    is_list = isinstance(timesteps, list | tuple)
    if not is_list or not all(is_integer(each) and 0 <= each <= LAST_TIMESTEP for each in timesteps):
        raise InputError(
            f"timesteps must be a list of whole numbers from 0 to {LAST_TIMESTEP}, not {timesteps!r}"
        )
    exact_timesteps(timesteps)


_CHECKS: Mapping[str, Callable[[Any], object]] = {
    "timesteps": _check_timesteps,
    "mode": check_mode,
    "edge": check_edge,
    "refine": check_refine,
    "strength": check_strength,
    "mask_level": check_mask_level,
}
"""Parameter -> its check, of those that `check_defaults` leaves to the request."""
