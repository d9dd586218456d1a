"""Runs the parts of card.py, each in a process of its own: one that crashes or hangs takes no other along."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from benchmarks.support.card.pictures import DEVICE_MEMORY
from benchmarks.support.card.progress import Progress
from benchmarks.support.card.task import Row, Task
from benchmarks.support.fingerprint import ROOT
from benchmarks.support.measuring_process import ProcessFailedError, measured
from benchmarks.support.peaks import Peak
from benchmarks.support.power import PowerMeter

_PATIENCE_FACTOR, _PATIENCE_SECONDS = 3.0, 120.0
"""A part is ended after this times its seconds, and these besides: a slow card still gets its rows."""


class Runner:
    """Runs parts one after the other and compares their rows with the limit of the card."""

    def __init__(self, meter: PowerMeter, peak: Peak | None, flops_per_row: Mapping[str, float]) -> None:
        """Prepare.

        Args:
            meter: measures the card's memory; entered.
            peak: the card's rates; None leaves the limits out.
            flops_per_row: graph -> operations of one of its rows.
        """
        self._meter, self._peak, self._flops = meter, peak, flops_per_row
        self._rows_of_scenario: dict[str, Mapping[str, float]] = {}
        """Scenario -> graph -> rows that the runtime evaluates for it: PyTorch has the same limit."""

    def run(self, task: Task) -> Iterator[dict[str, Any]]:
        """Measure a part, and yield what it found so far after every row, and in the end.

        Yields:
            Its `rows`, `seconds`, `failure` (empty if there is none) and `device_gb`.
        """
        self._meter.settle()
        task = replace(task, started=time.monotonic())
        rows: list[Row] = []
        failure = ""
        with Progress(task.part, task.seconds) as progress:
            try:
                for row in measured(
                    "benchmarks.support.card.process",
                    task.to_json(),
                    folder=ROOT,
                    patience=_PATIENCE_FACTOR * task.seconds + _PATIENCE_SECONDS,
                ):
                    rows.append(self.with_limit(row))
                    progress.print(f"{task.part}: {_text(rows[-1])}")
                    yield self._found(task, rows, "it was stopped before its end")
            except ProcessFailedError as error:
                failure = str(error)
                progress.print(f"{task.part}: {failure}")
        yield self._found(task, rows, failure)

    def _found(self, task: Task, rows: list[Row], failure: str) -> dict[str, Any]:
        return {
            "name": task.part,
            "seconds": time.monotonic() - task.started,
            "failure": failure,
            "device_gb": self._device_gb(task, rows),
            "rows": list(rows),
        }

    def with_limit(self, row: Row) -> Row:
        """Add the least seconds that the card's rated speed allows, and their part of the time."""
        scenario = row.get("scenario", "")
        evaluated = row.get("rows") or self._rows_of_scenario.get(scenario)
        if not evaluated or not self._flops:
            return row
        if scenario:
            self._rows_of_scenario.setdefault(scenario, evaluated)
        flops = sum(count * self._flops[graph] for graph, count in evaluated.items())
        row["tflop"] = flops / 1e12
        if self._peak:
            row["limit"] = row["tflop"] / self._peak.tflops
            if "seconds" in row:
                row["share"] = row["limit"] / row["seconds"]
        return row

    def _device_gb(self, task: Task, rows: list[Row]) -> float | None:
        """Returns the card's memory that a part took: as nvidia-smi saw it, or else as its process said."""
        megabytes = self._meter.device_mb(task.started, time.monotonic())
        if megabytes is not None:
            return megabytes / 1000
        return next((row["gb"] for row in rows if row.get("scenario") == DEVICE_MEMORY), None)


def _text(row: Row) -> str:
    """Returns the plain values of a row, on one line."""
    plain = {key: value for key, value in row.items() if isinstance(value, str | int | float)}
    return ", ".join(
        f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in plain.items()
    )
