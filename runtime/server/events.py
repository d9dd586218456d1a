"""Defines the events of a request on its way through the batcher, and the errors that end it, as clients see
them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from engines.errors import AnyDoorError
from runtime.imaging.boxes import Box

if TYPE_CHECKING:
    from runtime.edits.plan import Plan
    from runtime.imaging.picture import Picture


_SHOWN_NAMES = 20
"""Most names of models in an error."""


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
    """A preview of a picture."""

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
    filler: str = ""
    """See `runtime.result.Composite`."""


@dataclass(frozen=True)
class MaskFound(Finished):
    """The end of a search for an object: its mask is the only picture."""

    score: float | None = None
    """See `runtime.result.Found`."""


@dataclass(frozen=True)
class Planned(Finished):
    """The end of a phase of an edit: what is to be filled and placed."""

    plan: Plan | None = None
    place_steps: int = 0
    """Steps of all that is placed, if a network fills holes before."""
    scenes: Sequence[Picture] = ()
    """The scene with its holes filled, once for each way that they are, where something is to be placed."""


@dataclass(frozen=True)
class Failed:
    """The end: `InputError`, one of the errors below, or what the engine raised."""

    error: Exception


Event = Queued | StepDone | Preview | Finished | Failed


class BusyError(AnyDoorError):
    """The server accepts nothing more at the moment, of this client or of any."""

    def __init__(self, what: str, retry_seconds: float = 1.0) -> None:
        super().__init__(f"{what}; try again in {retry_seconds:.1f} s")
        self.retry_seconds = retry_seconds
        """When it is likely to be accepted."""


class QueueFullError(BusyError):
    """No more requests are accepted now, or this one had to make room for a client that has fewer."""

    def __init__(self, retry_seconds: float) -> None:
        super().__init__("the queue is full", retry_seconds)


class MemoryFullError(BusyError):
    """The memory for requests is taken, or this client's part of it."""

    def __init__(self) -> None:
        super().__init__("there is no memory for this request now")


class ShuttingDownError(AnyDoorError):
    """No more requests are accepted."""

    def __init__(self) -> None:
        super().__init__("the server is shutting down")


class LoadingError(AnyDoorError):
    """Requests are not accepted yet."""

    def __init__(self) -> None:
        super().__init__("the model is still loading; try again soon")


class LoadFailedError(AnyDoorError):
    """A model cannot be used."""

    def __init__(self) -> None:
        super().__init__("the model cannot be loaded; the server's log says why")


class UnknownModelError(AnyDoorError):
    """There is no such model."""

    def __init__(self, name: str, names: Sequence[str]) -> None:
        """Says which there are.

        Args:
            name: that was asked for.
            names: of the models that there are.
        """
        more = len(names) - _SHOWN_NAMES
        shown = ", ".join(names[:_SHOWN_NAMES]) + (f" and {more} more" if more > 0 else "")
        super().__init__(f"there is no model '{name[:100]}' here: choose one of {shown}")


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


class CallerGoneError(AnyDoorError):
    """Nobody waits for the answer any more."""

    def __init__(self) -> None:
        super().__init__("the connection is gone")


class UnauthenticatedError(AnyDoorError):
    """The caller is not let in."""

    def __init__(self) -> None:
        super().__init__("a valid bearer token is required")


class ForbiddenError(AnyDoorError):
    """A web page calls that may not."""


class UnknownMethodError(AnyDoorError):
    """There is no such method."""

    def __init__(self, text: str = "there is no such method") -> None:
        super().__init__(text)


class UnknownJobError(AnyDoorError):
    """There is no such job, or it is somebody else's."""

    def __init__(self) -> None:
        super().__init__("there is no such job; results are kept for an hour")


class NotFinishedError(AnyDoorError):
    """A job has no result yet."""

    def __init__(self, status: str) -> None:
        super().__init__(f"the job is {status}: its result is there when it has succeeded")


class AlreadyGoneError(AnyDoorError):
    """A job has no result, and will not have one."""

    def __init__(self, status: str) -> None:
        dropped = "; its result made room for newer ones" if status == "succeeded" else " and has no result"
        super().__init__(f"the job has {status}{dropped}")


class UnknownServiceError(AnyDoorError):
    """Health is asked of a service that is not here."""

    def __init__(self, name: str) -> None:
        super().__init__(f"there is no service '{name[:100]}'")
