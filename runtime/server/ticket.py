"""Represents a request in the server: its client, its delivery and its progress."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from runtime.server.deadlines import Work
from runtime.server.events import Event, Finished
from runtime.server.memory import Account, Ledger

if TYPE_CHECKING:
    from runtime.job import ImageJob, Job
    from runtime.server.decoding import Decoder


@dataclass(eq=False)
class Ticket:
    """A request that the batcher is asked for. The caller sets the first six fields."""

    notify: Callable[[Event], object]
    """Called from the batcher's threads, one event after the other, while they hold its lock: must return at
    once."""
    client: str = ""
    """Clients share the engine fairly."""
    deadline: float | None = None
    """`time.monotonic()` after which the result is of no use."""
    file_format: str = "PNG"
    """File format of the finished pictures: PNG, JPEG or WEBP."""
    preview_every: int = 0
    """Steps between previews; 0 for none."""
    account: Account = field(default_factory=lambda: Ledger().open(""))
    """The request's share of the memory for requests."""

    open: bool = False
    """Whether it is accepted and not over."""
    accepted: float = field(default_factory=time.monotonic)
    """`time.monotonic()` when it came."""
    work: Work | None = None
    """Its steps; None if it never joins the batch, as one that finds an object."""
    tasks: deque[Callable[[], None]] = field(default_factory=deque)
    """The tasks of the workers, in this order; only this list holds their arguments."""
    at_work: int = 0
    """Tasks of it that the workers are at."""
    decoder: Decoder | None = None
    """The current decoder of its pictures."""
    job: Job | None = None
    """Set when the request is decoded and checked."""
    waiting: deque[ImageJob] = field(default_factory=deque)
    """Pictures that are prepared and need a slot in the batch."""
    running: int = 0
    """Pictures in the batch."""
    starts: int = 0
    """Number of times that one of its pictures joined the batch."""
    position: int | None = None
    """Requests that start before it, as last announced."""
    steps_done: int = 0
    """Over all pictures and placements."""
    previews: int = 0
    """Previews that were drawn and are not told yet."""
    encoded: dict[int, bytes] = field(default_factory=dict)
    """Index of a finished picture -> its file."""
    finished: Finished | None = None
    """Set when every picture is encoded; told after the last preview."""
