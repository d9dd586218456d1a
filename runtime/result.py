"""What comes back: the pictures, and how they came about."""

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
    """One picture, and how it came about."""

    image: NDArray[np.uint8]
    """(H, W, 3) of the scene's size, in the colours of its profile; (H, W, 4) if it is transparent in
    parts."""
    seed: int
    """Gives the same picture again, on the same machine and bundle."""
    regions: tuple[Box, ...]
    """Per placement, and before those per hole of an edit: the only part of the scene that it may have
    changed."""
    seconds: dict[str, float]
    """Stage -> time spent, for all pictures of the call together."""
    metadata: Metadata = NO_METADATA
    """The scene's: profile, EXIF and resolution."""
    warnings: tuple[str, ...] = ()
    """What the caller should know about how the pictures and masks were read, a sentence each."""
    filler: str = ""
    """Of an edit, what filled the hole of an object: a system, or "guess"; empty if there was none."""

    def to_pillow(self) -> Image.Image:
        """The picture, with its metadata in `info`."""
        image = Image.fromarray(self.image)
        image.info.update(self.metadata.info)
        return image


class Stopwatch:
    """Time per stage; stages of one job may be measured in several threads."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self._lock = threading.Lock()

    @property
    def seconds(self) -> dict[str, float]:
        """Stage -> time spent so far."""
        with self._lock:
            return dict(self._seconds)

    def add(self, stage: str, seconds: float) -> None:
        """Counts time that was measured elsewhere."""
        with self._lock:
            self._seconds[stage] = self._seconds.get(stage, 0.0) + seconds

    @contextmanager
    def measure(self, stage: str) -> Iterator[None]:
        """Counts the time that the block takes."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.add(stage, time.perf_counter() - started)
