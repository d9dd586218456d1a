"""What do other graphs of the same network gain on a CPU? Runs the graphs of two bundles in turn.

    python benchmarks/studies/graph_rewrites.py build/engines/before build/engines/after

Every call of a bundle's graph is made in a process of its own, before and after in turn, so that memory and
start are each one's own and other work on the machine affects both alike. Prints the median of the times
before over those after, peaks of resident memory, and how far the results are apart.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from benchmarks.support.graphs import CONTROL, DENOISE
from benchmarks.support.machine import describe
from benchmarks.support.measuring_process import ProcessFailedError, measured
from benchmarks.support.results import RESULTS, require_writable, write_results
from benchmarks.support.similarity import relative_error
from engines.bundle import Bundle
from engines.engine import Array, open_engine
from engines.errors import AnyDoorError
from engines.options import INFERENCE_PRECISIONS, EngineOptions
from export.example_inputs import example_inputs
from runtime.errors import InputError
from runtime.progress_bar import ProgressBar


@dataclass(frozen=True)
class Calls:
    """Calls of one graph in one process, the first without a warm-up."""

    seconds: list[float]
    peak: int
    """Bytes of resident memory, mapped files included."""


@dataclass(frozen=True)
class Row:
    """What a graph gains with a backend."""

    graph: str
    backend: str
    before: list[Calls]
    after: list[Calls]
    error: dict[str, float]
    """Output -> norm of the difference over the norm before."""

    @property
    def ratio(self) -> float:
        """The median of the times before over those after; the first call of a process does not count."""
        seconds = [median(second for of in calls for second in of.seconds[1:]) for calls in self._sides]
        return seconds[0] / seconds[1]

    def __str__(self) -> str:
        peaks = " to ".join(f"{max(of.peak for of in calls) / 1e9:.1f}" for calls in self._sides)
        error = max(self.error.values())
        return f"| {self.graph} | {self.backend} | {self.ratio:.2f} x | {peaks} | {error:.0e} |"

    @property
    def _sides(self) -> tuple[list[Calls], list[Calls]]:
        return self.before, self.after


def call_graph(bundle: Path, graph: str, options: EngineOptions, calls: int, output: Path) -> Calls:
    """Call a graph for one picture with guidance, and write the results of the last call."""
    opened = Bundle.open(bundle)
    engine = open_engine(opened, options)
    inputs = example_inputs(opened.manifest.specs[graph], opened.manifest.typical_sizes)
    engine.load(graph)
    seconds, results = [], {}
    for _ in range(calls):
        started = time.perf_counter()
        results = {name: engine.to_host(value) for name, value in engine.run(graph, inputs).items()}
        seconds.append(time.perf_counter() - started)
    arrays: dict[str, Any] = results
    np.savez(output, **arrays)
    return Calls(seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


def compare(before: Path, after: Path, graph: str, options: EngineOptions, calls: int, rounds: int) -> Row:
    """Measure one graph of two bundles.

    Raises:
        AnyDoorError: a process failed; says why.
    """
    sides: tuple[list[Calls], list[Calls]] = ([], [])
    with tempfile.TemporaryDirectory() as folder:
        for _ in ProgressBar(range(rounds), desc=f"{graph}, {options.backend}", leave=False):
            for index, bundle in enumerate((before, after)):
                task = (str(bundle), graph, asdict(options), calls, f"{folder}/{index}.npz")
                sides[index].append(_in_process(task))
        arrays: list[dict[str, Array]] = [dict(np.load(Path(folder) / f"{index}.npz")) for index in (0, 1)]
    error = {name: relative_error(arrays[1][name], expected) for name, expected in arrays[0].items()}
    backend = f"{options.backend}, {options.inference_precision}"
    return Row(graph, backend, *sides, error)


def _in_process(task: tuple[Any, ...]) -> Calls:
    try:
        (found,) = measured("benchmarks.studies.graph_rewrites", "--task", json.dumps(task))
    except ProcessFailedError as error:
        raise InputError(f"{task[1]} of '{task[0]}': {error}") from error
    return Calls(**found)


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    result = argparse.ArgumentParser(
        prog="graph_rewrites.py",
        description="Compare graphs of two bundles of one network on a CPU: time, memory, results.",
        epilog="example:\n  python benchmarks/studies/graph_rewrites.py build/engines/before "
        "build/engines/after --backends openvino --graphs decode\n",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    result.add_argument("bundles", type=Path, nargs="*", metavar="BUNDLE", help="the one before, and after")
    result.add_argument(
        "--graphs", nargs="+", default=[CONTROL, DENOISE], metavar="NAME", help="default: control denoise"
    )
    result.add_argument("--backends", nargs="+", default=["onnxruntime", "openvino"], metavar="NAME")
    result.add_argument("--inference-precision", choices=INFERENCE_PRECISIONS, default="fp32")
    result.add_argument("--calls", type=int, default=3, metavar="N", help="in a process (default: 3)")
    result.add_argument("--rounds", type=int, default=2, metavar="N", help="turns (default: 2)")
    result.add_argument("--results", type=Path, default=RESULTS / "graph-rewrites-cpu.json", metavar="FILE")
    result.add_argument("--task", help=argparse.SUPPRESS)
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table and write the results; returns the exit code."""
    options = parser().parse_args(arguments)
    if options.task:
        bundle, graph, engine, calls, output = json.loads(options.task)
        print(
            json.dumps(asdict(call_graph(Path(bundle), graph, EngineOptions(**engine), calls, Path(output))))
        )
        return 0
    try:
        if len(options.bundles) != 2:
            raise InputError("give two bundles: the one before, and the one after")
        if options.calls < 2 or options.rounds < 1:
            raise InputError("--calls must be at least 2 and --rounds at least 1")
        require_writable(options.results)
        before, after = options.bundles
        rows = [
            compare(
                before,
                after,
                graph,
                EngineOptions(backend, "cpu", options.inference_precision),
                options.calls,
                options.rounds,
            )
            for backend in options.backends
            for graph in options.graphs
        ]
    except AnyDoorError as error:
        print(f"graph_rewrites.py: {error}", file=sys.stderr)
        return 2
    print("| graph | backend | times as fast | peak, GB | error |\n| --- | --- | --- | --- | --- |")
    for row in rows:
        print(row)
    write_results(
        options.results,
        {
            "machine": describe(),
            "rows": [{**asdict(row), "ratio": row.ratio} for row in rows],
        },
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
