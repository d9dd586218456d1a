"""What latency.py measured of each contender, and the figures that follow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from benchmarks.support.contenders import (
    BATCH,
    PER_STEP,
    PICTURE,
    PYTORCH,
    REROLL,
    SAMPLES,
    Call,
    Contender,
    Workload,
)
from benchmarks.support.graph_costs import GraphCost
from benchmarks.support.peaks import Peak

LEAST_PSNR = {"fp32": 40.0, "bf16": 35.0}
"""Precision -> least dB between its picture and that of PyTorch in FP32."""


@dataclass
class Measurement:
    """All that was measured of one contender."""

    contender: Contender
    calls: list[Call] = field(default_factory=list)
    failure: str = ""
    psnr: float | None = None
    """dB against the first PyTorch contender, in the region that was drawn."""
    joules: dict[str, list[float]] = field(default_factory=dict)
    """Scenario -> energy per picture of each call."""
    device_mb: float | None = None
    """Memory of the card that it took, in MB."""

    def of(self, scenario: str) -> list[Call]:
        """Return the calls of a scenario."""
        return [call for call in self.calls if call.scenario == scenario]

    @property
    def staged(self) -> list[Call]:
        """Pictures whose stages were timed."""
        return [call for call in self.of(PICTURE) if call.stages]

    def per_step(self, call: Call) -> float:
        """Return the seconds of one more step of a call."""
        staged = [call] if call.stages else [c for c in self.of(call.scenario) if c.stages]
        seconds = [sum(c.stages.get(stage, 0.0) for stage in PER_STEP) / c.steps for c in staged]
        return float(np.median(seconds))

    def seconds(self, scenario: str, steps: int) -> list[float]:
        """Return the seconds per picture of every call, extrapolated to a number of steps."""
        calls = self.of(scenario)
        # waiting for every stage takes time of its own
        calls = [call for call in calls if not call.stages] or calls
        return [(call.seconds + (steps - call.steps) * self.per_step(call)) / call.pictures for call in calls]

    def typical(self, scenario: str, steps: int) -> float | None:
        """Return the median of `seconds`; None if the scenario was not measured."""
        if scenario == REROLL and self.contender.kind == PYTORCH:
            scenario = PICTURE  # plain PyTorch keeps nothing: its re-roll is a picture
        found = self.seconds(scenario, steps) if self.staged else []
        return float(np.median(found)) if found else None

    def stage_calls(self, stage: str) -> list[float]:
        """Return the seconds of a stage in every picture; of one step for the stages of every step."""
        return [c.stages[stage] / (c.steps if stage in PER_STEP else 1) for c in self.staged]

    def peak_gb(self, *scenarios: str) -> float | None:
        """Return the largest resident memory in some scenarios."""
        found = [c.peak_gb for c in self.calls if c.scenario in scenarios and c.peak_gb is not None]
        return max(found, default=None)


@dataclass(frozen=True)
class Report:
    """Everything that one run of latency.py measured."""

    name: str
    workload: Workload
    threads: int
    measurements: Sequence[Measurement]
    costs: Mapping[str, GraphCost]
    """Empty for a bundle of plans, which cannot be counted."""
    peaks: Mapping[tuple[str, str], Peak]
    """Device and precision -> the machine's rates."""
    precision: str
    """fp32 or fp16, of the graphs that were counted."""
    power_source: str
    """What measured the energy; empty if nothing did."""
    machine: Mapping[str, object]
    """See `benchmarks.support.machine.describe`."""

    @property
    def stages(self) -> Sequence[str]:
        """The stages of a picture; none if nothing was timed by stage."""
        return next((tuple(m.staged[0].stages) for m in self.measurements if m.staged), ())

    @property
    def baseline(self) -> Measurement | None:
        """What the others are compared with: PyTorch, eager; None if it was not measured."""
        return next((m for m in self.measurements if m.contender.kind == PYTORCH and m.staged), None)

    @property
    def compared(self) -> list[Measurement]:
        """Those whose picture must be that of the baseline, if the baseline is in FP32; see `LEAST_PSNR`."""
        if self.baseline is None or self.baseline.contender.precision != "fp32":
            return []
        return [m for m in self.measurements if m.contender.precision in LEAST_PSNR]

    def share_of_limit(self, measurement: Measurement, stage: str, seconds: float) -> float | None:
        """Return the least time of a stage / its measured time; None where the limit is not known.

        PyTorch has the same limit: it belongs to the result, however it is computed.
        """
        precision = measurement.contender.product_precision
        peak = self.peaks.get((measurement.contender.device, precision))
        if peak is None or stage not in self.costs or seconds <= 0:
            return None
        halved = self.precision == "fp32" and precision != "fp32"
        return self.costs[stage].limit(peak, 0.5 if halved else 1.0) / seconds


def speedups(measurement: Measurement, baseline: Measurement, steps: int) -> dict[str, float | None]:
    """Return, for each scenario, how many times as fast as the baseline; None if either was not measured."""
    ratios: dict[str, float | None] = {}
    for scenario in (PICTURE, REROLL, SAMPLES, BATCH):
        ours, theirs = measurement.typical(scenario, steps), baseline.typical(scenario, steps)
        ratios[scenario] = theirs / ours if theirs and ours else None
    return ratios
