"""What comes back: the pictures, and how they came about."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from runtime.imaging.boxes import Box


@dataclass(frozen=True, eq=False)
class Composite:
    """One picture, and how it came about."""

    image: NDArray[np.uint8]
    """(H, W, 3) RGB, of the scene's size."""
    seed: int
    """Gives the same picture again, on the same machine and bundle."""
    regions: tuple[Box, ...]
    """Per placement: the only part of the scene that it may have changed."""
    seconds: dict[str, float]
    """Stage -> time spent, for all pictures of the call together."""


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
