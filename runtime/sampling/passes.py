"""Defines the passes of sampling a placement: one from noise or, below full strength, from a picture, and a
second one from its result if it is refined.

Source of passes that start from a picture: SDEdit (Meng et al., 2022), section 3: noise of a timestep is
added to the latent of a picture, and sampling goes on from there.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from runtime.diffusion.ddim import LAST_TIMESTEP, Schedule
from runtime.diffusion.samplers import SAMPLERS
from runtime.errors import InputError, in_field
from runtime.imaging.target import is_integer
from runtime.parameters import SamplingParameters


@dataclass(frozen=True, eq=False)
class Pass:
    """Steps that a sample takes, and how."""

    sampling: SamplingParameters
    schedule: Schedule

    def first_latent(
        self, noise: NDArray[np.float32], clean: NDArray[np.float32] | None
    ) -> NDArray[np.float32]:
        """Makes the latent before the first step.

        Args:
            noise: (C, h, w), standard normal.
            clean: (C, h, w), the latent of the picture that sampling starts from; None where there is none.
        """
        if clean is None:
            return noise
        alpha = self.schedule.alphas[0]
        return np.asarray(np.sqrt(alpha) * clean + np.sqrt(1 - alpha) * noise, np.float32)


def first_pass(alphas_cumprod: NDArray[np.float32], sampling: SamplingParameters) -> Pass:
    """Returns the steps from noise to picture.

    Args:
        alphas_cumprod: (1000,) fraction of signal variance left, from the bundle.
        sampling: checked parameters.

    Raises:
        InputError: the exact timesteps do not rise, or do not exist.
    """
    make = SAMPLERS[sampling.sampler]
    return Pass(sampling, make(alphas_cumprod, sampling.steps, sampling.eta, sampling.timesteps))


def second_pass(alphas_cumprod: NDArray[np.float32], first: Pass, timestep: int) -> Pass:
    """Returns the last steps of the first pass, from a timestep on.

    Args:
        alphas_cumprod: see `first_pass`.
        first: the first pass.
        timestep: of the noise to start from, at the most.

    Raises:
        InputError: the first pass has no step that late.
    """
    return _later(alphas_cumprod, first, timestep, "refine", timestep)


def partial_pass(alphas_cumprod: NDArray[np.float32], full: Pass, strength: float | None) -> Pass:
    """Returns the steps of a strength: below 1 the last ones, as many as their share of the timesteps.

    Args:
        alphas_cumprod: see `first_pass`.
        full: the pass from noise.
        strength: share of the timesteps; None for all.

    Raises:
        InputError: it is out of range, or there is no step that late.
    """
    strength = check_strength(strength)
    if strength == 1:
        return full
    return _later(alphas_cumprod, full, round(strength * (LAST_TIMESTEP + 1)) - 1, "strength", strength)


def check_refine(timestep: int | None) -> int:
    """Returns the timestep that a second pass starts from, 0 for none.

    Raises:
        InputError: it is no timestep.
    """
    with in_field("refine"):
        if timestep is not None and (not is_integer(timestep) or not 0 <= timestep <= LAST_TIMESTEP):
            raise InputError(
                f"refine must be a timestep from 1 to {LAST_TIMESTEP}, or 0 for none, not {timestep!r}"
            )
    return timestep or 0


def check_strength(strength: float | None) -> float:
    """Returns the share of the noise that sampling starts from, 1 if nothing is said.

    Raises:
        InputError: it is not above 0 and at most 1.
    """
    number = isinstance(strength, int | float) and not isinstance(strength, bool)
    with in_field("strength"):
        if strength is not None and (not number or not 0 < strength <= 1):
            raise InputError(f"strength must be a number above 0, at most 1, not {strength!r}")
    return 1.0 if strength is None else strength


def _later(alphas_cumprod: NDArray[np.float32], first: Pass, timestep: int, name: str, value: float) -> Pass:
    rising = first.schedule.timesteps[::-1]
    late = rising[rising <= timestep]
    if not len(late):
        with in_field(name):
            raise InputError(
                f"{name} is {value:g}, and the last of the {len(rising)} steps is at timestep {rising[0]}: "
                "give a larger one, or more steps"
            )
    maps = first.sampling.map_steps
    share = len(late) / len(rising)
    sampling = replace(
        first.sampling,
        steps=len(late),
        timesteps=tuple(late.tolist()),
        map_steps=None if maps is None else max(round(maps * share), 1),
    )
    return first_pass(alphas_cumprod, sampling)
