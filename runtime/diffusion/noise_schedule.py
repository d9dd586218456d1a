"""Computes the noise schedule of Stable Diffusion 2.1: the remaining signal at each timestep."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

TRAIN_TIMESTEPS = 1000
BETA_START = 0.00085
BETA_END = 0.0120


def betas() -> NDArray[np.float64]:
    """Returns the noise variance that each of the 1000 timesteps adds, (1000,).

    Linear in the square root, which the original calls "linear". Source: make_beta_schedule in
    ldm/modules/diffusionmodules/util.py.
    """
    return np.linspace(BETA_START**0.5, BETA_END**0.5, TRAIN_TIMESTEPS, dtype=np.float64) ** 2


def alphas_cumprod() -> NDArray[np.float32]:
    """Returns the fraction of signal variance left at each of the 1000 timesteps (DDPM's alpha bar), (1000,).

    Computed in float64 and kept in float32, as in the original.
    """
    return np.cumprod(1.0 - betas()).astype(np.float32)
