"""What the measurements of `benchmarks/latency.py` come to: tables, results file, plot."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.latency_process import (
    BATCH,
    COLD,
    PER_STEP,
    PICTURE,
    PYTORCH,
    REROLL,
    SAMPLES,
    STAGES,
    Call,
    Plan,
    Subject,
)
from benchmarks.roofline import GraphCost, Peak, as_json, count_table, estimate_table

REPORTED_STEPS = (50, 20)

LEAST_PSNR = {"fp32": 40.0, "float32": 40.0, "bf16": 35.0}
"""Precision -> least dB between its picture and that of PyTorch in FP32."""


@dataclass
class Row:
    """All that was measured of one subject."""

    subject: Subject
    calls: list[Call] = field(default_factory=list)
    failure: str = ""
    psnr: float | None = None
    """dB against the first PyTorch subject, in the region that was drawn."""
    joules: dict[str, list[float]] = field(default_factory=dict)
    """Scenario -> energy of each call."""
    device_mb: float | None = None

    def of(self, scenario: str) -> list[Call]:
        """The calls of a scenario."""
        return [call for call in self.calls if call.scenario == scenario]

    @property
    def staged(self) -> list[Call]:
        """Pictures whose stages were timed."""
        return [call for call in self.of(PICTURE) if call.stages]

    def per_step(self, call: Call) -> float:
        """Seconds of one more step of a call."""
        staged = [call] if call.stages else [c for c in self.of(call.scenario) if c.stages]
        return float(np.median([sum(c.stages[stage] for stage in PER_STEP) / c.steps for c in staged]))

    def seconds(self, scenario: str, steps: int) -> list[float]:
        """Seconds per picture of every call, at a number of steps that need not be the measured one."""
        calls = self.of(scenario)
        # waiting for every stage takes time of its own
        calls = [call for call in calls if not call.stages] or calls
        return [(call.seconds + (steps - call.steps) * self.per_step(call)) / call.pictures for call in calls]

    def typical(self, scenario: str, steps: int) -> float | None:
        """The median of `seconds`."""
        found = self.seconds(scenario, steps) if self.staged else []
        return float(np.median(found)) if found else None

    def scenario_for(self, scenario: str) -> str:
        """What is measured for a scenario: plain PyTorch keeps nothing, so its re-roll is a picture."""
        return PICTURE if scenario == REROLL and self.subject.kind == PYTORCH else scenario

    def stage_calls(self, stage: str) -> list[float]:
        """Seconds of a stage, of one step if it is part of every step."""
        return [c.stages[stage] / (c.steps if stage in PER_STEP else 1) for c in self.staged]

    def peak_gb(self, *scenarios: str) -> float | None:
        """Largest resident memory in some scenarios."""
        found = [c.peak_gb for c in self.calls if c.scenario in scenarios and c.peak_gb is not None]
        return max(found, default=None)


@dataclass(frozen=True)
class Findings:
    """Everything that a run of the command found out."""

    name: str
    plan: Plan
    threads: int
    rows: Sequence[Row]
    costs: Mapping[str, GraphCost]
    """Empty for a bundle of plans, which cannot be counted."""
    peaks: Mapping[tuple[str, str], Peak]
    """Device and dtype -> what the machine can do."""
    precision: str
    """fp32 or fp16, of the graphs that were counted."""
    power_source: str
    """Who tells the energy; empty if nobody does."""
    machine: Mapping[str, object]
    """What it ran on, see `benchmarks.machine.describe`, and how busy that was before."""

    @property
    def reference(self) -> Row | None:
        """What the others are compared with: PyTorch, eager."""
        return next((row for row in self.rows if row.subject.kind == PYTORCH and row.staged), None)

    @property
    def compared_rows(self) -> list[Row]:
        """Those that must draw the picture of the reference, if that is in FP32; see `LEAST_PSNR`."""
        if self.reference is None or self.reference.subject.array_dtype != "float32":
            return []
        return [row for row in self.rows if row.subject.dtype in LEAST_PSNR]

    def share_of_limit(self, row: Row, stage: str, seconds: float) -> float | None:
        """Least time of a stage over its measured time; None where that is not known.

        PyTorch is held against the same limit: it is that of the result, however it is computed.
        """
        dtype = row.subject.array_dtype
        peak = self.peaks.get((row.subject.device, dtype))
        if peak is None or stage not in self.costs or seconds <= 0:
            return None
        halved = self.precision == "fp32" and dtype != "float32"
        return self.costs[stage].limit(peak, 0.5 if halved else 1.0) / seconds


# --- tables -----------------------------------------------------------------------------------------------


def _cell(value: float | None, width: int, digits: int = 2) -> str:
    return f"{'-':>{width}}" if value is None else f"{value:>{width}.{digits}f}"


def summary_table(findings: Findings, steps: int) -> str:
    """Seconds per picture of every scenario, and how many times faster than PyTorch."""
    lines = [
        f"{f'at {steps} steps, s per picture':<38} {'p50':>8} {'p90':>8} {'p99':>8} {'re-roll':>8} "
        f"{'samples':>8} {'batch':>8} {'per min':>8}   times PyTorch eager: picture, re-roll, samples, batch"
    ]
    for row in findings.rows:
        if not row.staged:
            continue
        found = row.seconds(PICTURE, steps)
        p50, p90, p99 = (float(np.percentile(found, q)) for q in (50, 90, 99))
        reroll = row.typical(row.scenario_for(REROLL), steps)
        samples, batch = row.typical(SAMPLES, steps), row.typical(BATCH, steps)
        line = f"{row.subject.name:<38}" + "".join(
            f" {_cell(value, 8)}" for value in (p50, p90, p99, reroll, samples, batch)
        )
        fastest = min(value for value in (p50, batch) if value is not None)
        line += f" {60 / fastest:>8.2f}"
        if findings.reference is not None:
            ratios = speedups(row, findings.reference, steps)
            line += "  " + " ".join(_cell(ratios[scenario], 6) for scenario in ratios)
        lines.append(line)
    return "\n".join(lines)


def speedups(row: Row, reference: Row, steps: int) -> dict[str, float | None]:
    """Scenario -> how many times faster per picture than the reference does the same."""
    ratios: dict[str, float | None] = {}
    for scenario in (PICTURE, REROLL, SAMPLES, BATCH):
        ours = row.typical(row.scenario_for(scenario), steps)
        theirs = reference.typical(reference.scenario_for(scenario), steps)
        ratios[scenario] = theirs / ours if theirs and ours else None
    return ratios


def start_table(rows: Sequence[Row], plan: Plan, meter: str) -> str:
    """Cold starts, memory, energy and whether the picture is the same.

    Memory is that of the steps that were measured: the runtime keeps detail maps of every step, up to the
    size of its cache.
    """
    head = f"{'':<38} {f'cold s ({plan.cold_steps} steps)':>18}"
    head += f" {f'GB, {plan.steps} steps':>12} {f'batch, {plan.extra_steps}':>10}"
    on_card = any(row.device_mb is not None for row in rows)
    head += f" {'card MB':>8}" if on_card else ""
    head += f" {'J per picture':>14}" if meter else ""
    lines = [f"{head} {'PSNR dB':>8}"]
    for row in rows:
        cold = [call.seconds for call in row.of(COLD)]
        line = f"{row.subject.name:<38} {_cell(float(np.median(cold)) if cold else None, 18)}"
        line += f" {_cell(row.peak_gb(COLD, PICTURE, REROLL), 12)} {_cell(row.peak_gb(SAMPLES, BATCH), 10)}"
        line += f" {_cell(row.device_mb, 8, 0)}" if on_card else ""
        if meter:
            spent = row.joules.get(PICTURE)
            line += f" {_cell(float(np.median(spent)) if spent else None, 14, 1)}"
        lines.append(f"{line} {_cell(row.psnr, 8, 1)}{'   ' + row.failure if row.failure else ''}")
    return "\n".join(lines)


def stage_table(findings: Findings) -> str:
    """Seconds of each stage, and how much of them it would take at the machine's full rate."""
    lines = [f"{'stage, s (of its limit)':<38}" + "".join(f" {stage:>17}" for stage in STAGES)]
    for row in findings.rows:
        if not row.staged:
            continue
        line = f"{row.subject.name:<38}"
        for stage in STAGES:
            seconds = float(np.median(row.stage_calls(stage)))
            part = findings.share_of_limit(row, stage, seconds)
            line += f" {f'{seconds:.4f}' + (f' ({part:.0%})' if part is not None else ''):>17}"
        lines.append(line)
    return "\n".join(lines)


def report(findings: Findings) -> str:
    """All tables."""
    plan, rows = findings.plan, findings.rows
    parts = [
        f"{findings.name}, {plan.resolution} px, with guidance; "
        f"{plan.rounds} rounds of {plan.pictures} pictures, {findings.threads} CPU threads"
    ]
    for steps in REPORTED_STEPS:
        parts.append(summary_table(findings, steps))
        if {plan.steps, plan.extra_steps} != {steps}:
            parts[-1] += (
                f"\nextrapolated: pictures from {plan.steps} measured steps, re-rolls and batches from "
                f"{plan.extra_steps}, and the mean time of a step"
            )
    parts.append(start_table(rows, plan, findings.power_source))
    parts.append(stage_table(findings))
    for peak in findings.peaks.values():
        parts.append(f"{peak.machine}: {peak.tflops * 1e3:.0f} GFLOP/s, {peak.gbs:.1f} GB/s ({peak.source})")
    if findings.costs:
        parts += [count_table(findings.costs), estimate_table(findings.costs, findings.precision)]
    return "\n\n".join(parts)


def as_results(findings: Findings, note: str) -> dict[str, Any]:
    """The results file."""
    costs = findings.costs
    return {
        "command": " ".join(["python benchmarks/latency.py", *sys.argv[1:]]),
        "note": note,
        "machine": findings.machine,
        "threads": findings.threads,
        "plan": asdict(findings.plan),
        "peaks": [asdict(peak) for peak in findings.peaks.values()],
        "roofline": as_json(costs, findings.precision) if costs else None,
        "energy_from": findings.power_source or None,
        "rows": [
            {
                "name": row.subject.name,
                **asdict(row),
                # JSON knows no infinity
                "psnr": "equal" if row.psnr == math.inf else row.psnr,
                "summary": summary(row, findings),
            }
            for row in findings.rows
        ],
    }


def summary(row: Row, findings: Findings) -> dict[str, Any]:
    """The figures of the tables."""
    if not row.staged:
        return {}
    result: dict[str, Any] = {}
    for steps in REPORTED_STEPS:
        found = row.seconds(PICTURE, steps)
        result[f"{steps} steps"] = {
            **{f"p{q}": float(np.percentile(found, q)) for q in (50, 90, 99)},
            **{name: row.typical(row.scenario_for(name), steps) for name in (REROLL, SAMPLES, BATCH)},
            "times_pytorch": speedups(row, findings.reference, steps) if findings.reference else None,
        }
    stages = {stage: float(np.median(row.stage_calls(stage))) for stage in STAGES}
    shares = {stage: findings.share_of_limit(row, stage, stages[stage]) for stage in findings.costs}
    return {**result, "stages": stages, "share_of_limit": shares}


def plot(rows: Sequence[Row], steps: int, path: Path) -> None:
    """The stages of a picture, and every scenario, per subject."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [row for row in rows if row.staged]
    places = np.arange(len(rows))
    size = (14, 1.6 + 0.8 * len(rows))
    figure, (left, right) = pyplot.subplots(1, 2, figsize=size, sharey=True, layout="constrained")
    start = np.zeros(len(rows))
    for stage in STAGES:
        count = steps if stage in PER_STEP else 1
        widths = np.array([float(np.median(row.stage_calls(stage))) * count for row in rows])
        left.barh(places, widths, left=start, label=stage.replace("_", " "))
        start += widths
    scenarios = (PICTURE, REROLL, SAMPLES, BATCH)
    height = 0.8 / len(scenarios)
    for index, scenario in enumerate(scenarios):
        seconds = [row.typical(row.scenario_for(scenario), steps) or 0.0 for row in rows]
        right.barh(places - 0.4 + (index + 0.5) * height, seconds, height, label=scenario)
    left.set_yticks(places, [row.subject.name for row in rows])
    left.invert_yaxis()
    left.set(xlabel=f"seconds of a picture, {steps} steps, by stage")
    right.set(xlabel=f"seconds per picture, {steps} steps")
    for axes in (left, right):
        axes.legend(ncols=4, fontsize="small", loc="lower right", bbox_to_anchor=(1, 1), frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
    pyplot.close(figure)
