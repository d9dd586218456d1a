"""The results of latency.py: tables, results file, plot."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.support.contenders import (
    BATCH,
    COLD,
    PER_STEP,
    PICTURE,
    REROLL,
    SAMPLES,
    Workload,
)
from benchmarks.support.limits import as_json, count_table, estimate_table
from benchmarks.support.measurement import Measurement, Report, speedups

REPORTED_STEPS = (50, 20)


def _cell(value: float | None, width: int, digits: int = 2) -> str:
    return f"{'-':>{width}}" if value is None else f"{value:>{width}.{digits}f}"


def summary_table(report: Report, steps: int) -> str:
    """Format seconds per picture of every scenario, and how many times as fast as PyTorch they are."""
    lines = [
        f"{f'at {steps} steps, s per picture':<38} {'p50':>8} {'p90':>8} {'p99':>8} {'re-roll':>8} "
        f"{'samples':>8} {'batch':>8} {'per min':>8}   times PyTorch eager: picture, re-roll, samples, batch"
    ]
    for row in report.measurements:
        if not row.staged:
            continue
        found = row.seconds(PICTURE, steps)
        p50, p90, p99 = (float(np.percentile(found, q)) for q in (50, 90, 99))
        reroll = row.typical(REROLL, steps)
        samples, batch = row.typical(SAMPLES, steps), row.typical(BATCH, steps)
        line = f"{row.contender.name:<38}" + "".join(
            f" {_cell(value, 8)}" for value in (p50, p90, p99, reroll, samples, batch)
        )
        fastest = min(value for value in (p50, batch) if value is not None)
        line += f" {60 / fastest:>8.2f}"
        if report.baseline is not None:
            ratios = speedups(row, report.baseline, steps)
            line += "  " + " ".join(_cell(ratios[scenario], 6) for scenario in ratios)
        lines.append(line)
    return "\n".join(lines)


def start_table(rows: Sequence[Measurement], workload: Workload, meter: str) -> str:
    """Format cold starts, memory, energy and the PSNR of the picture against that of PyTorch.

    Memory is that of the measured steps: the runtime keeps detail maps of every step, up to the size of its
    cache.
    """
    head = f"{'':<38} {f'cold s ({workload.cold_steps} steps)':>18}"
    head += f" {f'GB, {workload.steps} steps':>12} {f'batch, {workload.extra_steps}':>10}"
    on_card = any(row.device_mb is not None for row in rows)
    head += f" {'card MB':>8}" if on_card else ""
    head += f" {'J per picture':>14}" if meter else ""
    lines = [f"{head} {'PSNR dB':>8}"]
    for row in rows:
        cold = [call.seconds for call in row.of(COLD)]
        line = f"{row.contender.name:<38} {_cell(float(np.median(cold)) if cold else None, 18)}"
        line += f" {_cell(row.peak_gb(COLD, PICTURE, REROLL), 12)} {_cell(row.peak_gb(SAMPLES, BATCH), 10)}"
        line += f" {_cell(row.device_mb, 8, 0)}" if on_card else ""
        if meter:
            spent = row.joules.get(PICTURE)
            line += f" {_cell(float(np.median(spent)) if spent else None, 14, 1)}"
        lines.append(f"{line} {_cell(row.psnr, 8, 1)}{'   ' + row.failure if row.failure else ''}")
    return "\n".join(lines)


def stage_table(report: Report) -> str:
    """Format seconds of each stage, and the share of its limit on this machine (roofline)."""
    lines = [f"{'stage, s (of its limit)':<38}" + "".join(f" {stage:>17}" for stage in report.stages)]
    for row in report.measurements:
        if not row.staged:
            continue
        line = f"{row.contender.name:<38}"
        for stage in report.stages:
            seconds = float(np.median(row.stage_calls(stage)))
            part = report.share_of_limit(row, stage, seconds)
            line += f" {f'{seconds:.4f}' + (f' ({part:.0%})' if part is not None else ''):>17}"
        lines.append(line)
    return "\n".join(lines)


def format_report(report: Report) -> str:
    """Format all tables."""
    workload = report.workload
    parts = [
        f"{report.name}, {workload.resolution} px, with guidance; "
        f"{workload.rounds} rounds of {workload.pictures} pictures, {report.threads} CPU threads"
    ]
    for steps in REPORTED_STEPS:
        parts.append(summary_table(report, steps))
        if {workload.steps, workload.extra_steps} != {steps}:
            parts[-1] += (
                f"\nextrapolated: pictures from {workload.steps} measured steps, re-rolls and batches from "
                f"{workload.extra_steps}, and the mean time of a step"
            )
    parts.append(start_table(report.measurements, workload, report.power_source))
    parts.append(stage_table(report))
    for peak in report.peaks.values():
        parts.append(f"{peak.machine}: {peak.tflops * 1e3:.0f} GFLOP/s, {peak.gbs:.1f} GB/s ({peak.source})")
    if report.costs:
        parts += [count_table(report.costs), estimate_table(report.costs, report.precision)]
    return "\n\n".join(parts)


def as_results(report: Report, note: str) -> dict[str, Any]:
    """Return the content of the results file."""
    costs = report.costs
    return {
        "command": " ".join(["python benchmarks/latency.py", *sys.argv[1:]]),
        "note": note,
        "machine": report.machine,
        "threads": report.threads,
        "workload": asdict(report.workload),
        "peaks": [asdict(peak) for peak in report.peaks.values()],
        "roofline": as_json(costs, report.precision) if costs else None,
        "energy_from": report.power_source or None,
        "rows": [
            {
                "name": row.contender.name,
                **asdict(row),
                # JSON has no infinity
                "psnr": "equal" if row.psnr == math.inf else row.psnr,
                "summary": summary(row, report),
            }
            for row in report.measurements
        ],
    }


def summary(row: Measurement, report: Report) -> dict[str, Any]:
    """Return the figures of the tables for one contender."""
    if not row.staged:
        return {}
    result: dict[str, Any] = {}
    for steps in REPORTED_STEPS:
        found = row.seconds(PICTURE, steps)
        result[f"{steps} steps"] = {
            **{f"p{q}": float(np.percentile(found, q)) for q in (50, 90, 99)},
            **{name: row.typical(name, steps) for name in (REROLL, SAMPLES, BATCH)},
            "times_pytorch": speedups(row, report.baseline, steps) if report.baseline else None,
        }
    stages = {stage: float(np.median(row.stage_calls(stage))) for stage in report.stages}
    shares = {stage: report.share_of_limit(row, stage, stages[stage]) for stage in report.costs}
    return {**result, "stages": stages, "share_of_limit": shares}


def plot(report: Report, steps: int, path: Path) -> None:
    """Draw the stages of a picture, and every scenario, of each contender."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [row for row in report.measurements if row.staged]
    positions = np.arange(len(rows))
    size = (14, 1.6 + 0.8 * len(rows))
    figure, (left, right) = pyplot.subplots(1, 2, figsize=size, sharey=True, layout="constrained")
    start = np.zeros(len(rows))
    for stage in report.stages:
        count = steps if stage in PER_STEP else 1
        widths = np.array([float(np.median(row.stage_calls(stage))) * count for row in rows])
        left.barh(positions, widths, left=start, label=stage.replace("_", " "))
        start += widths
    scenarios = (PICTURE, REROLL, SAMPLES, BATCH)
    height = 0.8 / len(scenarios)
    for index, scenario in enumerate(scenarios):
        seconds = [row.typical(scenario, steps) or 0.0 for row in rows]
        right.barh(positions - 0.4 + (index + 0.5) * height, seconds, height, label=scenario)
    left.set_yticks(positions, [row.contender.name for row in rows])
    left.invert_yaxis()
    left.set(xlabel=f"seconds of a picture, {steps} steps, by stage")
    right.set(xlabel=f"seconds per picture, {steps} steps")
    for axes in (left, right):
        axes.legend(ncols=4, fontsize="small", loc="lower right", bbox_to_anchor=(1, 1), frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
    pyplot.close(figure)
