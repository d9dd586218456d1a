"""Every stage of the small network against the recordings of the original, in every form of its graphs."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks.support.card.task import Row, Task, reason
from benchmarks.support.checks import Check
from benchmarks.support.comparison import RunComparison
from benchmarks.support.golden import read_case
from runtime import Compositor

BUNDLES = {"cuda": ("any-fp32", "cuda-fp32", "cuda-fp16"), "cpu": ("any-fp32",)}
"""Device -> bundles of the small network, by target and precision."""

_LEAST = 10
"""Stages that are compared although time is over: pre-processing and ID tokens."""

CASE = Path(__file__).parents[3] / "tests" / "data" / "drawn.npz"


def parity(task: Task) -> Iterator[Row]:
    """Compare every bundle."""
    bundles = BUNDLES[task.device]
    for number, name in enumerate(bundles):
        now = time.monotonic()
        until = now + (task.deadline - now) / (len(bundles) - number)
        try:
            yield {"bundle": name, **_compare(Path(task.folder) / name, task, until)}
        except Exception as error:  # also those of the library that runs the graphs
            yield {"bundle": name, "failure": reason(error)}


def _compare(bundle: Path, task: Task, until: float) -> Row:
    compositor = Compositor.load(bundle, task.engine_options)
    checks: list[Check] = []
    for run in read_case(CASE):
        for check in RunComparison(run, compositor, lambda: None).checks():
            checks.append(check)
            if len(checks) >= _LEAST and time.monotonic() > until:
                return _summary(checks, complete=False)
    return _summary(checks, complete=True)


def _summary(checks: list[Check], complete: bool) -> Row:
    # a lower limit is nearly used up by any value close to it: only errors say how close it was
    worst = max(checks, key=lambda check: check.used if check.tolerance.startswith("<=") else 0.0)
    return {
        "stages": len(checks),
        "within": sum(check.passed for check in checks),
        "complete": complete,
        "worst": f"{worst.run} {worst.stage}",
        "used": worst.used,
        "checks": [
            [check.run, check.stage, check.measured, check.tolerance, check.passed] for check in checks
        ],
    }
