"""Open-loop load on a server: requests arrive at random times, whether or not earlier ones are done."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import numpy as np

from benchmarks.support.server_process import CHANNEL_OPTIONS, ServerProcess, request
from engines.errors import AnyDoorError
from runtime.rpc import compositor_pb2 as pb
from runtime.rpc.compositor_pb2_grpc import CompositorServiceStub

BATCHING = {
    "one at a time": ("--max-batch=1",),
    "static": ("--batching=static",),
    "continuous": (),
}
"""Way of batching -> flags of the server."""
_ALONE = 3
"""Requests of each number of steps, of which the mean is the time of one request alone."""
_REFUSED, _LATE = "RESOURCE_EXHAUSTED", "DEADLINE_EXCEEDED"


@dataclass(frozen=True)
class Arrival:
    """One request of the load."""

    at: float
    """Seconds after the start."""
    message: pb.CompositeRequest


@dataclass(frozen=True)
class Outcome:
    """What became of a request."""

    code: str
    seconds: float


@dataclass(frozen=True)
class LoadResult:
    """One line of the table: one way of batching at one rate."""

    mode: str
    load: float
    """Rate as a multiple of that of one request at a time."""
    rate: float
    """Arrivals per second."""
    goodput: float
    """Pictures per second that were in time."""
    p50: float
    p95: float
    p99: float
    """Seconds, of those that were in time."""
    refused: int
    late: int
    failed: int
    """Ended in any other way."""
    requests: int


def arrivals(rate: float, seconds: float, steps: Sequence[int], seed: int) -> list[Arrival]:
    """Draw Poisson arrivals; numbers of steps are uniformly distributed."""
    source = np.random.default_rng(seed)
    times = np.cumsum(source.exponential(1 / rate, int(rate * seconds * 2) + 10))
    return [
        Arrival(float(at), request(seed * 100_000 + index, int(source.choice(steps))))
        for index, at in enumerate(times[times < seconds])
    ]


async def send(stub: Any, arrival: Arrival, start: float, deadline: float) -> Outcome:
    """Wait for the arrival's time, then for the answer."""
    await asyncio.sleep(start + arrival.at - time.monotonic())
    begun = time.monotonic()
    try:
        await stub.Composite(arrival.message, timeout=deadline)
    except grpc.aio.AioRpcError as error:
        return Outcome(error.code().name, time.monotonic() - begun)
    return Outcome("OK", time.monotonic() - begun)


async def offer(address: str, load: Sequence[Arrival], deadline: float) -> list[Outcome]:
    """Send all requests at their times."""
    async with grpc.aio.insecure_channel(address, CHANNEL_OPTIONS) as channel:
        stub: Any = CompositorServiceStub(channel)  # type: ignore[no-untyped-call]
        start = time.monotonic() + 0.1
        return list(await asyncio.gather(*(send(stub, each, start, deadline) for each in load)))


def summarize(
    mode: str, load: float, rate: float, seconds: float, deadline: float, outcomes: Sequence[Outcome]
) -> LoadResult:
    """Return the figures of one run."""
    done = [outcome.seconds for outcome in outcomes if outcome.code == "OK"]
    p50, p95, p99 = np.percentile(done, (50, 95, 99)) if done else (deadline,) * 3
    codes = Counter(outcome.code for outcome in outcomes)
    return LoadResult(
        mode=mode,
        load=load,
        rate=rate,
        # includes requests that arrived before the end and were finished after it
        goodput=len(done) / max(seconds, 1e-9),
        p50=float(p50),
        p95=float(p95),
        p99=float(p99),
        refused=codes[_REFUSED],
        late=codes[_LATE],
        failed=codes.total() - codes["OK"] - codes[_REFUSED] - codes[_LATE],
        requests=len(outcomes),
    )


async def one_by_one(address: str, steps: Iterable[int], seed: int) -> float:
    """Send requests with these numbers of steps, each alone, and return the mean of their seconds.

    Args:
        address: host:port of the server.
        steps: of each request.
        seed: of the first; the others have the next ones.

    Raises:
        AnyDoorError: one failed.
    """
    requests = [request(seed + index, count) for index, count in enumerate(steps)]
    async with grpc.aio.insecure_channel(address, CHANNEL_OPTIONS) as channel:
        stub: Any = CompositorServiceStub(channel)  # type: ignore[no-untyped-call]
        begun = time.monotonic()
        try:
            for each in requests:
                await stub.Composite(each)
        except grpc.aio.AioRpcError as error:
            raise AnyDoorError(
                f"the server failed a single request: {error.code().name}, {error.details()}"
            ) from error
        return (time.monotonic() - begun) / len(requests)


@dataclass
class LoadTest:
    """Offers the same load to a server of every way of batching."""

    bundle: Path
    loads: Sequence[float]
    """Rates of arrivals, as multiples of that of one request at a time."""
    steps: Sequence[int]
    """Of a request; drawn from these."""
    deadline_factor: float = 10
    """The deadline, as a multiple of the time of one request alone."""
    requests: int = 60
    """Mean number in each run."""
    seconds: float | None = None
    """Of each run; overrides `requests`."""
    seed: int = 1
    flags: Sequence[str] = field(default_factory=list)
    """Further ones of the server."""
    alone: float = 0.0
    """Seconds of one request alone; measured before the first row."""

    @property
    def deadline(self) -> float:
        """Seconds that a request may take."""
        return self.deadline_factor * self.alone

    def rows(self) -> Iterator[LoadResult]:
        """Yield a row per way of batching and rate.

        Raises:
            AnyDoorError: a server did not start, or failed a request that was alone.
        """
        for mode, flags in BATCHING.items():
            with ServerProcess(self.bundle, *self.flags, *flags) as server:
                # the first call with a number of steps compiles and captures
                asyncio.run(one_by_one(server.address, self.steps, seed=0))
                if not self.alone:
                    # the first way is one at a time; each number of steps is as frequent as in the load
                    self.alone = asyncio.run(one_by_one(server.address, [*self.steps] * _ALONE, seed=900))
                for number, load in enumerate(self.loads):
                    yield self._offer(server.address, mode, load, number)

    def _offer(self, address: str, mode: str, load: float, number: int) -> LoadResult:
        rate = load / self.alone
        seconds = self.seconds or self.requests / rate
        # no request comes twice: the server would have what it kept of the first
        sent = arrivals(rate, seconds, self.steps, 1000 * self.seed + number + 1)
        outcomes = asyncio.run(offer(address, sent, self.deadline))
        return summarize(mode, load, rate, seconds, self.deadline, outcomes)
