"""What a request hears on its way through the batcher, and why one is refused. Also what clients see."""

from __future__ import annotations

from dataclasses import dataclass, field

from engines.errors import AnyDoorError
from runtime.imaging.boxes import Box


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
    """Per placement: the only part of the scene that it may have changed."""


@dataclass(frozen=True)
class Finished:
    """The end: the pictures, the seconds that each stage took, and what the caller should know."""

    images: list[FinishedImage]
    seconds: dict[str, float]
    warnings: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Failed:
    """The end: `InputError`, one of the errors below, or what the engine raised."""

    error: Exception


Event = Queued | StepDone | Preview | Finished | Failed


class QueueFullError(AnyDoorError):
    """No more requests are accepted now."""

    def __init__(self, retry_seconds: float) -> None:
        super().__init__(f"the queue is full; try again in {retry_seconds:.1f} s")
        self.retry_seconds = retry_seconds
        """When a place is likely to be free."""


class ShuttingDownError(AnyDoorError):
    """No more requests are accepted."""

    def __init__(self) -> None:
        super().__init__("the server is shutting down")


class EngineLostError(AnyDoorError):
    """The engine no longer works, whatever it is asked."""

    def __init__(self) -> None:
        super().__init__("the engine has failed for good; the server must be started again")


class DeadlineError(AnyDoorError):
    """The caller no longer wants the result."""

    def __init__(self, message: str = "the deadline passed before the pictures were finished") -> None:
        super().__init__(message)


class UnmeetableDeadlineError(DeadlineError):
    """The caller will no longer want the result when it is there."""

    def __init__(self, least: float, left: float) -> None:
        """Says what is missing.

        Args:
            least: seconds that the pictures take at the very least.
            left: seconds until the deadline.
        """
        super().__init__(
            f"the deadline cannot be met: {left:.3g} s are left, and the steps still to take need at least "
            f"{least:.3g} s here; allow more time, or ask for fewer steps or pictures"
        )
