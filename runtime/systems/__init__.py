"""Implements compositing systems, one module each: from a request to the networks' inputs, and back."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from importlib.util import find_spec
from typing import TYPE_CHECKING

from engines.errors import BundleError

if TYPE_CHECKING:
    from runtime.systems.system import Model, System

_REGISTERED: dict[str, Callable[[Model], System]] = {}


def register_system(name: str, create: Callable[[Model], System]) -> None:
    """Adds a system that lives elsewhere; those in this folder need no registration.

    Args:
        name: as in the manifest of its bundles.
        create: model -> the system at work with it.
    """
    _REGISTERED[name] = create


def open_system(name: str, model: Model) -> System:
    """Returns the system of a bundle.

    Args:
        name: as in the manifest.
        model: the bundle and what runs it.

    Raises:
        BundleError: this version does not have that system, or a graph that the system needs is missing.
    """
    if name in _REGISTERED:
        return _REGISTERED[name](model)
    home = f"{__name__}.{name}"
    module = importlib.import_module(home) if name.isidentifier() and find_spec(home) else None
    # the folder also holds modules that are no systems
    create: Callable[[Model], System] | None = getattr(module, "create", None)
    if create is None:
        raise BundleError(
            f"the bundle at '{model.bundle.path}' is for the system '{name}', which this version does not "
            "have: upgrade anydoor-runtime"
        )
    return create(model)
