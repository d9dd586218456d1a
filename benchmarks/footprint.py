"""How much time and memory does every part take, from a checkpoint to a picture?

    python benchmarks/footprint.py full.safetensors --steps 4
    python benchmarks/footprint.py inpainting.safetensors --steps 4 --prompt "a cup"

Builds the bundle (with --reuse only if it does not exist), composites the example object, or a prompt, into
the example scene, prints two tables and, with --results, writes a results file.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from benchmarks.support import example
from benchmarks.support.machine import describe, peak_memory_gb, reset_peak_memory
from benchmarks.support.results import require_writable, write_results
from engines.bundle import Bundle
from engines.engine import open_engine
from engines.errors import AnyDoorError
from runtime import Compositor, Placement, Request, Sampling
from runtime.cli.flags import add_engine_flags, engine_options

ALREADY_LOADED = 0.01
"""Seconds; a load that takes less had nothing to do."""


@dataclass(frozen=True)
class Part:
    """One part of the work."""

    name: str
    seconds: float
    peak_gb: float


class Recorder:
    """Measures time and peak memory of consecutive parts."""

    def __init__(self) -> None:
        """Start the first part."""
        self.parts: list[Part] = []
        self._ended = 0.0
        reset_peak_memory()

    def measure(self, name: str, started: float) -> None:
        """End a part that began at `started`, but not before the end of the part before it.

        Args:
            name: of the part.
            started: on the clock `time.perf_counter`.
        """
        now = time.perf_counter()
        seconds = now - max(started, self._ended)
        self.parts.append(Part(name, round(seconds, 2), round(peak_memory_gb(), 2)))
        self._ended = now
        reset_peak_memory()

    @contextmanager
    def observe(self, action: str, graph: str, inputs: Mapping[str, Any]) -> Iterator[None]:
        """Measure a load or a run, as the observer of an engine."""
        started = time.perf_counter()
        yield
        if action == "run" or time.perf_counter() - started > ALREADY_LOADED:
            self.measure(f"{graph}: {action}", started)


def build(checkpoint: Path, bundle: Path) -> list[Part]:
    """Build a bundle; returns its parts."""
    from export.build import build_bundle
    from export.options import BuildOptions
    from export.progress import Progress
    from export.systems import open_source

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

    progress = MeasuredProgress()
    build_bundle(open_source(checkpoint), bundle, BuildOptions(), progress)
    progress.end()
    return recorder.parts


def composite(bundle: Path, sampling: Sampling, options: argparse.Namespace) -> list[Part]:
    """Composite the example; returns its parts."""
    opened = Bundle.open(bundle)
    engine = open_engine(opened, replace(engine_options(options), device="cpu"))
    if plan := engine.describe():
        print(plan, file=sys.stderr)
    recorder = Recorder()
    engine.observer = recorder.observe
    prompt = options.prompt
    placement = Placement(prompt=prompt, box=example.scene_box()) if prompt else example.placement()
    Compositor(opened, engine).run(Request(example.SCENE, [placement], 0, sampling))
    return recorder.parts


def table(parts: Sequence[Part]) -> str:
    """Format parts, one line per name: number of calls, mean time, largest peak."""
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
    """Return the command line."""
    result = argparse.ArgumentParser(
        prog="footprint.py",
        description="Measure time and peak memory of building a bundle and of compositing with it.",
        epilog="example:\n  python benchmarks/footprint.py full.safetensors --steps 4\n",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    result.add_argument("checkpoint", type=Path, metavar="CKPT")
    result.add_argument(
        "--bundle", type=Path, metavar="DIR", help="where to build (default: build/footprint/NAME)"
    )
    result.add_argument("--steps", type=int, default=4, metavar="N", help="sampling steps (default: 4)")
    result.add_argument(
        "--prompt", metavar="TEXT", help="draw this, where the bundle takes prompts, instead of the object"
    )
    add_engine_flags(result)
    result.add_argument("--reuse", action="store_true", help="do not build if the bundle exists")
    result.add_argument("--results", type=Path, metavar="FILE.json", help="write the figures to a file")
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns 0 or 2."""
    given = sys.argv[1:] if arguments is None else arguments
    options = parser().parse_args(given)
    bundle = options.bundle or Path("build/footprint") / options.checkpoint.stem
    command = shlex.join(["python", "benchmarks/footprint.py", *given])
    results: dict[str, object] = {"command": command, "steps": options.steps, **describe()}
    try:
        if options.results:
            require_writable(options.results)
        if not (options.reuse and bundle.exists()):
            # what the exporter leaves in its process is no part of compositing
            with ProcessPoolExecutor(1, get_context("spawn")) as process:
                parts = process.submit(build, options.checkpoint, bundle).result()
            results["build"] = [asdict(part) for part in parts]
            print(f"\nbuilding\n{table(parts)}")
        parts = composite(bundle, Sampling(steps=options.steps), options)
    except AnyDoorError as error:
        print(f"footprint.py: {error}", file=sys.stderr)
        return 2
    results["composite"] = [asdict(part) for part in parts]
    print(f"\ncompositing, {options.steps} steps with guidance\n{table(parts)}")
    if options.results:
        write_results(options.results, results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
