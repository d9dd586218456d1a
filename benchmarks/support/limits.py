"""The limits that follow from operations, bytes and a machine's rates (roofline), as numbers and tables."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from benchmarks.support.graph_costs import GraphCost
from benchmarks.support.graphs import DECODE, DENOISE, PER_STEP
from benchmarks.support.peaks import PUBLISHED, Peak


def count_table(costs: Mapping[str, GraphCost]) -> str:
    """Format operations and bytes of every graph."""
    head = f"{'graph':<12} {'matrix GFLOP':>13} {'other GFLOP':>12} {'weights MB':>11} {'in and out MB':>14}"
    lines = [f"{head} {'unfused MB':>11}"]
    for graph, cost in costs.items():
        lines.append(
            f"{graph:<12} {cost.matrix_flops / 1e9:>13.2f} {cost.other_flops / 1e9:>12.3f} "
            f"{cost.weight_bytes / 1e6:>11.1f} {cost.io_bytes / 1e6:>14.1f} {cost.unfused_bytes / 1e6:>11.0f}"
        )
    return "\n".join(lines)


def picture_limit(
    costs: Mapping[str, GraphCost], peak: Peak, steps: int, reroll: bool = False, bytes_factor: float = 1.0
) -> float:
    """Return the least seconds that a picture can take; of a re-roll, only steps and decoding."""
    return sum(
        cost.limit(peak, bytes_factor) * (steps if graph in PER_STEP else 1)
        for graph, cost in costs.items()
        if not reroll or graph in (DENOISE, DECODE)
    )


def estimate_table(costs: Mapping[str, GraphCost], precision: str, steps: int = 50) -> str:
    """Format the limits, in FP16, of machines that nothing ran on."""
    factor = 0.5 if precision == "fp32" else 1.0
    head = f"{'ESTIMATE, FP16':<22} {'TFLOP/s':>8} {'GB/s':>6}"
    head += "".join(f" {graph + ' ms':>13}" for graph in costs)
    lines = [f"{head} {f'{steps} steps s':>11} {'re-roll s':>10}"]
    for peak in PUBLISHED:
        row = f"{peak.machine:<22} {peak.tflops:>8.1f} {peak.gbs:>6.0f}"
        row += "".join(f" {cost.limit(peak, factor) * 1e3:>13.3f}" for cost in costs.values())
        whole = picture_limit(costs, peak, steps, bytes_factor=factor)
        reroll = picture_limit(costs, peak, steps, reroll=True, bytes_factor=factor)
        lines.append(f"{row} {whole:>11.2f} {reroll:>10.2f}")
    lines.append("Computed from published figures, not measured; no implementation reaches them:")
    lines += [f"  {peak.machine}: {peak.source}" for peak in PUBLISHED]
    return "\n".join(lines)


def limit_table(costs: Mapping[str, GraphCost], peak: Peak, steps: int = 50) -> str:
    """Format the limits on a machine whose rates were measured."""
    lines = [f"{peak.machine}: {peak.tflops * 1e3:.0f} GFLOP/s, {peak.gbs:.1f} GB/s ({peak.source})"]
    lines += [f"  {graph}: at least {cost.limit(peak):.4f} s per call" for graph, cost in costs.items()]
    lines.append(
        f"  a picture, {steps} steps with guidance: at least {picture_limit(costs, peak, steps):.2f} s"
    )
    return "\n".join(lines)


def as_json(costs: Mapping[str, GraphCost], precision: str, steps: int = 50) -> dict[str, Any]:
    """Return counts and estimates for a results file."""
    factor = 0.5 if precision == "fp32" else 1.0
    estimates = []
    for peak in PUBLISHED:
        limits = {graph: cost.limit(peak, factor) for graph, cost in costs.items()}
        whole = picture_limit(costs, peak, steps, bytes_factor=factor)
        estimates.append({**asdict(peak), "limit_seconds": limits, "picture_seconds": whole, "steps": steps})
    return {"graphs": [asdict(cost) for cost in costs.values()], "estimates_fp16": estimates}
