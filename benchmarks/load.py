"""How much load does a server bear? Compares continuous batching with static batching and one at a time.

    python benchmarks/load.py --bundle examples/anydoor-small --output build/load.png

The load is open-loop: requests arrive at random (Poisson) at several rates, whether or not earlier ones are
done, like those of many independent users. Arrivals and requests are the same for all three ways of batching.
Each request has its own object, scene, place and number of steps. A request that is refused or misses its
deadline is lost. Rates are multiples of the rate of one request at a time, which is measured first.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import grpc
import numpy as np

from benchmarks.support.bundle_option import add_bundle_option
from benchmarks.support.machine import describe
from benchmarks.support.results import require_writable, write_results
from benchmarks.support.server_process import ServerProcess, request
from engines.errors import AnyDoorError
from runtime.rpc import compositor_pb2 as pb
from runtime.rpc.compositor_pb2_grpc import CompositorServiceStub

BATCHING = {
    "one at a time": ("--max-batch=1",),
    "static": ("--batching=static",),
    "continuous": (),
}
"""Way of batching -> flags of the server."""
_OPTIONS = [("grpc.enable_retries", 0), ("grpc.max_receive_message_length", -1)]
_WARM_UP = 4


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
    async with grpc.aio.insecure_channel(address, _OPTIONS) as channel:
        stub: Any = CompositorServiceStub(channel)  # type: ignore[no-untyped-call]
        for seed in range(_WARM_UP):
            await stub.Composite(request(seed, 2))
        start = time.monotonic() + 0.1
        return list(await asyncio.gather(*(send(stub, each, start, deadline) for each in load)))


def summarize(
    mode: str, load: float, rate: float, seconds: float, deadline: float, outcomes: Sequence[Outcome]
) -> LoadResult:
    """Return the figures of one run."""
    done = [outcome.seconds for outcome in outcomes if outcome.code == "OK"]
    p50, p95, p99 = np.percentile(done, (50, 95, 99)) if done else (deadline,) * 3
    codes = [outcome.code for outcome in outcomes]
    return LoadResult(
        mode=mode,
        load=load,
        rate=rate,
        # includes requests that arrived before the end and were finished after it
        goodput=len(done) / max(seconds, 1e-9),
        p50=float(p50),
        p95=float(p95),
        p99=float(p99),
        refused=codes.count("RESOURCE_EXHAUSTED"),
        late=codes.count("DEADLINE_EXCEEDED"),
        requests=len(outcomes),
    )


async def service_seconds(address: str, steps: Sequence[int], count: int = 8) -> float:
    """Return the mean time of a request that is alone."""
    load = [Arrival(0.0, request(900 + index, steps[index % len(steps)])) for index in range(count)]
    async with grpc.aio.insecure_channel(address, _OPTIONS) as channel:
        stub: Any = CompositorServiceStub(channel)  # type: ignore[no-untyped-call]
        for seed in range(_WARM_UP):
            await stub.Composite(request(seed, 2))
        begun = time.monotonic()
        for each in load:
            await stub.Composite(each.message)
        return (time.monotonic() - begun) / count


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
        """Yield a row per way of batching and rate."""
        for mode, flags in BATCHING.items():
            with ServerProcess(self.bundle, *self.flags, *flags) as server:
                # the first way is one at a time
                self.alone = self.alone or asyncio.run(service_seconds(server.address, self.steps))
                for load in self.loads:
                    yield self._offer(server.address, mode, load)

    def _offer(self, address: str, mode: str, load: float) -> LoadResult:
        rate = load / self.alone
        seconds = self.seconds or self.requests / rate
        sent = arrivals(rate, seconds, self.steps, self.seed)
        outcomes = asyncio.run(offer(address, sent, self.deadline))
        return summarize(mode, load, rate, seconds, self.deadline, outcomes)


def table(rows: Sequence[LoadResult]) -> str:
    """Format all rows."""
    head = f"{'arrivals/s':>10} {'batching':<14} {'in time/s':>9} {'p50 s':>7} {'p95 s':>7} {'p99 s':>7}"
    lines = [f"{head} {'refused':>8} {'late':>5} {'of':>5}"]
    for row in rows:
        lines.append(
            f"{row.rate:>10.2f} {row.mode:<14} {row.goodput:>9.2f} {row.p50:>7.2f} {row.p95:>7.2f} "
            f"{row.p99:>7.2f} {row.refused:>8} {row.late:>5} {row.requests:>5}"
        )
    return "\n".join(lines)


def plot(rows: Sequence[LoadResult], deadline: float, path: Path) -> None:
    """Plot goodput and p95 against the rate of arrivals."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for mode in BATCHING:
        of_mode = [row for row in rows if row.mode == mode]
        rates = [row.rate for row in of_mode]
        left.plot(rates, [row.goodput for row in of_mode], marker="o", label=mode)
        right.plot(rates, [row.p95 for row in of_mode], marker="o", label=mode)
    offered = sorted({row.rate for row in rows})
    left.plot(offered, offered, color="grey", linestyle=":", label="all that arrives")
    right.axhline(deadline, color="grey", linestyle=":", label="deadline")
    left.set(xlabel="arrivals per second", ylabel="pictures in time per second")
    right.set(xlabel="arrivals per second", ylabel="95th percentile of the time, s", ylim=(0, None))
    left.legend()
    right.legend()
    figure.savefig(path, dpi=120)


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    result = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_bundle_option(result)
    result.add_argument(
        "--loads",
        type=float,
        nargs="+",
        default=[0.5, 0.8, 1.0, 1.3, 1.8],
        metavar="X",
        help="rates of arrivals, as multiples of that of one request at a time",
    )
    result.add_argument("--requests", type=int, default=60, metavar="N", help="mean number in each run")
    result.add_argument(
        "--steps", type=int, nargs="+", default=[10, 20, 30], metavar="N", help="drawn from these"
    )
    result.add_argument(
        "--deadline",
        type=float,
        default=10,
        metavar="X",
        help="as a multiple of the time of one request alone",
    )
    result.add_argument("--queue", type=int, default=16, metavar="N", help="of the server")
    result.add_argument("--seed", type=int, default=1, metavar="S", help="of arrivals and requests")
    result.add_argument(
        "--output",
        type=Path,
        default=Path("build/load.png"),
        metavar="FILE",
        help="the plot; results are beside it, with .json",
    )
    result.add_argument("--quiet", action="store_true", help="no progress bar")
    result.add_argument(
        "--serve",
        nargs="*",
        default=[],
        metavar="FLAG",
        help="further flags of the server, like --serve=--threads=2",
    )
    return result


def measure(test: LoadTest, quiet: bool) -> list[LoadResult]:
    """Return all rows, with a progress bar."""
    from tqdm import tqdm

    rows = []
    with tqdm(total=len(BATCHING) * len(test.loads), unit="run", disable=quiet or None) as bar:
        for row in test.rows():
            rows.append(row)
            bar.set_description(f"{row.mode}, {row.rate:.2f}/s")
            bar.update()
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table, write the plot and a results file beside it; returns 0 or 2."""
    options = parser().parse_args(arguments)
    test = LoadTest(
        bundle=options.bundle,
        loads=options.loads,
        steps=options.steps,
        deadline_factor=options.deadline,
        requests=options.requests,
        seed=options.seed,
        flags=[f"--queue={options.queue}", *options.serve],
    )
    try:
        require_writable(options.output)
        rows = measure(test, options.quiet)
    except AnyDoorError as error:
        print(f"load.py: {error}", file=sys.stderr)
        return 2
    print(
        f"one request alone: {test.alone:.3f} s; deadline {test.deadline:.2f} s; "
        f"steps drawn from {options.steps}"
    )
    print(table(rows))
    plot(rows, test.deadline, options.output)
    results = {
        "machine": describe(),
        "alone": test.alone,
        "deadline": test.deadline,
        "rows": [asdict(row) for row in rows],
    }
    write_results(options.output.with_suffix(".json"), results)
    print(f"{options.output} and {options.output.with_suffix('.json')}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
