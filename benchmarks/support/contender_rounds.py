"""Measures all contenders in turn: A B C, A B C, each turn in a process of its own."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.support.contenders import (
    ANYDOOR,
    BATCH,
    COLD,
    PEAK,
    PROBE,
    PYTORCH,
    REROLL,
    SAMPLES,
    Call,
    Contender,
    Run,
    Workload,
)
from benchmarks.support.measurement import Measurement
from benchmarks.support.measuring_process import ProcessFailedError, measured
from benchmarks.support.peaks import Peak
from benchmarks.support.power import PowerMeter
from benchmarks.support.similarity import psnr
from engines.errors import BackendError
from runtime import huge_pages
from runtime.progress_bar import ProgressBar


def require_contender(contender: Contender) -> None:
    """Open a contender once, in a process of its own: an open engine holds memory of the card.

    Raises:
        BackendError: it cannot be opened.
    """
    run = Run(Workload(), contender, None, threads=1, samples=1, scenarios=(PROBE,), guidance_scale=1.0)
    try:
        list(_rows(run))
    except ProcessFailedError as error:
        raise BackendError(str(error)) from error


class Rounds:
    """Takes all contenders through their turns, round after round."""

    def __init__(self, run: Run, contenders: Sequence[Contender], quiet: bool) -> None:
        """Prepare the measurements.

        Args:
            run: what every turn has in common.
            contenders: what is compared.
            quiet: no progress bar.
        """
        self.measurements = [Measurement(contender) for contender in contenders]
        self.peaks: dict[tuple[str, str], Peak] = {}
        """Device and precision -> the best rates of all rounds."""
        self.power_source = ""
        self._common = run
        self._bar = ProgressBar(disable=quiet, unit="call", dynamic_ncols=True)

    def run(self) -> Iterator[None]:
        """Measure everything; stops after every turn, with its figures in `measurements`."""
        workload = self._common.workload
        rounds = range(workload.rounds)
        with tempfile.TemporaryDirectory() as folder, PowerMeter() as meter, self._bar:
            self.power_source = meter.source
            pictures = [Path(folder) / f"{index}.npy" for index in range(len(self.measurements))]
            turns = [
                self._scenarios(number, each.contender) for number in rounds for each in self.measurements
            ]
            self._bar.total = sum(1 + workload.pictures + _extra_calls(turn, workload) for turn in turns)
            for number in rounds:
                self._measure_peaks()
                for measurement, picture in zip(self.measurements, pictures):
                    if not measurement.failure:
                        contender = measurement.contender
                        scenarios = self._scenarios(number, contender)
                        self._bar.set_description(f"round {number + 1}/{workload.rounds}, {contender.name}")
                        common = self._common
                        run = replace(common, contender=contender, scenarios=scenarios, picture=picture)
                        self._take_turn(measurement, run, meter)
                        self._compare(pictures)
                        yield

    def _scenarios(self, number: int, contender: Contender) -> tuple[str, ...]:
        workload = self._common.workload
        if number >= workload.extras_in:
            return ()
        # plain PyTorch keeps nothing: its re-roll is a picture
        kept = (REROLL,) if contender.kind == ANYDOOR else ()
        return (*kept, SAMPLES, BATCH) if workload.batch else (*kept, SAMPLES)

    def _take_turn(self, measurement: Measurement, run: Run, meter: PowerMeter) -> None:
        meter.settle()
        run = replace(run, started=time.monotonic())
        try:
            for row in _rows(run):
                call = Call(**row)
                measurement.calls.append(call)
                self._bar.update()
                joules = meter.joules(call.started, call.seconds)
                if joules is not None and call.scenario != COLD:
                    measurement.joules.setdefault(call.scenario, []).append(joules / call.pictures)
        except ProcessFailedError as error:
            measurement.failure = str(error)
        used = meter.device_mb(run.started, time.monotonic())
        if used is not None:
            measurement.device_mb = max(measurement.device_mb or 0.0, used)

    def _measure_peaks(self) -> None:
        self._bar.set_description("the machine's rates")
        kinds = {(each.contender.device, each.contender.product_precision) for each in self.measurements}
        for device, precision in sorted(kinds):
            run = replace(self._common, contender=Contender(PEAK, device, precision))
            try:
                found = measure_rates(run)
            except ProcessFailedError as error:
                self._bar.write(f"the rates of {device} in {precision} cannot be measured: {error}")
                continue
            best = self.peaks.get((device, precision), found)
            tflops, gbs = max(found.tflops, best.tflops), max(found.gbs, best.gbs)
            self.peaks[device, precision] = replace(found, tflops=tflops, gbs=gbs)

    def _compare(self, pictures: Sequence[Path]) -> None:
        drawn = {
            measurement.contender: np.load(picture)
            for measurement, picture in zip(self.measurements, pictures)
            if picture.exists()
        }
        expected = next((drawn[each] for each in drawn if each.kind == PYTORCH), None)
        for measurement in self.measurements:
            if expected is not None and measurement.contender in drawn:
                measurement.psnr = psnr(drawn[measurement.contender], expected, peak=255)


def _extra_calls(scenarios: Sequence[str], workload: Workload) -> int:
    return sum(workload.pictures if name == REROLL else 1 for name in scenarios)


def measure_rates(run: Run) -> Peak:
    """Measure the machine's rates with a device, a precision and a number of threads.

    Args:
        run: its contender is a `PEAK`.

    Raises:
        ProcessFailedError: they cannot be measured.
    """
    (found,) = _rows(run)
    return Peak(**found)


def _rows(run: Run) -> Iterator[dict[str, Any]]:
    """Runs a contender in a process of its own and yields the rows that it prints.

    Raises:
        ProcessFailedError: it failed.
    """
    threads = str(run.threads)
    variables: Mapping[str, str] = os.environ
    if run.contender.kind == ANYDOOR:  # as the command `anydoor` starts itself
        variables = huge_pages.environment(os.environ) or os.environ
    return measured(
        "benchmarks.support.contender_process",
        run.to_json(),
        variables={**variables, "OMP_NUM_THREADS": threads, "OPENBLAS_NUM_THREADS": threads},
    )
