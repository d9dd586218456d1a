"""Defines results: pictures, seeds, regions and times."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from runtime.imaging.boxes import Box
from runtime.imaging.picture import NO_METADATA, Metadata


@dataclass(frozen=True, eq=False)
class Composite:
    """One picture, with its seed, regions and times."""

    image: NDArray[np.uint8]
    """(H, W, 3) uint8 of the scene's size, in the colours of its profile; (H, W, 4) if the scene is partly
    transparent."""
    seed: int
    """Reproduces the picture, on the same machine and bundle; that of an edit with the same filled hole."""
    regions: tuple[Box, ...]
    """The regions that may have changed: one per hole of an edit, then one per placement."""
    seconds: dict[str, float]
    """Maps stages to seconds, for all pictures of the call together."""
    metadata: Metadata = NO_METADATA
    """The scene's profile, EXIF and resolution."""
    warnings: tuple[str, ...] = ()
    """Anything unexpected about the pictures and masks, one sentence each."""
    filler: str = ""
    """What filled the hole of an edit: a system, or "guess"; empty if there was none."""

    def to_pillow(self) -> Image.Image:
        """Returns the picture as a Pillow image, with its metadata in `info`."""
        image = Image.fromarray(self.image)
        image.info.update(self.metadata.info)
        return image


@dataclass(frozen=True, eq=False)
class Found:
    """An object that was found in a picture."""

    mask: NDArray[np.bool_]
    """(H, W), of the upright picture's size."""
    score: float | None = None
    """How well the mask covers the object, as its network estimates, at best 1; None if nothing does."""


class Stopwatch:
    """Measures the time per stage; several threads may measure stages of one job."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self._lock = threading.Lock()

    @property
    def seconds(self) -> dict[str, float]:
        """Maps stages to seconds so far."""
        with self._lock:
            return dict(self._seconds)

    def add(self, stage: str, seconds: float) -> None:
        """Adds time that was measured elsewhere."""
        with self._lock:
            self._seconds[stage] = self._seconds.get(stage, 0.0) + seconds

    @contextmanager
    def measure(self, stage: str) -> Iterator[None]:
        """Measures the time of the block."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.add(stage, time.perf_counter() - started)
