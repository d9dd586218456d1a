"""Implements the samplers: DDIM (`runtime.diffusion.ddim`), and a multistep sampler that needs fewer steps.

With the signal and noise scales a and s of a latent x = a * clean + s * noise, sampling without added noise
follows an ordinary differential equation (DDIM, Song et al., 2021, equation 14):

    d(x / a) / d(s / a) = epsilon(x)

DDIM holds epsilon constant over a step. dpm_solver_2m extrapolates it from the step before. Over
lambda = log(a / s), half the logarithm of the signal-to-noise ratio, epsilon changes evenly; with steps h and
h_before in lambda it takes the value half-way,

    x' / a' = x / a + (s' / a' - s / a) * (epsilon + h / (2 * h_before) * (epsilon - epsilon_before))

whose error falls with the square of the step. Source: DPM-Solver (Lu et al., 2022), second order, as a
multistep method for the predicted noise. The update is linear in (latent, epsilon, epsilon before), as DDIM's
is in (latent, epsilon, noise), and it adds no noise: the same step graph takes it. The first step has
nothing before it and is DDIM's. The last one, to where next to no noise is left, is two to five times as long
in lambda as the one before: no step looks farther ahead than the one before it was long (`_FARTHEST`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from runtime.diffusion.ddim import Schedule, ddim_schedule, exact_timesteps

_FARTHEST = 1.0
"""How far ahead epsilon is extrapolated at the most, in lengths of the step before; half a length where steps
are of one length. A line through two points says little about what is farther away."""


def dpm_solver_2m_schedule(
    alphas_cumprod: NDArray[np.float32],
    steps: int,
    eta: float = 0.0,
    timesteps: Sequence[int] | None = None,
) -> Schedule:
    """Returns the schedule of a run with the second-order solver; the arguments are those of `ddim_schedule`.

    It adds no noise, whatever `eta` is: requests with another one are refused in `runtime.validation`.
    """
    alphas = alphas_cumprod.astype(np.float64)
    if timesteps is None:
        rising = trailing_timesteps(steps, len(alphas))
    else:
        rising = exact_timesteps(timesteps, len(alphas))
    falling = rising[::-1].copy()
    # ends where DDIM does, at alphas_cumprod[0]
    path = alphas[np.append(falling, 0)]
    return Schedule(falling, dpm_solver_2m_coefficients(path).astype(np.float32), path[:-1], multistep=True)


SamplerSchedule = Callable[[NDArray[np.float32], int, float, Sequence[int] | None], Schedule]
"""(alphas_cumprod, steps, eta, exact timesteps) -> the steps of a run."""

SAMPLERS: Mapping[str, SamplerSchedule] = {
    "ddim": ddim_schedule,
    "dpm_solver_2m": dpm_solver_2m_schedule,
}
"""Name -> what makes its schedule. A sampler is linear in latent, epsilon and carry, so it needs no graph of
its own."""


def trailing_timesteps(steps: int, train_timesteps: int = 1000) -> NDArray[np.int64]:
    """Returns the last timestep of each of `steps` equal parts of the schedule, in rising order.

    The first step then starts where the latent is noise. DDIM's usual timesteps are the first ones of each
    part: 1 to 925 for 12 steps, where a trained network expects to see some of the picture already. Source:
    Lin et al., 2024, section 3.3.
    """
    return np.arange(1, steps + 1, dtype=np.int64) * train_timesteps // steps - 1


def dpm_solver_2m_coefficients(alphas: NDArray[np.float64]) -> NDArray[np.float64]:
    """Returns what the steps of dpm_solver_2m multiply latent, epsilon and the epsilon before with.

    Args:
        alphas: (S + 1,) fraction of signal variance before the first step and after each.

    Returns:
        (S, 3).
    """
    signal = np.sqrt(alphas)
    ratio = np.sqrt(1 - alphas) / signal
    h = -np.diff(np.log(ratio))
    extrapolation = np.zeros(len(h))
    extrapolation[1:] = np.minimum(h[1:] / (2 * h[:-1]), _FARTHEST)
    after = signal[1:]
    change = after * np.diff(ratio)
    return np.stack([after / signal[:-1], change * (1 + extrapolation), -change * extrapolation], axis=1)
