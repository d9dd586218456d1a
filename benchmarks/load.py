"""How much load does a server bear? Compares continuous batching with static batching and one at a time.

    python benchmarks/load.py --bundle examples/anydoor-small --output build/load.png

The load is open-loop: requests arrive at random (Poisson) at several rates, whether or not earlier ones are
done, like those of many independent users. Arrivals and requests are the same for all three ways of batching.
Each request has its own object, scene, place and number of steps. A request that is refused or misses its
deadline is lost. Rates are multiples of the rate of one request at a time, which is measured first.
"""

from __future__ import annotations

import argparse
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


def measure(test: LoadTest, quiet: bool) -> list[LoadResult]:
    """Return all rows, with a progress bar."""
    from runtime.progress_bar import ProgressBar

    rows = []
    with ProgressBar(total=len(BATCHING) * len(test.loads), unit="run", disable=quiet or None) as bar:
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
