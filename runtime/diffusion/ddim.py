"""Implements DDIM: the timesteps that are visited, and the coefficients of one step.

One step is linear in what it is given:

    next latent = coefficients[0] * latent + coefficients[1] * epsilon + coefficients[2] * carry

where `carry` is noise (or what another sampler keeps of the step before), so the step graph needs three
numbers per sample and no schedule. Source: DDIM (Song et al., 2021), equation 12; timesteps and last alpha as
in the original's cldm/ddim_hacked.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from runtime.errors import InputError, in_field

MAX_STEPS = LAST_TIMESTEP = 999


@dataclass(frozen=True)
class Schedule:
    """The steps of one sampling run, in the order they are taken."""

    timesteps: NDArray[np.int64]
    """(S,) timesteps in 0..999, largest first."""
    coefficients: NDArray[np.float32]
    """(S, 3) factors of latent, epsilon and noise."""
    alphas: NDArray[np.float64]
    """(S,) fraction of signal variance in the latent before each step."""
    multistep: bool = False
    """Whether the epsilon of the step before takes the place of the noise; see
    `runtime.diffusion.samplers`."""

    @property
    def steps(self) -> int:
        """Number of steps."""
        return len(self.timesteps)

    @cached_property
    def background_coefficients(self) -> NDArray[np.float32]:
        """(S, 2) factors of a clean latent and of noise that make of both a latent of the timestep that each
        step goes to. After the last step the latent is the clean one, as in diffusers'
        `StableDiffusionInpaintPipeline`."""
        after = np.append(self.alphas[1:], 1.0)
        factors: NDArray[np.float64] = np.sqrt(np.stack([after, 1 - after], axis=1))
        return factors.astype(np.float32)


def ddim_timesteps(steps: int, train_timesteps: int = 1000) -> NDArray[np.int64]:
    """Exactly `steps` timesteps in rising order.

    Where a constant stride gives that many, these are the timesteps that the original takes when it runs as
    many steps: 1, 21, ..., 981 for 50. (The original derives the stride from the number asked for and may run
    more: asked for 30 it runs 31.) Otherwise they are spread evenly.
    """
    stride = -(-train_timesteps // steps)
    strided = np.arange(0, train_timesteps, stride, dtype=np.int64)
    # a stride that divides 999 would end at timestep 1000, which does not exist: the original fails there
    if len(strided) == steps and strided[-1] + 1 < train_timesteps:
        return strided + 1
    return np.arange(steps, dtype=np.int64) * train_timesteps // steps + 1


def ddim_schedule(
    alphas_cumprod: NDArray[np.float32],
    steps: int,
    eta: float = 0.0,
    timesteps: Sequence[int] | None = None,
) -> Schedule:
    """Returns the schedule of a sampling run.

    Args:
        alphas_cumprod: (1000,) fraction of signal variance left, from the bundle.
        steps: number of steps, 1..999.
        eta: 0 is deterministic DDIM, 1 adds as much noise as DDPM.
        timesteps: exact timesteps to visit, rising, instead of `steps` spread ones.

    Raises:
        InputError: the exact timesteps do not rise, or do not exist.
    """
    if timesteps is None:
        rising = ddim_timesteps(steps, len(alphas_cumprod))
    else:
        rising = exact_timesteps(timesteps, len(alphas_cumprod))
    alphas = alphas_cumprod.astype(np.float64)
    now = alphas[rising]
    # the last step ends at alphas_cumprod[0], not at 1: a trace of noise stays, as in the original
    after = alphas[np.concatenate([[0], rising[:-1]])]
    sigma = eta * np.sqrt((1 - after) / (1 - now) * (1 - now / after))
    from_latent = np.sqrt(after / now)
    from_epsilon = np.sqrt(1 - after - sigma**2) - from_latent * np.sqrt(1 - now)
    coefficients = np.stack([from_latent, from_epsilon, sigma], axis=1)
    return Schedule(rising[::-1].copy(), coefficients[::-1].astype(np.float32), now[::-1].copy())


def exact_timesteps(timesteps: Sequence[int], train_timesteps: int = 1000) -> NDArray[np.int64]:
    """Returns timesteps that a caller chose.

    Raises:
        InputError: they do not rise strictly, or there are no such timesteps.
    """
    rising = np.asarray(timesteps, dtype=np.int64)
    with in_field("timesteps"):
        if rising.ndim != 1 or len(rising) == 0 or (np.diff(rising) <= 0).any():
            raise InputError("timesteps must rise strictly")
        if rising[0] < 0 or rising[-1] >= train_timesteps:
            raise InputError(f"timesteps must lie in 0..{train_timesteps - 1}")
    return rising


def predicted_clean_latent(
    latent: NDArray[np.float32], epsilon: NDArray[np.float32], alpha: float
) -> NDArray[np.float32]:
    """Returns the latent without its noise as far as the step could tell (DDIM's predicted x0), for
    previews."""
    clean: NDArray[np.float32] = (latent - np.sqrt(1 - alpha) * epsilon) / np.sqrt(alpha)
    return clean.astype(np.float32)
