"""Does the runtime compute what the original computes? Compares every stage with recordings.

    python benchmarks/parity.py --checkpoint small.safetensors CASE.npz [...]

Prints a table with the measured error and the tolerance of every stage. Exits with 1 if a stage is out of its
tolerance.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.support.case_options import add_case_options, bundle_of, read_runs
from benchmarks.support.checks import HEADER, Check
from benchmarks.support.comparison import RunComparison, compare_hf_maps
from benchmarks.support.golden import GoldenRun
from engines.errors import AnyDoorError
from runtime import Compositor
from runtime.cli.flags import add_engine_flags, engine_options
from runtime.progress_bar import ProgressBar


def compare(options: argparse.Namespace) -> list[Check]:
    """Run all comparisons and print their rows as they come."""
    runs: list[GoldenRun] = []
    checks: list[Check] = []
    print(HEADER)
    for case in options.cases:
        hf_checks = list(compare_hf_maps(case))
        if hf_checks:
            checks += hf_checks
            print("\n".join(check.row() for check in hf_checks))
            continue
        runs += [run for run in read_runs(case, options) if options.steps in (None, len(run.timesteps or ()))]
    if not runs:
        return checks
    bundle = options.bundle or bundle_of(options, options.precision)
    compositor = Compositor.load(bundle, engine_options(options))
    # a bar in a log is thousands of control characters
    with ProgressBar(unit="step", dynamic_ncols=True, leave=False) as bar:
        comparisons = [RunComparison(run, compositor, bar.update) for run in runs]
        bar.total = sum(comparison.steps() for comparison in comparisons)
        for comparison in comparisons:
            bar.set_description(comparison.run.label)
            for check in comparison.checks():
                checks.append(check)
                bar.write(check.row())
    return checks


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    result = argparse.ArgumentParser(
        prog="parity.py",
        description="Compare the runtime, stage by stage, with cases recorded from the original.",
        epilog="example:\n  python benchmarks/parity.py --checkpoint small.safetensors case0.npz case1.npz\n",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    source = result.add_mutually_exclusive_group(required=True)
    source.add_argument("--checkpoint", type=Path, metavar="CKPT", help="what made the cases")
    source.add_argument("--bundle", type=Path, metavar="DIR", help="a bundle of it")
    add_case_options(result)
    result.add_argument(
        "--steps", type=int, metavar="N", help="only runs recorded with N steps (default: all)"
    )
    result.add_argument("--precision", choices=("fp32", "fp16"), default="fp32")
    add_engine_flags(result)
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns 0, 1 if a stage is out of tolerance, or 2 if something cannot be read."""
    options = parser().parse_args(arguments)
    try:
        checks = compare(options)
    except AnyDoorError as error:
        print(f"parity.py: {error}", file=sys.stderr)
        return 2
    if not checks:
        print("parity.py: none of the files holds a run to compare", file=sys.stderr)
        return 2
    failed = [check for check in checks if not check.passed]
    count = f"parity: {len(options.cases)} cases, {len(checks)} stages"
    if failed:
        names = ", ".join(f"{check.run} {check.stage}" for check in failed[:5])
        print(f"{count}, {len(failed)} out of tolerance: {names}{' ...' if len(failed) > 5 else ''}")
        return 1
    # a lower limit is nearly used up by any value close to it: only errors say how close it was
    worst = max((c for c in checks if c.tolerance.startswith("<=")), key=lambda c: c.used, default=checks[0])
    print(
        f"{count}, all within tolerance (worst {worst.run} {worst.stage}: {worst.used:.0%} of its tolerance)"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
