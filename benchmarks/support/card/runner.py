"""Runs the parts of card.py, each in a process of its own: one that crashes or hangs takes no other along."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import IO, Any

from benchmarks.support.card.pictures import DEVICE_MEMORY
from benchmarks.support.card.progress import Progress
from benchmarks.support.card.task import Row, Task
from benchmarks.support.fingerprint import ROOT
from benchmarks.support.peaks import Peak
from benchmarks.support.power import INTERVAL_SECONDS, PowerMeter

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
        # a reading of the card without the part before
        time.sleep(2 * INTERVAL_SECONDS if self._meter.source else 0)
        task = replace(task, started=time.monotonic())
        rows: list[Row] = []
        with Progress(task.part, task.seconds) as progress, tempfile.TemporaryFile("w+") as errors:
            with _started(task, errors) as process:
                assert process.stdout is not None
                for line in process.stdout:
                    try:
                        row = json.loads(line)
                    except ValueError:
                        continue  # a library may print there, too
                    rows.append(self.with_limit(row))
                    progress.print(f"{task.part}: {_text(rows[-1])}")
                    yield self._found(task, rows, "it was stopped before its end")
            failure = _failure(process.returncode, errors)
            if failure:
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


@contextmanager
def _started(task: Task, errors: IO[str]) -> Iterator[subprocess.Popen[str]]:
    """Yields the process of a part; when the block ends it and all that it started are gone."""
    # ahead of the clone's folder, an installed package of the same name would be imported
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.support.card.process", task.to_json()],
        stdout=subprocess.PIPE,
        stderr=errors,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path},
        start_new_session=True,
    )

    def end() -> None:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)

    patience = threading.Timer(_PATIENCE_FACTOR * task.seconds + _PATIENCE_SECONDS, end)
    patience.start()
    try:
        with process:
            yield process
    finally:
        patience.cancel()
        end()


def _failure(code: int, errors: IO[str]) -> str:
    """Why a process failed; empty if it did not."""
    if not code:
        return ""
    if code == -signal.SIGKILL:
        return "it was ended: it took too long, or memory ran out"
    errors.seek(0)
    lines = errors.read().strip().splitlines()
    return lines[-1] if lines else f"exit code {code}"


def _text(row: Row) -> str:
    """Returns the plain values of a row, on one line."""
    plain = {key: value for key, value in row.items() if isinstance(value, str | int | float)}
    return ", ".join(
        f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in plain.items()
    )
