"""What the scheduler is asked for, and what it tells on the way."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from engines.errors import AnyDoorError
from runtime.imaging.boxes import Box
from runtime.job import Canvas, Job

BATCHING = ("continuous", "static")
"""When waiting samples join: between any two steps, or only when the batch is empty."""


class QueueFullError(AnyDoorError):
    """No more requests are accepted now."""

    def __init__(self, retry_seconds: float) -> None:
        super().__init__(f"the queue is full; try again in {retry_seconds:.1f} s")
        self.retry_seconds = retry_seconds
        """When a place is likely to be free."""


class ShuttingDownError(AnyDoorError):
    """No more requests are accepted ever."""

    def __init__(self) -> None:
        super().__init__("the server is shutting down")


class EngineLostError(AnyDoorError):
    """The engine answers no more, whatever it is asked."""

    def __init__(self) -> None:
        super().__init__("the engine has failed for good; the server must be started again")


class DeadlineError(AnyDoorError):
    """The caller does not want the result any more."""

    def __init__(self) -> None:
        super().__init__("the deadline passed before the pictures were finished")


@dataclass(frozen=True)
class Queued:
    """The request waits; `position` others start before it."""

    position: int


@dataclass(frozen=True)
class StepDone:
    """Steps taken, and all steps, counted over all pictures and placements of the request."""

    done: int
    total: int


@dataclass(frozen=True)
class Preview:
    """What a picture looks like so far."""

    image_index: int
    image: bytes
    """A JPEG file."""


@dataclass(frozen=True)
class FinishedImage:
    """One finished picture."""

    image: bytes
    """A file of the format asked for."""
    seed: int
    regions: tuple[Box, ...]


@dataclass(frozen=True)
class Finished:
    """The end: the pictures, and the seconds that each stage took."""

    images: list[FinishedImage]
    seconds: dict[str, float]


@dataclass(frozen=True)
class Failed:
    """The end: `InputError`, `DeadlineError`, `ShuttingDownError`, or whatever the engine raised."""

    error: BaseException


Event = Queued | StepDone | Preview | Finished | Failed


@dataclass(frozen=True, eq=False)
class Order:
    """Who wants a request done, and how it is to be delivered."""

    notify: Callable[[Event], object]
    """Called from the scheduler's threads, in order, while it holds its lock: must return at once."""
    client: str = ""
    """Clients share the engine fairly."""
    deadline: float | None = None
    """`time.monotonic()` after which the result is of no use."""
    file_format: str = "PNG"
    preview_every: int = 0
    """Steps between previews; 0 for none."""


@dataclass(eq=False)
class Ticket:
    """An accepted request."""

    order: Order
    total_steps: int
    """Of all pictures and placements."""
    accepted: float = field(default_factory=time.monotonic)
    job: Job | None = None
    """Set when it is decoded and checked."""
    waiting: deque[Canvas] = field(default_factory=deque)
    """Canvases ready for the batch."""
    started: bool = False
    steps_done: int = 0
    position: int | None = None
    encoded: dict[int, bytes] = field(default_factory=dict)
    """Picture -> its file."""

    @property
    def late(self) -> bool:
        """Whether the deadline has passed."""
        return self.order.deadline is not None and time.monotonic() >= self.order.deadline
