"""How many servers does a load need, and what is it worth to send a placement to the one that holds its maps?

    python benchmarks/fleet.py --output build/fleet.json

A simulation (`support/fleet_model.py`), not a measurement: placements arrive at random (Poisson), each is
drawn and then re-rolled a few times, and every server batches steps and keeps maps as `anydoor serve` does.
Its service times are those of a prototype of the graphs on an H100 (docs/scale.md); flags take others. For
one load and one number of servers, the same placements arrive at the same times.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from benchmarks.support.fleet_model import Fleet, FleetResult, Load, ServiceTimes
from benchmarks.support.results import require_writable, write_results
from runtime.errors import InputError

_WARM_UP = 120.0
"""Seconds; several times as long as somebody has to do with a placement."""
_LEAST_SERVERS = 50


def table(rows: Sequence[FleetResult]) -> str:
    """Format all rows."""
    lines = [
        f"{'servers':>7} {'affinity':>8} {'keep':>5} {'pictures/s each':>15} {'busy':>5} {'with maps':>9} "
        f"{'p50 s':>6} {'p95 s':>7}"
    ]
    for row in rows:
        affinity = "yes" if row.affinity else "no"
        lines.append(
            f"{row.servers:>7} {affinity:>8} {row.kept:>5} {row.per_server:>15.2f} {row.busy:>5.0%} "
            f"{row.with_maps:>9.0%} {row.p50:>6.2f} {row.p95:>7.2f}"
        )
    return "\n".join(lines)


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    result = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    result.add_argument(
        "--servers",
        type=int,
        nargs="+",
        default=[1, 10, 100, 1000],
        metavar="N",
        help="default: 1 10 100 1000",
    )
    result.add_argument(
        "--loads",
        type=float,
        nargs="+",
        default=[0.8, 1.2, 1.6],
        metavar="X",
        help="pictures/s for each (default: 0.8 1.2 1.6)",
    )
    result.add_argument(
        "--rerolls", type=float, default=3.0, metavar="X", help="mean number per placement (default: 3)"
    )
    result.add_argument(
        "--pause", type=float, default=15.0, metavar="S", help="mean time before a re-roll (default: 15)"
    )
    result.add_argument(
        "--picture", type=float, default=0.87, metavar="S", help="of a new placement, alone (default: 0.87)"
    )
    result.add_argument(
        "--reroll", type=float, default=0.47, metavar="S", help="whose maps are kept, alone (default: 0.47)"
    )
    result.add_argument("--steps", type=int, default=50, metavar="N", help="of a picture (default: 50)")
    result.add_argument(
        "--step-ms",
        type=float,
        nargs="+",
        default=[8.00, 12.14, 16.75, 21.36],
        metavar="MS",
        help="of a call for 1, 2, ... samples, as many as a batch has (default: 8 12.14 16.75 21.36; "
        "that for 3 is interpolated)",
    )
    result.add_argument(
        "--kept",
        type=int,
        nargs="+",
        default=[3, 30],
        metavar="N",
        help="placements whose maps a server keeps (default: 3 30)",
    )
    result.add_argument(
        "--seconds", type=float, default=300.0, metavar="S", help="of each row, after 120 (default: 300)"
    )
    result.add_argument("--seed", type=int, default=1, metavar="S", help="of arrivals (default: 1)")
    result.add_argument("--output", type=Path, metavar="FILE", help="results, .json")
    return result


def simulate(options: argparse.Namespace) -> list[FleetResult]:
    """Return all rows.

    Raises:
        InputError: a time is not positive, or a re-roll is shorter than its steps.
    """
    step = [milliseconds / 1000 for milliseconds in options.step_ms]
    times = ServiceTimes(
        step=step,
        steps=options.steps,
        maps=options.picture - options.reroll,
        rest=options.reroll - options.steps * step[0],
    )
    if min(*step, times.maps, times.rest) < 0 or min(options.servers) < 1 or min(options.loads) <= 0:
        raise InputError(
            "numbers of servers and loads must be positive, a picture must take as long as a re-roll, and "
            f"that as long as its steps: {options.steps} x {options.step_ms[0]} ms"
        )
    rows = []
    for servers, kept, per_server in itertools.product(options.servers, options.kept, options.loads):
        load = Load(per_server, options.rerolls, options.pause)
        # a single server gets everything anyway
        for affinity in (False, True)[: min(servers, 2)]:
            fleet = Fleet(servers, times, load, affinity, kept, options.seed)
            # few servers see few pictures in that time
            rows.append(fleet.run(_WARM_UP, options.seconds * max(1, _LEAST_SERVERS / servers)))
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table, write the results; returns 0 or 2."""
    options = parser().parse_args(arguments)
    try:
        if options.output:
            require_writable(options.output)
        rows = simulate(options)
    except InputError as error:
        print(f"fleet.py: {error}", file=sys.stderr)
        return 2
    print(table(rows))
    if options.output:
        given = {name: value for name, value in vars(options).items() if name != "output"}
        write_results(options.output, {"given": given, "rows": [asdict(row) for row in rows]})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
