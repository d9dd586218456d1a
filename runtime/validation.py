"""Where a request is refused: every range and limit of its parameters, checked before any work.

Pictures, masks and boxes are refused where they are read: `runtime.imaging.pictures`, `reference` and
`target`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from runtime.diffusion.ddim import MAX_STEPS
from runtime.diffusion.samplers import SAMPLERS
from runtime.errors import InputError, in_field
from runtime.imaging.pictures import MAX_PIXELS
from runtime.imaging.target import is_integer
from runtime.parameters import SamplingParameters

MAX_IMAGES = 64
MAX_PLACEMENTS = 16
MAX_GUIDANCE_SCALE = 100.0
MAX_CONTROL_SCALE = 10.0
MAX_SEED = 2**63 - 1


@dataclass(frozen=True)
class Limits:
    """The most that one request may ask for. A server sets lower ones."""

    steps: int = MAX_STEPS
    images: int = MAX_IMAGES
    placements: int = MAX_PLACEMENTS
    pixels: int = MAX_PIXELS
    """Of each picture and mask, checked before it is decoded."""


LARGEST = Limits()
"""What this package accepts at all."""


def check_sampling(sampling: SamplingParameters, limits: Limits = LARGEST) -> None:
    """Refuses sampling parameters out of range.

    Raises:
        InputError: names the parameter, its value and its range.
    """
    _check_integer("steps", sampling.steps, 1, limits.steps)
    _check_number("guidance_scale", sampling.guidance_scale, 0.0, MAX_GUIDANCE_SCALE)
    if sampling.control_scale is not None:
        _check_number("control_scale", sampling.control_scale, 0.0, MAX_CONTROL_SCALE)
    _check_number("eta", sampling.eta, 0.0, 1.0)
    with in_field("sampler"):
        if sampling.sampler not in tuple(SAMPLERS):
            raise InputError(f"there is no sampler '{sampling.sampler}': choose one of {', '.join(SAMPLERS)}")
    with in_field("eta"):
        if sampling.eta > 0 and sampling.sampler != "ddim":
            raise InputError(
                f"the sampler {sampling.sampler} adds no noise: eta must be 0 with it, not {sampling.eta:g}"
            )
    interval = sampling.guidance_interval
    with in_field("guidance_interval"):
        if not isinstance(interval, tuple | list) or len(interval) != 2:
            given = ", ".join(map(str, interval)) if isinstance(interval, tuple | list) else repr(interval)
            raise InputError(f"guidance_interval must be a lower and a higher timestep, not {given}")
    for timestep in interval:
        _check_integer("guidance_interval", timestep, 0, MAX_STEPS)
    with in_field("guidance_interval"):
        if interval[0] > interval[1]:
            given = ", ".join(map(str, interval))
            raise InputError(f"guidance_interval must be a lower and a higher timestep, not {given}")
    if sampling.map_steps is not None:
        _check_integer("map_steps", sampling.map_steps, 1, MAX_STEPS)


def check_seeds(seed: int, num_images: int, limits: Limits = LARGEST) -> None:
    """Refuses a seed or a number of pictures out of range.

    Raises:
        InputError: names the parameter, its value and its range.
    """
    _check_integer("num_images", num_images, 1, limits.images)
    _check_integer("seed", seed, 0, MAX_SEED - num_images)


def check_placement_count(count: int, limits: Limits = LARGEST) -> None:
    """Refuses a request with nothing to place, or with too many placements.

    Raises:
        InputError: says how many may be given.
    """
    with in_field("placements"):
        if not count:
            raise InputError("there is nothing to place: give at least one placement")
        if count > limits.placements:
            raise InputError(f"{count} placements are given; at most {limits.placements} are done")


def check_initial_noise(noise: NDArray[np.float32], shape: tuple[int, ...]) -> NDArray[np.float32]:
    """The noise as float32 of the given shape.

    Raises:
        InputError: it has another shape, or values that are not finite.
    """
    if noise.shape != shape:
        raise InputError(f"initial_noise must have the shape {shape}, not {noise.shape}")
    if not np.isfinite(noise).all():
        raise InputError("initial_noise has values that are not finite numbers")
    return noise.astype(np.float32)


def _check_integer(name: str, value: int, low: int, high: int) -> None:
    with in_field(name):
        if not is_integer(value) or not low <= value <= high:
            raise InputError(f"{name} must be a whole number from {low} to {high}, not {value!r}")


def _check_number(name: str, value: float, low: float, high: float) -> None:
    valid = isinstance(value, int | float | np.number) and not isinstance(value, bool)
    with in_field(name):
        if not valid or not math.isfinite(value) or not low <= value <= high:
            raise InputError(f"{name} must be a number from {low:g} to {high:g}, not {value!r}")
