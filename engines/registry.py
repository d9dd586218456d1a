"""Finds the backends in `engines/backends`.

To add a backend, add a folder there. Its `__init__.py` has a tuple `BACKENDS` of `Backend`, which says what
it runs and imports no library; its `engine.py` has the functions of `engines.engine.BackendModule`. Its
library goes into an extra of pyproject.toml, if pip installs it everywhere.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path


@dataclass(frozen=True)
class Backend:
    """A backend's description, available before it is loaded."""

    name: str
    title: str
    """Its name for people."""
    runs: str
    """The `Manifest.backend` of the bundles that it executes."""
    package: str
    """Python package of its library."""
    install: str
    """The command that installs its library."""
    devices: tuple[str, ...]
    """cpu, cuda, or both."""
    precisions: tuple[str, ...] = ("fp32",)
    """Inference precisions for graphs in float32."""
    rank: int = 0
    """Order among the backends that run the same bundles; the fastest on a CPU comes first."""
    card_files: str = ""
    """Files in the package's folder, as a pattern, that are there if it was built for cards."""
    module: str = ""
    """Module with its engine; see `engines.engine.BackendModule`."""

    @property
    def installed(self) -> bool:
        """Whether its library is installed; nothing is imported to find out."""
        return find_spec(self.package) is not None

    @property
    def has_card_files(self) -> bool:
        """Whether its library was built for cards: looking for the file is faster than importing the
        library."""
        found = find_spec(self.package) if self.card_files else None
        folders = (found.submodule_search_locations or []) if found else []
        return any(True for folder in folders for _ in Path(folder).glob(self.card_files))


@functools.cache
def backends() -> Mapping[str, Backend]:
    """Returns name -> backend, for every backend, in the order of `Backend.rank`."""
    package = importlib.import_module("engines.backends")
    folders = sorted(folder.name for folder in pkgutil.iter_modules(package.__path__) if folder.ispkg)
    found = [
        backend
        for folder in folders
        for backend in importlib.import_module(f"engines.backends.{folder}").BACKENDS
    ]
    return {backend.name: backend for backend in sorted(found, key=lambda backend: backend.rank)}
