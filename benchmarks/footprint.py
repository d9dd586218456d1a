"""Time and peak memory of every part of the way from a checkpoint to a picture.

    python benchmarks/footprint.py full.safetensors --steps 4

Builds the bundle (unless it is there already, see --bundle), composites the example object into the example
scene, prints two tables and leaves a results file.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.machine import describe, peak_memory_gb, reset_peak_memory
from engines.bundle import Bundle
from engines.engine import BACKENDS, Array, DeviceTensor, Engine, open_engine, run_step_by_step
from engines.errors import AnyDoorError
from runtime import Compositor, Placement, Sampling
from runtime.sizes import size_flag

EXAMPLES = Path("examples")

ALREADY_LOADED = 0.01
"""Seconds; a call to load a graph that takes less had nothing to do."""


@dataclass(frozen=True)
class Part:
    """One part of the work."""

    name: str
    seconds: float
    peak_gb: float


class Recorder:
    """Notes time and peak memory of the parts of a sequence of work."""

    def __init__(self) -> None:
        self.parts: list[Part] = []

    def measure(self, name: str, started: float) -> None:
        """Ends a part that began at `started` with a reset of the peak."""
        self.parts.append(Part(name, round(time.perf_counter() - started, 2), round(peak_memory_gb(), 2)))
        reset_peak_memory()


class MeasuredEngine:
    """An engine that notes what every call of a graph takes; see `engines.engine.Engine`."""

    def __init__(self, engine: Engine, recorder: Recorder) -> None:
        self._engine = engine
        self._recorder = recorder
        self.device = engine.device

    def load(self, graph: str) -> None:
        """Loads a graph."""
        started = time.perf_counter()
        self._engine.load(graph)
        if time.perf_counter() - started > ALREADY_LOADED:
            self._recorder.measure(f"{graph}: load", started)

    def run(
        self, graph: str, inputs: Mapping[str, DeviceTensor | Array], outputs: Sequence[str] | None = None
    ) -> dict[str, DeviceTensor]:
        """Runs a graph."""
        self.load(graph)
        started = time.perf_counter()
        result = self._engine.run(graph, inputs, outputs)
        self._recorder.measure(f"{graph}: run", started)
        return result

    def run_steps(self, *arguments: Any) -> dict[str, DeviceTensor]:
        """Runs a graph several times."""
        return run_step_by_step(self, *arguments)  # type: ignore[arg-type]

    def __getattr__(self, name: str) -> object:
        return getattr(self._engine, name)


def build(checkpoint: Path, bundle: Path) -> list[Part]:
    """Builds a bundle and returns its parts."""
    from export.build_engines import BuildOptions, build_bundle
    from export.progress import Progress
    from training.network.checkpoint import read_checkpoint

    recorder = Recorder()

    class MeasuredProgress(Progress):
        current: tuple[str, float] | None = None

        def step(self, description: str) -> None:
            self.end()
            super().step(description)
            self.current = (description, time.perf_counter())

        def end(self) -> None:
            if self.current:
                recorder.measure(*self.current)
                self.current = None

    reset_peak_memory()
    progress = MeasuredProgress()
    build_bundle(read_checkpoint(checkpoint), bundle, BuildOptions(), progress)
    progress.end()
    return recorder.parts


def composite(bundle: Path, sampling: Sampling, options: argparse.Namespace) -> list[Part]:
    """Composites the example and returns its parts; calls of one graph are added up."""
    recorder = Recorder()
    opened = Bundle.open(bundle)
    reset_peak_memory()
    engine = open_engine(opened, "cpu", options.threads, options.memory_budget, options.backend)
    if plan := engine.describe():
        print(plan, file=sys.stderr)
    compositor = Compositor(opened, MeasuredEngine(engine, recorder))  # type: ignore[arg-type]
    box = tuple(int(v) for v in (EXAMPLES / "scene_box.txt").read_text("utf-8").split(","))
    placement = Placement(EXAMPLES / "object.png", box=box)  # type: ignore[arg-type]
    compositor.run(EXAMPLES / "scene.png", placement, seed=0, sampling=sampling)
    return recorder.parts


def table(parts: Sequence[Part]) -> str:
    """Parts of one name in one line: number of calls, mean time, largest peak."""
    lines = [f"{'part':<38} {'calls':>5} {'s per call':>11} {'peak GB':>8}"]
    for name in dict.fromkeys(part.name for part in parts):
        calls = [part for part in parts if part.name == name]
        seconds = sum(part.seconds for part in calls) / len(calls)
        peak = max(part.peak_gb for part in calls)
        lines.append(f"{name:<38} {len(calls):>5} {seconds:>11.2f} {peak:>8.2f}")
    total = sum(part.seconds for part in parts)
    lines.append(f"{'all':<38} {'':>5} {total:>11.2f} {max(part.peak_gb for part in parts):>8.2f}")
    return "\n".join(lines)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(
        prog="footprint.py",
        description="Time and peak memory of building a bundle and of compositing with it.",
        epilog="example:\n  python benchmarks/footprint.py full.safetensors --steps 4\n",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    result.add_argument("checkpoint", type=Path, metavar="CKPT")
    result.add_argument(
        "--bundle", type=Path, metavar="DIR", help="where to build (default: build/footprint/NAME)"
    )
    result.add_argument("--steps", type=int, default=4, metavar="N", help="sampling steps (default: 4)")
    result.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: all cores)")
    result.add_argument("--backend", choices=BACKENDS, default="auto", help="what executes the graphs")
    result.add_argument(
        "--memory-budget", type=size_flag, metavar="SIZE", help="of this machine's, like 8G (default: all)"
    )
    result.add_argument("--reuse", action="store_true", help="do not build if the bundle is there")
    result.add_argument("--results", type=Path, metavar="FILE.json", help="leave the figures here")
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    options = parser().parse_args(arguments)
    bundle = options.bundle or Path("build/footprint") / options.checkpoint.stem
    results: dict[str, object] = {"command": "benchmarks/footprint.py", "steps": options.steps, **describe()}
    try:
        if not (options.reuse and bundle.exists()):
            parts = build(options.checkpoint, bundle)
            results["build"] = [asdict(part) for part in parts]
            print(f"\nbuilding\n{table(parts)}")
        parts = composite(bundle, Sampling(steps=options.steps), options)
    except AnyDoorError as error:
        print(f"footprint.py: {error}", file=sys.stderr)
        return 2
    results["composite"] = [asdict(part) for part in parts]
    print(f"\ncompositing, {options.steps} steps with guidance\n{table(parts)}")
    if options.results:
        options.results.parent.mkdir(parents=True, exist_ok=True)
        options.results.write_text(json.dumps(results, indent=1) + "\n", "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
