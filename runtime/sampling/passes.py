"""Defines the passes of sampling a placement: one from noise, and a second one from its result if it is
refined.

Source of the second pass: SDEdit (Meng et al., 2022), section 3: noise of a timestep is added to the latent
of a picture, and sampling goes on from there.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from runtime.diffusion.ddim import Schedule
from runtime.diffusion.samplers import SAMPLERS
from runtime.errors import InputError, in_field
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
            clean: (C, h, w), the latent of the picture that is drawn again; None where there is none.
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
    rising = first.schedule.timesteps[::-1]
    late = rising[rising <= timestep]
    if not len(late):
        with in_field("refine"):
            raise InputError(
                f"refine is {timestep}, and the last of the {len(rising)} steps is at timestep {rising[0]}: "
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
