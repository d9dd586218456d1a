"""Puts an object from one picture into another.

from runtime import Compositor, Placement

compositor = Compositor.load("build/engines/anydoor")
image = compositor.composite("desk.jpg", Placement("cup.png", box=(80, 60, 300, 260)), seed=7)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from engines.errors import AnyDoorError, BackendError, BundleError
    from engines.options import EngineOptions
    from runtime.compositor import Compositor
    from runtime.errors import InputError
    from runtime.request import Placement, Request, Sampling, View
    from runtime.result import Composite
    from runtime.segmentation import Segmenter

_HOMES = {
    "AnyDoorError": "engines.errors",
    "BackendError": "engines.errors",
    "BundleError": "engines.errors",
    "Composite": "runtime.result",
    "Compositor": "runtime.compositor",
    "EngineOptions": "engines.options",
    "InputError": "runtime.errors",
    "Placement": "runtime.request",
    "Request": "runtime.request",
    "Sampling": "runtime.request",
    "Segmenter": "runtime.segmentation",
    "View": "runtime.request",
}

__all__ = [
    "AnyDoorError",
    "BackendError",
    "BundleError",
    "Composite",
    "Compositor",
    "EngineOptions",
    "InputError",
    "Placement",
    "Request",
    "Sampling",
    "Segmenter",
    "View",
]


def __getattr__(name: str) -> Any:
    """Imports a name on first use, so that commands only import what they need."""
    if name not in _HOMES:
        raise AttributeError(f"module 'runtime' has no attribute '{name}'")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
