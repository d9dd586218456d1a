"""Samples of one placement, one step after the other, for comparisons that look between steps."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from engines.engine import DeviceTensor, Engine
from engines.spec import GraphSpec
from runtime.diffusion.ddim import Schedule
from runtime.parameters import SamplingParameters
from runtime.sampling.conditions import Conditions
from runtime.sampling.running_batch import LatentRow, RunningBatch, Sample


def sample(
    engine: Engine,
    step: GraphSpec,
    conditions: Conditions,
    schedule: Schedule,
    sampling: SamplingParameters,
    latents: NDArray[np.float32],
) -> Iterator[DeviceTensor]:
    """Take samples through all steps, and stop between them.

    Args:
        engine: runs the step graph.
        step: its signature.
        conditions: of the placement.
        schedule: timesteps and coefficients.
        sampling: scales; eta must be 0.
        latents: (N, C, h, w) noise to start from.

    Yields:
        After every step, the (N, C, h, w) latents on the device.
    """
    batch = RunningBatch(engine, step)
    start = engine.to_device(latents)
    batch.samples = [
        Sample(conditions, schedule, sampling, LatentRow(start, row, len(latents)))
        for row in range(len(latents))
    ]
    for _ in range(schedule.steps):
        batch.step()
        for error in (sample.error for sample in batch.samples if sample.error):
            raise error
        yield batch.latents(batch.samples)
