"""DDIM sampling: takes latents from noise to picture, one call of the denoise graph per step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from engines.engine import Array, DeviceTensor, Engine
from engines.graphs import DENOISE
from runtime.ddim import DDIMSchedule
from runtime.detail_maps import DetailMaps, StepMaps
from runtime.request import Sampling


@dataclass(frozen=True, eq=False)
class StepOfSample:
    """What one sample needs for its next step. Samples in a call may be at different steps."""

    timestep: int
    coefficients: NDArray[np.float32]
    """(3,), see `runtime.ddim`."""
    guidance: float
    strength: float
    conditional: tuple[int, int]
    """Index of the ID tokens, and of the detail maps, for the conditional half."""
    unconditional: tuple[int, int] | None
    """The same for the unconditional half; None if the step has no guidance."""


def step_inputs(samples: Sequence[StepOfSample]) -> dict[str, Array]:
    """The inputs of the denoise graph that say what each sample is and where its conditions are.

    The conditional halves come first, one row per sample; then the unconditional halves of those samples
    that have guidance.
    """
    rows = [(i, *sample.conditional) for i, sample in enumerate(samples)]
    unconditional_row = list(range(len(samples)))
    for i, sample in enumerate(samples):
        if sample.unconditional is not None:
            unconditional_row[i] = len(rows)
            rows.append((i, *sample.unconditional))
    row_sample, row_condition, row_map = np.array(rows, np.int32).T
    return {
        "timestep": np.array([sample.timestep for sample in samples], np.float32),
        "guidance": np.array([sample.guidance for sample in samples], np.float32),
        "strength": np.array([sample.strength for sample in samples], np.float32),
        "coefficients": np.stack([sample.coefficients for sample in samples]),
        "conditional_row": np.arange(len(samples), dtype=np.int32),
        "unconditional_row": np.array(unconditional_row, np.int32),
        "row_sample": row_sample,
        "row_condition": row_condition,
        "row_map": row_map,
    }


def has_guidance(sampling: Sampling) -> bool:
    """Whether the unconditional half is needed; at a scale of exactly 1 it cancels out."""
    return sampling.guidance != 1.0


def sample(
    engine: Engine,
    maps: DetailMaps,
    tokens: NDArray[np.float32],
    schedule: DDIMSchedule,
    sampling: Sampling,
    latents: NDArray[np.float32],
    generators: Sequence[np.random.Generator] = (),
) -> Iterator[DeviceTensor]:
    """Takes samples of one placement through all steps, and stops between them.

    Args:
        engine: runs the denoise graph.
        maps: the placement's detail maps.
        tokens: (1, T, D) without guidance; (2, T, D) with it, the unconditional ones last.
        schedule: timesteps and coefficients.
        sampling: guidance, strength and eta.
        latents: (N, C, h, w) noise to start from.
        generators: one per sample, for the noise of steps with eta > 0.

    Yields:
        After every step, the (N, C, h, w) latents on the device.
    """
    # what every step needs goes to the device once
    latent, device_tokens = engine.to_device(latents), engine.to_device(tokens)
    no_noise = engine.to_device(np.zeros_like(latents))
    for step in range(schedule.steps):
        here = maps.at(step)
        of_sample = _step_of_sample(here, step, schedule, sampling)
        noise = _draw(generators, latents) if sampling.eta > 0 else no_noise
        inputs = step_inputs([of_sample] * len(latents))
        outputs = engine.run(
            DENOISE,
            {"latent": latent, "noise": noise, "tokens": device_tokens, **inputs, **here.tensors},
            ["next_latent"],
        )
        latent = outputs["next_latent"]
        yield latent


def _step_of_sample(here: StepMaps, step: int, schedule: DDIMSchedule, sampling: Sampling) -> StepOfSample:
    return StepOfSample(
        timestep=int(schedule.timesteps[step]),
        coefficients=schedule.coefficients[step],
        guidance=sampling.guidance,
        strength=sampling.strength,
        conditional=(0, here.conditional),
        unconditional=(1, here.unconditional) if has_guidance(sampling) else None,
    )


def _draw(generators: Sequence[np.random.Generator], like: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.stack([g.standard_normal(like.shape[1:], dtype=np.float32) for g in generators])
