"""Decides which requests are accepted, and whose picture joins the batch next."""

from __future__ import annotations

import heapq
import threading
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Iterable, Iterator, Mapping
from operator import itemgetter
from typing import TYPE_CHECKING, TypeVar

from runtime.server.deadlines import FastestCalls
from runtime.server.events import (
    DeadlineError,
    EngineLostError,
    Event,
    Failed,
    Finished,
    LoadFailedError,
    Queued,
    QueueFullError,
    ShuttingDownError,
    UnmeetableDeadlineError,
)
from runtime.server.ticket import Ticket

if TYPE_CHECKING:
    from runtime.job import ImageJob

_REMEMBERED_CLIENTS = 1024
_BACK_SECONDS = 2.0
"""In which a client whose request ended is expected to come back."""
_SHORTEST_RETRY = 0.1  # seconds
_LONGEST_RETRY = 60.0


class FairQueue:
    """The accepted requests and their turns; without threads, locks and clocks."""

    def __init__(self, capacity: int) -> None:
        """Starts empty.

        Args:
            capacity: most requests at a time.
        """
        self.capacity = capacity
        self.tickets: list[Ticket] = []
        """Accepted and not over; first come, first."""
        self._served: OrderedDict[str, int] = OrderedDict()
        self._left: OrderedDict[str, float] = OrderedDict()
        """Client -> when its last request that joins the batch ended."""

    def add(self, ticket: Ticket, seconds_per_step: float = 0.0) -> None:
        """Accepts a request.

        Args:
            ticket: the request.
            seconds_per_step: time of a step of one sample in a full batch, 0 if not known.

        Raises:
            QueueFullError: says when one request less is likely to be here.
        """
        if len(self.tickets) >= self.capacity:
            raise self.full(seconds_per_step)
        ticket.open = True
        self.tickets.append(ticket)

    def full(self, seconds_per_step: float) -> QueueFullError:
        """Returns the error for a request without a place in the queue; see `add`."""
        jobs = [(ticket.job, ticket.steps_done) for ticket in self.tickets]
        steps = [job.total_steps - done for job, done in jobs if job]
        seconds = seconds_per_step * sum(steps) / max(len(steps), 1)
        return QueueFullError(min(max(seconds, _SHORTEST_RETRY), _LONGEST_RETRY))

    def yielding(self, client: str) -> Ticket | None:
        """Returns the request that gives its place to one of `client`, if there is no other place: the last
        one that has not started, of the client that has most of those, if that is two more than `client`
        has."""
        if len(self.tickets) < self.capacity:
            return None
        waiting = [ticket for ticket in self.tickets if not ticket.starts]
        places = Counter(ticket.client for ticket in waiting)
        most, count = max(places.items(), key=itemgetter(1), default=("", 0))
        if count < places[client] + 2:
            return None
        return next(ticket for ticket in reversed(waiting) if ticket.client == most)

    def remove(self, ticket: Ticket, now: float = 0.0) -> None:
        """Ends an accepted request, whether it is finished or not; `now` is in seconds of any clock."""
        if ticket.work:
            _note(self._left, ticket.client, now)
        ticket.open = False
        ticket.waiting.clear()
        ticket.tasks.clear()
        if ticket.decoder:
            ticket.decoder.kill()
        self.tickets.remove(ticket)

    def next(self, is_last: bool = False, now: float = 0.0) -> tuple[Ticket, ImageJob] | None:
        """Takes the picture that joins the batch next; None if no picture is ready, or may join.

        Args:
            is_last: the batch has one free slot. Who is in the batch leaves it to a client who is not, but is
                expected within two seconds: that one would have to wait until a picture is drawn.
            now: by the clock of `remove`.
        """
        ready = [ticket for ticket in self.tickets if ticket.waiting]
        ticket = next(fair_order(ready, self.tickets, self._served), None)
        if ticket is None or (is_last and self._leaves_the_last(ticket.client, now)):
            return None
        ticket.starts += 1
        ticket.running += 1
        _note(self._served, ticket.client, next(reversed(self._served.values()), 0) + 1)
        return ticket, ticket.waiting.popleft()

    def _leaves_the_last(self, client: str, now: float) -> bool:
        inside = {ticket.client for ticket in self.tickets if ticket.running}
        expected = {ticket.client for ticket in self.tickets if ticket.work}
        expected |= {name for name, left in self._left.items() if now - left < _BACK_SECONDS}
        return client in inside and not expected <= inside

    def positions(self) -> list[tuple[Ticket, int]]:
        """Counts the requests that start before each one that has not started.

        Returns:
            Those that moved up since the last call, and new ones, with their positions. Who is overtaken
            keeps the position that was returned before.
        """
        moved = []
        waiting = [ticket for ticket in self.tickets if not ticket.starts]
        for position, ticket in enumerate(fair_order(waiting, self.tickets, self._served)):
            if ticket.position is None or position < ticket.position:
                ticket.position = position
                moved.append((ticket, position))
        return moved


_Fact = TypeVar("_Fact", int, float)


def _note(facts: OrderedDict[str, _Fact], client: str, fact: _Fact) -> None:
    """Keeps a fact of a client; those of whom nothing was heard longest are forgotten."""
    facts[client] = fact
    facts.move_to_end(client)
    if len(facts) > _REMEMBERED_CLIENTS:
        facts.popitem(last=False)


def fair_order(
    waiting: Iterable[Ticket], accepted: Iterable[Ticket], served: Mapping[str, int]
) -> Iterator[Ticket]:
    """Yields requests in the order in which they start, if one picture of each starts and none ends.

    Next is the client with the fewest samples in the batch; among these, the one served longest ago. The
    requests of one client come in their own order.

    Args:
        waiting: first come, first.
        accepted: all requests, whose samples in the batch count.
        served: client -> the turn in which it was served last, counted from 1; 0 if missing.
    """
    running: Counter[str] = Counter()
    for ticket in accepted:
        running[ticket.client] += ticket.running
    of_client: dict[str, deque[tuple[int, Ticket]]] = {}
    for number, ticket in enumerate(waiting):
        of_client.setdefault(ticket.client, deque()).append((number, ticket))
    heap = [(running[client], served.get(client, 0), own[0][0], client) for client, own in of_client.items()]
    heapq.heapify(heap)
    turn = max(served.values(), default=0)
    while heap:
        samples, _, _, client = heap[0]
        own = of_client[client]
        yield own.popleft()[1]
        turn += 1
        if own:
            heapq.heapreplace(heap, (samples + 1, turn, own[0][0], client))
        else:
            heapq.heappop(heap)


class SharedQueue:
    """A fair queue that threads share, and that tells requests what happens to them."""

    def __init__(self, capacity: int) -> None:
        """Starts empty; `capacity` as of `FairQueue`."""
        self.requests = FairQueue(capacity)
        self.changed = threading.Condition()
        """Guards the queue and its tickets; notified when a thread may have something to do."""
        self.refusal: type[ShuttingDownError | LoadFailedError | EngineLostError] | None = None
        """Why nothing is accepted any more."""
        self.seconds_per_step = 0.0
        """Time of a step of one sample in a full batch; 0 if not known."""
        self.fastest = FastestCalls()
        """The fastest calls of the step graph so far."""

    def missed(self, ticket: Ticket) -> DeadlineError | None:
        """Returns why a request can no longer meet its deadline; None if it can, or has none.

        Whoever is in the batch stays until the deadline is over: how far a card is with a step is not known.
        The caller holds the lock.
        """
        if ticket.deadline is None:
            return None
        left = ticket.deadline - time.monotonic()
        if left <= 0:
            return DeadlineError()
        least = self.fastest.least_seconds(ticket.work) if ticket.work and not ticket.starts else 0.0
        return UnmeetableDeadlineError(least, left) if least > left else None

    def close(self, why: type[LoadFailedError | EngineLostError]) -> None:
        """Ends all requests, and accepts no other."""
        with self.changed:
            self.refusal = why
            for ticket in list(self.requests.tickets):
                self.end(ticket, Failed(why()))

    def announce(self) -> None:
        """Tells the requests that moved up; the caller holds the lock."""
        for ticket, position in self.requests.positions():
            ticket.notify(Queued(position))

    def tell(self, ticket: Ticket, event: Event) -> None:
        """Notifies a request, unless it is over."""
        with self.changed:
            if ticket.open:
                ticket.notify(event)

    def put(self, ticket: Ticket, images: Iterable[ImageJob]) -> None:
        """Lets prepared pictures wait for the batch, unless their request is over."""
        with self.changed:
            if ticket.open:
                ticket.waiting.extend(images)
                self.changed.notify_all()

    def end(self, ticket: Ticket, event: Finished | Failed | None = None) -> None:
        """Ends a request, unless it is over; an event is the last that it is told."""
        with self.changed:
            if ticket.open:
                self.requests.remove(ticket, time.monotonic())
                if event:
                    ticket.notify(event)
                self.announce()
                self.changed.notify_all()
