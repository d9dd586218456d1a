"""A fleet of servers as a queueing model: Poisson arrivals, step-level batching, kept maps, and a router.

Time is continuous; what happens is an arrival, or a finished picture. Between two of them the samples in a
server's batch take their steps at the rate that a batch of that size has.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class ServiceTimes:
    """Seconds that a server takes, as measured."""

    step: Sequence[float]
    """Of a call of the step graph, with 1, 2, ... samples in it, up to as many as a batch has."""
    steps: int
    """Of a picture."""
    maps: float
    """To compute what a placement needs once: ID tokens and detail maps. Nothing else runs meanwhile."""
    rest: float
    """Of a picture beside its steps and maps: reading, decoding, pasting. Likewise."""


@dataclass(frozen=True)
class Load:
    """The load of a fleet."""

    per_server: float
    """Pictures per second for each server."""
    rerolls: float
    """Mean number of further pictures of a placement."""
    pause: float
    """Mean seconds from a picture to the next one of the same placement."""


@dataclass(eq=False)
class _Placement:
    """What somebody has drawn, again and again."""

    pictures: int
    """That are still to be asked for."""
    home: int | None = None
    """The server that drew it last."""


@dataclass(eq=False)
class _Picture:
    """A picture that is asked for."""

    placement: _Placement
    came: float
    steps: float = 0.0
    """That are still to be taken."""


@dataclass(eq=False)
class _Server:
    """One engine."""

    running: list[_Picture] = field(default_factory=list)
    waiting: deque[_Picture] = field(default_factory=deque)
    kept: OrderedDict[_Placement, None] = field(default_factory=OrderedDict)
    """Placements whose maps it has; the one that was used longest ago first."""
    since: float = 0.0
    """Until when the steps are counted; later than now while it does what is not a step."""
    version: int = 0
    """Tells the event that is awaited from those that are no longer true."""

    @property
    def pictures(self) -> int:
        """Those that it has, running or not."""
        return len(self.running) + len(self.waiting)


@dataclass(frozen=True)
class FleetResult:
    """The results of a fleet."""

    servers: int
    affinity: bool
    kept: int
    """Placements whose maps a server keeps."""
    per_server: float
    """Pictures per second that were asked for, of each server."""
    with_maps: float
    """Share of the pictures for which no maps were computed."""
    busy: float
    """Share of the time in which a server had something to do."""
    mean: float
    """Seconds from the request to the picture."""
    p50: float
    """Likewise."""
    p95: float
    """Likewise."""


class Fleet:
    """Servers behind a router."""

    def __init__(
        self, servers: int, times: ServiceTimes, load: Load, affinity: bool, kept: int, seed: int
    ) -> None:
        """Starts with nothing to do.

        Args:
            servers: how many.
            times: what they take.
            load: what they get.
            affinity: a placement goes to the server that drew it last, unless that has as many more pictures
                than another as a batch has slots. Else it goes to the one of two chosen at random that has
                fewer pictures, as with Ray Serve's router.
            kept: placements whose maps a server keeps.
            seed: of everything random. With the same number of servers and load, the same placements arrive.
        """
        self._times = times
        self._load = load
        self._affinity = affinity
        self._kept = kept
        self._arrivals = random.Random(seed)
        """Of placements, whatever becomes of them."""
        self._random = random.Random(self._arrivals.random())
        """Of everything else."""
        self._servers = [_Server() for _ in range(servers)]
        self._events: list[tuple[float, int, int, _Placement | None, int]] = []
        """(time, order, server, placement that is asked for, version)."""
        self._order = itertools.count()
        self._placements_per_second = servers * load.per_server / (1 + load.rerolls)
        self._waits: list[float] = []
        self._hits = self._begun = 0
        self._busy = 0.0

    def run(self, warm_up: float, seconds: float) -> FleetResult:
        """Lets it run for a time that does not count, then for one that does."""
        self._expect(self._arrivals.expovariate(self._placements_per_second), self._new_placement())
        self._run_until(warm_up)
        self._waits.clear()
        self._hits = self._begun = 0
        self._busy = 0.0
        self._run_until(warm_up + seconds)
        waits = sorted(self._waits)
        return FleetResult(
            servers=len(self._servers),
            affinity=self._affinity,
            per_server=self._load.per_server,
            kept=self._kept,
            with_maps=self._hits / max(self._begun, 1),
            busy=min(self._busy / seconds / len(self._servers), 1.0),
            mean=sum(waits) / len(waits),
            p50=waits[len(waits) // 2],
            p95=waits[int(0.95 * len(waits))],
        )

    def _run_until(self, end: float) -> None:
        while self._events[0][0] < end:
            now, _, number, placement, version = heapq.heappop(self._events)
            if placement is not None:
                self._arrive(placement, now)
            elif self._servers[number].version == version:
                self._finish(number, now)

    def _new_placement(self) -> _Placement:
        pictures, mean = 1, self._load.rerolls
        while self._arrivals.random() < mean / (1 + mean):
            pictures += 1
        return _Placement(pictures)

    def _expect(self, time: float, placement: _Placement) -> None:
        heapq.heappush(self._events, (time, next(self._order), 0, placement, 0))

    def _arrive(self, placement: _Placement, now: float) -> None:
        if placement.home is None:
            gap = self._arrivals.expovariate(self._placements_per_second)
            self._expect(now + gap, self._new_placement())
        placement.pictures -= 1
        number = self._route(placement)
        placement.home = number
        server = self._servers[number]
        self._count_steps(server, now)
        server.waiting.append(_Picture(placement, now))
        self._admit(number, now)

    def _route(self, placement: _Placement) -> int:
        first, second = (self._random.randrange(len(self._servers)) for _ in range(2))
        best = min((first, second), key=lambda number: self._servers[number].pictures)
        if self._affinity and placement.home is not None:
            more = self._servers[placement.home].pictures - self._servers[best].pictures
            if more < len(self._times.step):
                return placement.home
        return best

    def _count_steps(self, server: _Server, now: float) -> None:
        """Takes the steps up to now."""
        if server.running and now > server.since:
            taken = (now - server.since) / self._times.step[len(server.running) - 1]
            self._busy += now - server.since
            for picture in server.running:
                picture.steps -= taken
        server.since = max(server.since, now)

    def _admit(self, number: int, now: float) -> None:
        """Fills the batch, and awaits the next picture that is finished."""
        server, times = self._servers[number], self._times
        while server.waiting and len(server.running) < len(times.step):
            picture = server.waiting.popleft()
            picture.steps = times.steps
            seconds = times.rest
            self._begun += 1
            if picture.placement in server.kept:
                self._hits += 1
            else:
                seconds += times.maps
            server.kept[picture.placement] = None
            server.kept.move_to_end(picture.placement)
            if len(server.kept) > self._kept:
                server.kept.popitem(last=False)
            server.since += seconds
            self._busy += seconds
            server.running.append(picture)
        server.version += 1
        if server.running:
            least = max(min(picture.steps for picture in server.running), 0.0)
            end = server.since + least * times.step[len(server.running) - 1]
            heapq.heappush(self._events, (end, next(self._order), number, None, server.version))

    def _finish(self, number: int, now: float) -> None:
        server = self._servers[number]
        self._count_steps(server, now)
        done = min(server.running, key=lambda picture: picture.steps)
        server.running.remove(done)
        self._waits.append(now - done.came)
        if done.placement.pictures:
            self._expect(now + self._random.expovariate(1 / self._load.pause), done.placement)
        self._admit(number, now)
