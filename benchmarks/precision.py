"""Is FP16 exact enough, and does nothing overflow? Runs the FP16 graphs against FP32 on recorded cases.

    python benchmarks/precision.py --checkpoint small.safetensors CASE.npz [...]

Needs no GPU: every result of the FP16 graphs is rounded to FP16 on the CPU (`benchmarks.support.rounding`).
Prints the errors of each run and the largest magnitude in each graph. Exits with 1 if one is out of
tolerance.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.support.case_options import add_case_options, bundle_of, read_runs
from benchmarks.support.checks import TOLERANCES
from benchmarks.support.comparison import Networks
from benchmarks.support.golden import Array, GoldenRun
from benchmarks.support.graphs import GRAPHS
from benchmarks.support.rounding import LARGEST_FP16, RoundingEngine
from benchmarks.support.similarity import psnr, relative_error
from engines.bundle import Bundle
from engines.engine import open_engine
from engines.errors import AnyDoorError
from engines.options import EngineOptions
from runtime import Compositor
from runtime.progress_bar import ProgressBar

PICTURE_PSNR = 40.0
HEADROOM = 8.0
"""Least factor between the largest magnitude of any result and the largest number of FP16."""


@dataclass(frozen=True)
class RunError:
    """What FP16 changes in one recorded run."""

    label: str
    steps: int
    tokens: float
    """Relative error of the ID tokens."""
    latent: float
    """Relative error of the last latents."""
    psnr: float
    """Of the decoded picture, 0..255, in dB."""

    @property
    def passed(self) -> bool:
        """Whether all are within tolerance; False if one is NaN."""
        most = TOLERANCES["fp16"]
        return self.tokens <= most.tokens and self.latent <= most.latents and self.psnr >= PICTURE_PSNR

    def row(self) -> str:
        """Format the line as it is printed."""
        return (
            f"| {self.label} | {self.steps} | {self.tokens:.1e} | {self.latent:.1e} | {self.psnr:.1f} "
            f"| {'ok' if self.passed else 'OUT'} |"
        )


@dataclass(frozen=True)
class GraphExtremes:
    """How far the results of a graph stay below the largest number of FP16."""

    graph: str
    results: int
    largest: float
    where: str
    """Name of the tensor in the ONNX graph."""

    @property
    def headroom(self) -> float:
        """65504 / the largest magnitude."""
        return LARGEST_FP16 / self.largest if self.largest else math.inf

    @property
    def passed(self) -> bool:
        """Whether there is enough; False if the largest magnitude is NaN."""
        return self.headroom >= HEADROOM

    def row(self) -> str:
        """Format the line as it is printed."""
        return (
            f"| {self.graph} | {self.results} | {self.largest:.4g} | {self.headroom:.0f} x | {self.where} "
            f"| {'ok' if self.passed else 'OUT'} |"
        )


RUN_HEADER = (
    "| run | steps | ID tokens | last latents | picture, dB | |\n| --- | --- | --- | --- | --- | --- |"
)
GRAPH_HEADER = "| graph | FP16 results | largest | headroom | in | |\n| --- | --- | --- | --- | --- | --- |"


def compare_run(
    run: GoldenRun, full: Compositor, half: Compositor, progress: ProgressBar[Any], steps: int | None = None
) -> RunError:
    """Run the networks of one recorded case in both precisions, from the recorded reference, hint and noise.

    Args:
        run: has at least reference, hint, noise and timesteps.
        full: runs in FP32.
        half: runs in FP16.
        progress: counts steps.
        steps: take only this many of the recorded timesteps, spread evenly; all if None.
    """
    tokens, latents, pictures = zip(*(_run_networks(run, c, progress, steps) for c in (full, half)))
    return RunError(
        label=run.label,
        steps=len(_timesteps(run, steps)),
        tokens=relative_error(tokens[1], tokens[0]),
        latent=relative_error(latents[1], latents[0]),
        psnr=psnr(pictures[1], pictures[0], peak=255),
    )


def _run_networks(
    run: GoldenRun, compositor: Compositor, progress: ProgressBar[Any], steps: int | None
) -> tuple[Array, Array, Array]:
    networks = Networks(run, compositor, progress.update)
    tokens = networks.id_tokens()
    *_, latent = networks.latents(tokens, networks.sampling(_timesteps(run, steps)))
    picture = networks.decode(latent, "image")
    # the other precision needs the memory
    for graph in GRAPHS:
        compositor.engine.unload(graph)
    return tokens, latent, picture


def _timesteps(run: GoldenRun, steps: int | None) -> tuple[int, ...]:
    recorded = run.timesteps or ()
    if steps is None or steps >= len(recorded):
        return recorded
    return tuple(recorded[i] for i in np.linspace(0, len(recorded) - 1, steps).round().astype(int))


def graph_extremes(extremes: Mapping[str, Mapping[str, float]]) -> Iterator[GraphExtremes]:
    """Yield the largest result of every graph that was run; NaN counts as the largest."""
    for graph, results in extremes.items():
        where = max(results, key=lambda name: math.inf if math.isnan(results[name]) else results[name])
        yield GraphExtremes(graph, len(results), results[where], where)


def compare(options: argparse.Namespace) -> list[RunError | GraphExtremes]:
    """Run all comparisons and print their rows as they come."""
    runs: list[GoldenRun] = []
    for case in options.cases:
        runs += [run for run in read_runs(case, options) if run.timesteps and run.has("x_T")]
    full, half = (Bundle.open(bundle_of(options, precision)) for precision in ("fp32", "fp16"))
    rounding = RoundingEngine(half, options.threads)
    on_the_cpu = EngineOptions(device="cpu", threads=options.threads)
    compositors = Compositor(full, open_engine(full, on_the_cpu)), Compositor(half, rounding)
    total = 2 * sum(len(_timesteps(run, options.steps)) for run in runs)
    results: list[RunError | GraphExtremes] = []
    print(RUN_HEADER)
    with ProgressBar(total=total, unit="step", dynamic_ncols=True, leave=False) as bar:
        for run in runs:
            bar.set_description(run.label)
            results.append(error := compare_run(run, *compositors, bar, options.steps))
            bar.write(error.row())
    print(f"\n{GRAPH_HEADER}")
    for extremes in graph_extremes(rounding.extremes):
        results.append(extremes)
        print(extremes.row())
    return results


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    result = argparse.ArgumentParser(
        prog="precision.py",
        description="Compare FP16 with FP32 on recorded cases, and look for overflow, without a GPU.",
        epilog="example:\n  python benchmarks/precision.py --checkpoint small.safetensors case0.npz\n",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    result.add_argument("--checkpoint", type=Path, required=True, metavar="CKPT", help="what made the cases")
    add_case_options(result)
    result.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: all cores)")
    result.add_argument(
        "--steps", type=int, metavar="N", help="take N of the recorded timesteps (default: all)"
    )
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns 0, 1 if something is out of tolerance, or 2 if something cannot be read."""
    options = parser().parse_args(arguments)
    try:
        results = compare(options)
    except AnyDoorError as error:
        print(f"precision.py: {error}", file=sys.stderr)
        return 2
    failed = [result for result in results if not result.passed]
    print(f"\nprecision: {len(results)} rows, {len(failed)} out of tolerance")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
