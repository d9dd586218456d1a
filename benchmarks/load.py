"""How much load does a server bear? Compares continuous batching with static batching and one at a time.

    python benchmarks/load.py --bundle examples/anydoor-small --output build/load.png

The load is open-loop: requests arrive at random (Poisson) at several rates, whether or not earlier ones are
done, like those of many independent users. At each rate, arrivals and requests are the same for all three
ways of batching. Each request has its own object, scene, place and number of steps. A request that is refused
or misses its deadline is lost; none may end in another way. Rates are multiples of the rate of one request at
a time, which is measured first.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from benchmarks.support.bundle_option import add_bundle_option
from benchmarks.support.machine import describe
from benchmarks.support.numbers import positive
from benchmarks.support.open_load import BATCHING, LoadResult, LoadTest
from benchmarks.support.results import require_writable, write_results
from engines.errors import AnyDoorError


def table(rows: Sequence[LoadResult]) -> str:
    """Format all rows."""
    head = f"{'arrivals/s':>10} {'batching':<14} {'in time/s':>9} {'p50 s':>7} {'p95 s':>7} {'p99 s':>7}"
    lines = [f"{head} {'refused':>8} {'late':>5} {'failed':>6} {'of':>5}"]
    for row in rows:
        lines.append(
            f"{row.rate:>10.2f} {row.mode:<14} {row.goodput:>9.2f} {row.p50:>7.2f} {row.p95:>7.2f} "
            f"{row.p99:>7.2f} {row.refused:>8} {row.late:>5} {row.failed:>6} {row.requests:>5}"
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
        type=positive(float),
        nargs="+",
        default=[0.5, 0.8, 1.0, 1.3, 1.8],
        metavar="X",
        help="rates of arrivals, as multiples of that of one request at a time",
    )
    result.add_argument(
        "--requests", type=positive(int), default=60, metavar="N", help="mean number in each run"
    )
    result.add_argument(
        "--steps", type=positive(int), nargs="+", default=[10, 20, 30], metavar="N", help="drawn from these"
    )
    result.add_argument(
        "--deadline",
        type=positive(float),
        default=10,
        metavar="X",
        help="as a multiple of the time of one request alone",
    )
    result.add_argument("--queue", type=int, default=16, metavar="N", help="length of the server's queue")
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


def measure(test: LoadTest, quiet: bool, rows: list[LoadResult]) -> None:
    """Append all rows, with a progress bar.

    Raises:
        AnyDoorError: a server cannot be measured; the rows before it stay.
    """
    from runtime.progress_bar import ProgressBar

    with ProgressBar(total=len(BATCHING) * len(test.loads), unit="run", disable=quiet or None) as bar:
        for row in test.rows():
            rows.append(row)
            bar.set_description(f"{row.mode}, {row.rate:.2f}/s")
            bar.update()


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table, write the plot and a results file; returns 0, 1 if a request failed, or 2."""
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
    rows: list[LoadResult] = []
    code = 0
    try:
        require_writable(options.output)
        measure(test, options.quiet, rows)
    except AnyDoorError as error:
        print(f"load.py: {error}", file=sys.stderr)
        code = 2
    if rows:
        given = sys.argv[1:] if arguments is None else arguments
        write(test, rows, shlex.join(["python", "benchmarks/load.py", *given]), options.output)
    return code or int(any(row.failed for row in rows))


def write(test: LoadTest, rows: Sequence[LoadResult], command: str, path: Path) -> None:
    """Print the table, and write the plot and the results."""
    print(
        f"one request alone: {test.alone:.3f} s; deadline {test.deadline:.2f} s; "
        f"steps drawn from {test.steps}"
    )
    print(table(rows))
    plot(rows, test.deadline, path)
    results = {
        "command": command,
        "machine": describe(),
        "alone": test.alone,
        "deadline": test.deadline,
        "rows": [asdict(row) for row in rows],
    }
    write_results(path.with_suffix(".json"), results)
    print(f"{path} and {path.with_suffix('.json')}")


if __name__ == "__main__":
    sys.exit(main())
