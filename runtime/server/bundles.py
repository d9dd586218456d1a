"""Lists the bundles that a server may load, and how much memory each may take."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from engines.bundle import Bundle
from engines.engine import needed_bytes
from engines.errors import AnyDoorError
from engines.manifest import MANIFEST
from engines.options import EngineOptions
from runtime.cache_size import default_cache_bytes
from runtime.compositor import Compositor
from runtime.segmentation import Segmenter
from runtime.server.settings import Settings

_SHARE_FOR_CACHES = 8
"""If the models do not all fit, one part in this many of the budget is reserved for caches."""

Stamp = tuple[int, ...]
"""Identifies a file, to detect that it was replaced."""


class Bundles:
    """The bundles of a server, and how they are opened."""

    def __init__(self, settings: Settings, options: EngineOptions, segmenter: Segmenter) -> None:
        """Reads all manifests.

        Args:
            settings: of the server.
            options: of all engines; their memory budget is for all models together.
            segmenter: of all models.

        Raises:
            InputError: a name is given twice.
        """
        self._paths = settings.bundles
        self._settings = settings
        self._options = options
        self._segmenter = segmenter
        self.budget = options.memory_budget
        """Bytes for all models together; None if there is no limit."""
        self.unusable: dict[str, AnyDoorError] = {}
        """Name -> why a bundle could not be opened at the start."""
        self._cache_bytes = self._share_of_caches()

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the models; the first is the default."""
        return tuple(self._paths)

    def created(self, name: str) -> int:
        """When a bundle was built, in seconds since 1970; 0 if it is not there."""
        return self.stamp(name)[0] // 10**9

    def stamp(self, name: str) -> Stamp:
        """Changes when a bundle is built again, or another one takes its place."""
        try:
            status = os.stat(self._paths[name] / MANIFEST)
        except OSError:
            return (0,)
        return status.st_mtime_ns, status.st_ino, status.st_size

    def open(self, name: str) -> Bundle:
        """Reads a bundle's manifest.

        Raises:
            AnyDoorError: it cannot be used, and why.
        """
        key = self._settings.trusted_key
        return Bundle.open(self._paths[name], Path(key) if key else None)

    def cost(self, bundle: Bundle) -> int:
        """Returns bytes of the budget that a bundle takes, with what it keeps for later pictures; 0 without a
        budget.

        Raises:
            AnyDoorError: it cannot run here, and why.
        """
        if self.budget is None:
            return 0
        if len(self._paths) == 1:
            return self.budget
        # where it needs more, its graphs take turns
        return min(needed_bytes(bundle, self._options) + (self._cache_bytes or 0), self.budget)

    def load(self, bundle: Bundle) -> Compositor:
        """Makes what runs a bundle; its graphs are not loaded yet.

        Raises:
            AnyDoorError: it cannot run here, and why.
        """
        options = replace(self._options, memory_budget=self.cost(bundle) or None)
        window = self._settings.control_window or None
        key = self._settings.trusted_key or None
        return Compositor.load(bundle.path, options, self._cache_bytes, window, key, self._segmenter)

    def _share_of_caches(self) -> int | None:
        """Returns the cache size of each model; None leaves it to the only model."""
        wanted = None if self._settings.cache_bytes < 0 else self._settings.cache_bytes
        if len(self._paths) == 1:
            return wanted
        needed = 0
        for name in self._paths:
            try:
                needed += needed_bytes(self.open(name), self._options)
            except AnyDoorError as error:
                self.unusable[name] = error
        shared = default_cache_bytes() if wanted is None else wanted
        if self.budget is not None:
            left = self.budget - needed
            shared = min(shared, left if left >= 0 else self.budget // _SHARE_FOR_CACHES)
        return shared // len(self._paths)
