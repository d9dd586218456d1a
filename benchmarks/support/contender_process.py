"""Measures one contender, in a process of its own.

`benchmarks/latency.py` starts it with a `Run` as JSON and reads a line of JSON for every call that was timed.
It imports what it measures and nothing else, so that a cold start is that of an application.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from benchmarks.support import example
from benchmarks.support.anydoor_pipeline import AnyDoorPipeline, stages_of
from benchmarks.support.contenders import (
    ANYDOOR,
    BATCH,
    COLD,
    PEAK,
    PICTURE,
    PROBE,
    REROLL,
    SAMPLES,
    Call,
    Run,
)
from benchmarks.support.machine import peak_memory_gb, reset_peak_memory
from engines.errors import AnyDoorError
from runtime.diffusion.ddim import ddim_timesteps
from runtime.diffusion.presets import QUALITIES
from runtime.request import Placement, Sampling
from runtime.result import Composite

_WARM_UP_STEPS = 3
"""Enough for a compiler to compile, to capture and to replay."""


class Pipeline(Protocol):
    """What the runtime and PyTorch have in common."""

    latent_shape: tuple[int, int, int]
    """(C, h, w)."""
    synchronous: bool
    """Whether to wait for every stage, to measure each."""

    @property
    def rows(self) -> Mapping[str, int]:
        """Graph -> rows that the last run evaluated; empty for PyTorch."""

    def run(
        self, scene: Any, placements: Sequence[Placement], noise: NDArray[np.float32], sampling: Sampling
    ) -> list[Composite]:
        """Composite; see `benchmarks.support.pytorch_pipeline.PyTorchPipeline.run`."""


def open_pipeline(run: Run) -> Pipeline:
    """Open what a run measures."""
    contender = run.contender
    if contender.kind == ANYDOOR:
        return AnyDoorPipeline(run)
    import torch

    torch.set_num_threads(run.threads)
    device, precision = contender.device, contender.precision
    if run.checkpoint and run.checkpoint.is_dir():
        from benchmarks.support.diffusers_pipeline import DiffusersPipeline

        return DiffusersPipeline(
            run.checkpoint, run.workload.resolution, device, precision, contender.compiled
        )
    from benchmarks.support.pytorch_pipeline import PyTorchPipeline, noise_checkpoint

    checkpoint = run.checkpoint or noise_checkpoint(Path(contender.bundle), device, precision)
    return PyTorchPipeline(checkpoint, run.workload.resolution, device, precision, contender.compiled)


class Scenarios:
    """Takes a pipeline through the scenarios of a run."""

    def __init__(self, run: Run, pipeline: Pipeline) -> None:
        self._run = run
        self._pipeline = pipeline
        # on a card the times of the stages come from calls of their own, which waiting makes slower
        self._waits = (True,) if pipeline.synchronous else (False, True)
        self._variant = 0
        """Number of the last placement; each number is another reference."""

    def calls(self) -> Iterator[Call]:
        """Yield all calls as they are done; the cold start is the first."""
        run, workload = self._run, self._run.workload
        yield self.cold_start()
        for _ in range(workload.pictures):
            yield from self._calls(PICTURE, workload.steps, 1, fresh=1)
            if REROLL in run.scenarios:
                yield from self._calls(REROLL, workload.extra_steps, 1, fresh=0)
        if run.contender.compiled and (SAMPLES in run.scenarios or BATCH in run.scenarios):
            # another batch size is another program; its compilation is not measured
            inputs = self.inputs(self._new_variants(run.samples), run.samples, _WARM_UP_STEPS)
            self._pipeline.run(*inputs)
        if SAMPLES in run.scenarios:
            yield from self._calls(SAMPLES, workload.extra_steps, run.samples, fresh=1)
        if BATCH in run.scenarios:
            yield from self._calls(BATCH, workload.extra_steps, run.samples, fresh=run.samples)

    def _new_variants(self, count: int) -> list[int]:
        self._variant += count
        return list(range(self._variant - count + 1, self._variant + 1))

    def _calls(self, scenario: str, steps: int, count: int, fresh: int) -> Iterator[Call]:
        """Time a scenario: once, or on a card once without and once with waiting for every stage.

        Args:
            scenario: its name.
            steps: of each picture.
            count: of pictures.
            fresh: number of new placements; 0 repeats the last one.
        """
        for wait in self._waits:
            self._pipeline.synchronous = wait
            variants = self._new_variants(fresh) if fresh else [self._variant]
            yield self.call(scenario, steps, variants, count)

    def cold_start(self) -> Call:
        """Draw the first picture; its seconds are those since the process was started."""
        steps = self._run.workload.cold_steps
        self._pipeline.run(*self.inputs([0], 1, steps))
        seconds = time.monotonic() - self._run.started
        return Call(COLD, steps, 1, self._run.started, seconds, {}, _peak())

    def call(self, scenario: str, steps: int, variants: Sequence[int], count: int) -> Call:
        """Time one call.

        Args:
            scenario: its name; that of a quality takes the quality's settings.
            steps: of each picture.
            variants: the placements, by number; each number is another reference.
            count: of pictures.
        """
        inputs = self.inputs(variants, count, steps, scenario)
        with suppress(OSError):
            reset_peak_memory()
        started = time.monotonic()
        results = self._pipeline.run(*inputs)
        seconds = time.monotonic() - started
        stages = stages_of(results[0].seconds, self._run.system) if self._pipeline.synchronous else {}
        if scenario == PICTURE and variants == [1] and self._run.picture:
            region = results[0].regions[0]
            np.save(self._run.picture, results[0].image[region.slices])
        return Call(scenario, steps, count, started, seconds, stages, _peak(), dict(self._pipeline.rows))

    def inputs(
        self, variants: Sequence[int], count: int, steps: int, scenario: str = PICTURE
    ) -> tuple[Path, list[Placement], NDArray[np.float32], Sampling]:
        """Return what the pipeline is called with; arguments as of `call`."""
        reroll, shape = scenario == REROLL, (count, *self._pipeline.latent_shape)
        noise = np.random.default_rng(int(reroll)).standard_normal(shape, dtype=np.float32)
        # a shorter re-roll visits timesteps of the picture before it, whose detail maps are in the cache
        timesteps = tuple(ddim_timesteps(self._run.workload.steps)[-steps:].tolist()) if reroll else None
        guidance_scale = self._run.guidance_scale
        if scenario in QUALITIES:
            sampling = Sampling(quality=scenario, guidance_scale=guidance_scale)
        else:
            sampling = Sampling(steps=steps, guidance_scale=guidance_scale, timesteps=timesteps)
        placement = example.PLACEMENTS[self._run.system]
        return example.SCENE, [placement(variant) for variant in variants], noise, sampling


def _peak() -> float | None:
    try:
        return peak_memory_gb()
    except OSError:
        return None


def _measure(run: Run) -> Iterator[Mapping[str, Any]]:
    """Yield one line per call, or the machine's rates."""
    contender = run.contender
    if contender.kind == PEAK:
        from benchmarks.support.peaks import measure_peak

        yield asdict(measure_peak(run.threads, contender.device, contender.precision))
        return
    pipeline = open_pipeline(run)
    if PROBE not in run.scenarios:
        for call in Scenarios(run, pipeline).calls():
            yield asdict(call)


def main(arguments: Sequence[str]) -> int:
    """Print a line of JSON per call; if something fails, the last line of stderr says what."""
    # if memory runs out, the system ends this process and no other
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")
    try:
        for line in _measure(Run.from_json(arguments[0])):
            print(json.dumps(line), flush=True)
    except AnyDoorError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
