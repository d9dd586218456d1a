"""A batcher for tests, with an engine that can be held, and followers that keep what they hear."""

from __future__ import annotations

import io
import queue
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from runtime.request import Placement, Request, Sampling
from runtime.server.batching import Batcher
from runtime.server.events import Event, Failed, Finished
from runtime.server.ticket import Ticket
from tests.support.serving import BOX, OBJECT, PATIENCE, SCENE, held_compositor

PLACEMENT = Placement(OBJECT, box=BOX)
TOLERANCE = 1
"""Grey levels by which sharing a batch may change a picture: rounding, as sums are taken in another order."""


class Follower:
    """Submits a request and keeps what is heard of it."""

    def __init__(self, batcher: Batcher, request: Request, **ticket: Any) -> None:
        self._events: queue.Queue[Event] = queue.Queue()
        self.events: list[Event] = []
        self.ticket = Ticket(self._events.put, **ticket)
        batcher.submit(request, self.ticket)

    def end(self) -> Event:
        """Waits for the last event."""
        while not self.events or not isinstance(self.events[-1], Finished | Failed):
            self.events.append(self._events.get(timeout=PATIENCE))
        return self.events[-1]

    def pictures(self) -> list[NDArray[np.uint8]]:
        end = self.end()
        assert isinstance(end, Finished), end
        return [np.asarray(Image.open(io.BytesIO(image.image))) for image in end.images]

    def error(self) -> BaseException:
        end = self.end()
        assert isinstance(end, Failed), end
        return end.error


def request(steps: int = 3, seed: int = 7, placement: Placement = PLACEMENT, **fields: Any) -> Request:
    return Request(SCENE, [placement], seed, Sampling(steps=steps), **fields)


class Bench:
    """A batcher with an engine that can be held."""

    def __init__(self, bundle: Path, cache_bytes: int | None = None, **settings: Any) -> None:
        self.compositor, self.engine = held_compositor(bundle, cache_bytes)
        self.batcher = Batcher(self.compositor, **settings)

    def __enter__(self) -> Bench:
        return self

    def __exit__(self, *error: object) -> None:
        self.engine.release()
        self.batcher.drain(0)

    def submit(self, request: Request, **ticket: Any) -> Follower:
        return Follower(self.batcher, request, **ticket)
