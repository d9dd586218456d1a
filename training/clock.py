"""Measures the time of a stage, and decides when to stop so that saving ends in time."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import psutil

LAPS = 50
"""Steps whose longest tells how long the next may take. The loop waits for a card more often than that."""

SAFETY = 2.0
"""How many times as long as before the last step and the last save may take."""

SHARE_OF_SAVING = 0.05
"""Most of the time that may go into saving before the end."""


@dataclass(frozen=True)
class TimeLimit:
    """What a stage may take, from when it was set: preparing and saving included."""

    seconds: float
    began: float = field(default_factory=time.monotonic)
    """When it was set, on the clock of `time.monotonic`."""

    @property
    def left(self) -> float:
        """Seconds that are left of it, at least 0."""
        return max(self.seconds - (time.monotonic() - self.began), 0.0)


def program_start() -> float:
    """Gives the time at which this program was started, on the clock of `time.monotonic`."""
    return time.monotonic() - (time.time() - float(psutil.Process().create_time()))


class Clock:
    """Measures a stage that may have a limit; without one it is never over."""

    def __init__(self, limit: TimeLimit | None, spent: float = 0.0) -> None:
        """Starts it. `spent`: seconds that earlier calls took for the same stage; they count."""
        self._limit = limit
        self._began = (limit.began if limit else time.monotonic()) - spent
        self._laps: deque[float] = deque([0.0], LAPS)
        self._lap = self._saved = time.monotonic()
        self._saving = 0.0

    @property
    def spent(self) -> float:
        """Seconds that the stage has taken, those of earlier calls among them."""
        return time.monotonic() - self._began

    @property
    def progress(self) -> float:
        """The share of the limit that is over, 0..1; 0 without a limit."""
        return min(self.spent / max(self._limit.seconds, 1e-9), 1.0) if self._limit else 0.0

    @property
    def is_over(self) -> bool:
        """Whether another step, and saving after it, might not end in time."""
        needed = SAFETY * (max(self._laps) + self._saving)
        return self._limit is not None and self.spent + needed >= self._limit.seconds

    def may_save(self, is_due: bool) -> bool:
        """Says whether to save before the end.

        With a limit the first step is saved, to measure how long it takes, and what is due only as long as
        saving takes little of the time.
        """
        if self._limit is None:
            return is_due
        since = time.monotonic() - self._saved
        return not self._saving or (is_due and since * SHARE_OF_SAVING >= self._saving)

    def counted(self, last: bool) -> float:
        """Gives the seconds that a later call counts as spent: all of the limit if this is the end."""
        return max(self.spent, self._limit.seconds) if last and self._limit else self.spent

    def lap(self) -> None:
        """Notes that a step is done."""
        now = time.monotonic()
        self._laps.append(now - self._lap)
        self._lap = now

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Measures a save; it is no part of the step."""
        began = time.monotonic()
        yield
        self._lap = self._saved = time.monotonic()
        self._saving = self._saved - began
