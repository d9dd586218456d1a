"""Seconds of pictures: this runtime, and PyTorch, eager and compiled, with the same architecture.

PyTorch has no weights to read: its noise is drawn on the device.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from statistics import median

import numpy as np

from benchmarks.support.anydoor_pipeline import AnyDoorPipeline
from benchmarks.support.card.device_memory import used_gb
from benchmarks.support.card.task import BACKEND, Row, Task, repetitions
from benchmarks.support.contender_process import Scenarios, open_pipeline
from benchmarks.support.contenders import (
    ANYDOOR,
    COLD,
    PICTURE,
    PYTORCH,
    REROLL,
    SAMPLES,
    Call,
    Contender,
    Run,
    Workload,
)
from benchmarks.support.machine import cores
from engines.errors import BackendError
from runtime.diffusion.presets import QUALITIES

PRESETS = tuple(name for name in QUALITIES if name != "exact")
SAME_BITS = "same seed, same bits"
DEVICE_MEMORY = "device memory"

_STEPS = {"cuda": 50, "cpu": 2}
_SAMPLES = 4
_MOST = 5
"""Repetitions of a scenario."""


def runtime_pictures(task: Task) -> Iterator[Row]:
    """Measure this runtime."""
    manifest = task.open_bundle().manifest
    contender = Contender(ANYDOOR, task.device, manifest.precision, BACKEND, str(task.bundle))
    yield from _measure(task, contender, (PICTURE, REROLL, SAMPLES, *PRESETS))


def eager_pictures(task: Task) -> Iterator[Row]:
    """Measure PyTorch, eager."""
    yield from _measure(task, _pytorch(task, compiled=False), (PICTURE, SAMPLES))


def compiled_pictures(task: Task) -> Iterator[Row]:
    """Measure PyTorch, compiled.

    Raises:
        BackendError: on a CPU, where compiling takes minutes.
    """
    if task.device == "cpu":
        raise BackendError("not measured: on a CPU compiling takes minutes")
    yield from _measure(task, _pytorch(task, compiled=True), (PICTURE, SAMPLES))


def _pytorch(task: Task, compiled: bool) -> Contender:
    # nothing is said of its bundle but the network's sizes
    precision = "fp16" if task.device == "cuda" else "fp32"
    return Contender(PYTORCH, task.device, precision, bundle=str(task.bundle), compiled=compiled)


def _measure(task: Task, contender: Contender, scenarios: Sequence[str]) -> Iterator[Row]:
    """Yield a row for the cold start and for every scenario."""
    manifest, steps = task.open_bundle().manifest, _STEPS[task.device]
    workload = Workload(steps, steps, steps, resolution=manifest.resolution)
    samples = min(_SAMPLES, manifest.max_batch)
    run = Run(workload, contender, None, cores(), samples, (), guidance_scale=5.0, started=task.started)
    pipeline = open_pipeline(run)
    pipeline.synchronous = False
    tour = Scenarios(run, pipeline)
    yield _row(contender, [tour.cold_start()])
    if isinstance(pipeline, AnyDoorPipeline):
        yield {"contender": contender.name, "scenario": SAME_BITS, "equal": _same_bits(tour, pipeline, steps)}
    variant = 0
    for number, scenario in enumerate(scenarios):
        count = samples if scenario == SAMPLES else 1
        if scenario != REROLL:
            # the first call of its shapes compiles and captures
            variant += 1
            tour.call(scenario, steps, [variant], count)
        now = time.monotonic()
        until = now + (task.deadline - now) / (len(scenarios) - number)
        calls = []
        for _ in repetitions(until, _MOST):
            variant += scenario != REROLL
            calls.append(tour.call(scenario, steps, [variant], count))
        yield _row(contender, calls)
    if task.device == "cuda":
        yield {"contender": contender.name, "scenario": DEVICE_MEMORY, "gb": used_gb()}


def _same_bits(tour: Scenarios, pipeline: AnyDoorPipeline, steps: int) -> bool:
    """Returns whether the same request gives the same picture again, with all of it computed anew."""
    pipeline.clear()
    first = pipeline.run(*tour.inputs([0], 1, steps))[0].image
    pipeline.clear()
    return np.array_equal(first, pipeline.run(*tour.inputs([0], 1, steps))[0].image)


def _row(contender: Contender, calls: Sequence[Call]) -> Row:
    first = calls[0]
    return {
        "contender": contender.name,
        "gb": used_gb() if contender.device == "cuda" else None,
        "scenario": first.scenario,
        "pictures": first.pictures,
        "steps": QUALITIES.get(first.scenario, {}).get("steps", first.steps),
        "seconds": median(call.seconds for call in calls),
        "calls": [call.seconds for call in calls],
        "rows": {} if first.scenario == COLD else first.rows,
    }
