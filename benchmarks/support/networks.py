"""Which network a bundle was exported from. Needs no PyTorch."""

from __future__ import annotations

from typing import Any

from engines.manifest import Manifest
from training.network.architecture import Architecture


def architecture_of(manifest: Manifest) -> Architecture:
    """Return the sizes of a bundle's network."""
    sizes: dict[str, Any] = {
        name: tuple(size) if isinstance(size, list) else size for name, size in manifest.architecture.items()
    }
    return Architecture(**sizes)
