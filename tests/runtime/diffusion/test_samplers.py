"""The multistep sampler: of second order where the true epsilon is known, and DDIM where it has no
history."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from runtime.diffusion.ddim import ddim_schedule
from runtime.diffusion.noise_schedule import alphas_cumprod
from runtime.diffusion.samplers import (
    SAMPLERS,
    dpm_solver_2m_coefficients,
    dpm_solver_2m_schedule,
    trailing_timesteps,
)

ALPHAS = alphas_cumprod()
Path = NDArray[np.float64]

MEAN, VARIANCE = 0.7, 0.3
"""Of normally distributed clean latents, for which the best epsilon is known in closed form."""


def best_epsilon(latent: float, alpha: float, variance: float = VARIANCE) -> float:
    """The expected noise in a latent, E[noise | latent]."""
    spread = alpha * variance + 1 - alpha
    return float(np.sqrt(1 - alpha) * (latent - np.sqrt(alpha) * MEAN) / spread)


def true_end(latent: float, first: float, last: float, variance: float = VARIANCE) -> float:
    """Where the noise-free path ends: as many standard deviations from the mean as it starts."""
    deviations = (latent - np.sqrt(first) * MEAN) / np.sqrt(first * variance + 1 - first)
    return float(np.sqrt(last) * MEAN + deviations * np.sqrt(last * variance + 1 - last))


def error(
    path: Path, coefficients: NDArray[np.floating], start: float = 1.3, variance: float = VARIANCE
) -> float:
    latent, before = start, 0.0
    for alpha, (from_latent, from_epsilon, from_before) in zip(path, coefficients):
        epsilon = best_epsilon(latent, alpha, variance)
        latent = from_latent * latent + from_epsilon * epsilon + from_before * before
        before = epsilon
    return abs(latent - true_end(start, path[0], path[-1], variance))


def even_path(steps: int) -> Path:
    """From noise to picture in even steps of lambda."""
    ratio = np.exp(-2 * np.linspace(-2.0, 2.0, steps + 1))
    return 1 / (1 + ratio)


def uneven_path(steps: int) -> Path:
    """The same, with steps that grow: a multistep method has to know the one before."""
    ratio = np.exp(-2 * (np.linspace(0.0, 1.0, steps + 1) ** 1.5 * 4 - 2))
    return 1 / (1 + ratio)


def ddim_coefficients(path: Path) -> NDArray[np.float64]:
    now, after = path[:-1], path[1:]
    scale = np.sqrt(after / now)
    return np.stack([scale, np.sqrt(1 - after) - scale * np.sqrt(1 - now), 0 * now], axis=1)


@pytest.mark.parametrize("path", [even_path, uneven_path])
def test_twice_the_steps_make_a_fourth_of_the_error(path) -> None:  # type: ignore[no-untyped-def]
    errors = [error(path(steps), dpm_solver_2m_coefficients(path(steps))) for steps in (40, 80, 160, 320)]
    orders = np.log2(np.array(errors[:-1]) / errors[1:])
    assert orders[-1] == pytest.approx(2.0, abs=0.1)


def test_ddim_is_of_first_order_and_worse() -> None:
    errors = [error(even_path(steps), ddim_coefficients(even_path(steps))) for steps in (80, 160, 320)]
    assert np.log2(errors[1] / errors[2]) == pytest.approx(1.0, abs=0.1)
    assert error(even_path(80), dpm_solver_2m_coefficients(even_path(80))) < errors[0] / 10


@pytest.mark.parametrize("variance", [0.3, 0.05])
@pytest.mark.parametrize("steps", [8, 12, 20, 40, 80])
def test_on_the_real_schedule_it_is_nearer_than_ddim(steps: int, variance: float) -> None:
    """Down to the last step, which is much longer than the one before."""
    schedule = dpm_solver_2m_schedule(ALPHAS, steps)
    path = np.append(schedule.alphas, ALPHAS[0]).astype(np.float64)
    ours = error(path, schedule.coefficients, variance=variance)
    assert ours < 0.7 * error(path, ddim_coefficients(path), variance=variance)
    uncapped = h_ratios(path)[-1] / 2
    assert uncapped > 1.5  # so it matters
    assert schedule.coefficients[-1, 2] == pytest.approx(-change(path)[-1], rel=1e-5)


def h_ratios(path: Path) -> Path:
    """How many times as long in lambda as the one before a step is, from the second on."""
    h = np.diff(np.log(path / (1 - path))) / 2
    return h[1:] / h[:-1]


def change(path: Path) -> Path:
    """What a step of DDIM from the same latent multiplies epsilon with."""
    return np.sqrt(path[1:]) * np.diff(np.sqrt((1 - path) / path))


@given(st.integers(1, 100))
def test_the_first_step_is_that_of_ddim(steps: int) -> None:
    timesteps = trailing_timesteps(steps).tolist()
    multistep = dpm_solver_2m_schedule(ALPHAS, steps)
    ddim = ddim_schedule(ALPHAS, steps, timesteps=timesteps)
    np.testing.assert_array_equal(multistep.timesteps, ddim.timesteps)
    np.testing.assert_allclose(multistep.coefficients[0], ddim.coefficients[0], rtol=1e-6, atol=1e-7)


@given(st.integers(2, 100))
def test_if_epsilon_does_not_change_every_step_is_that_of_ddim(steps: int) -> None:
    multistep = dpm_solver_2m_schedule(ALPHAS, steps)
    ddim = ddim_schedule(ALPHAS, steps, timesteps=trailing_timesteps(steps).tolist())
    both = multistep.coefficients[:, 1] + multistep.coefficients[:, 2]
    np.testing.assert_allclose(multistep.coefficients[:, 0], ddim.coefficients[:, 0], rtol=1e-6)
    np.testing.assert_allclose(both, ddim.coefficients[:, 1], rtol=1e-4, atol=1e-6)


def test_ddim_is_left_as_it_is() -> None:
    found, expected = SAMPLERS["ddim"](ALPHAS, 50, 0.3, None), ddim_schedule(ALPHAS, 50, 0.3)
    np.testing.assert_array_equal(found.coefficients, expected.coefficients)
    np.testing.assert_array_equal(found.timesteps, expected.timesteps)
    assert not found.multistep


def test_timesteps_start_at_noise_and_are_as_many_as_asked_for() -> None:
    assert trailing_timesteps(10).tolist() == list(range(99, 1000, 100))
    for steps in range(1, 1000):
        timesteps = trailing_timesteps(steps)
        assert len(timesteps) == steps
        assert timesteps[0] >= 0
        assert timesteps[-1] == 999
        assert (np.diff(timesteps) > 0).all()
        assert np.isfinite(dpm_solver_2m_schedule(ALPHAS, steps).coefficients).all()


def test_exact_timesteps_are_taken_as_they_are() -> None:
    schedule = dpm_solver_2m_schedule(ALPHAS, 9, timesteps=[1, 34, 991])
    assert schedule.timesteps.tolist() == [991, 34, 1]


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_takes_as_many_steps_as_asked_for(sampler: str) -> None:
    for steps in (1, 7, 999):
        schedule = SAMPLERS[sampler](ALPHAS, steps, 0.0, None)
        assert schedule.steps == steps
        assert schedule.coefficients.shape == (steps, 3)
        assert schedule.alphas.shape == (steps,)
        assert schedule.multistep == (sampler == "dpm_solver_2m")
