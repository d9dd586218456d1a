"""The schedule: the timesteps of the original, exactly as many as asked for, and a step that follows DDIM."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.diffusion.ddim import ddim_schedule, ddim_timesteps, predicted_clean_latent
from runtime.diffusion.noise_schedule import alphas_cumprod
from runtime.diffusion.samplers import SAMPLERS
from runtime.errors import InputError

ALPHAS = alphas_cumprod()
DRAWN = Path(__file__).parents[2] / "data" / "drawn.npz"


@pytest.mark.parametrize(
    ("steps", "first", "last"), [(50, [1, 21, 41], 981), (10, [1, 101, 201], 901), (4, [1, 251, 501], 751)]
)
def test_timesteps_of_the_original(steps: int, first: list[int], last: int) -> None:
    timesteps = ddim_timesteps(steps)
    assert timesteps[:3].tolist() == first
    assert timesteps[-1] == last


def test_the_originals_thirty_steps_are_thirty_one() -> None:
    """Asked for 30 the original runs 31 steps, 1, 34, ..., 991; we run what is asked for, either way."""
    assert ddim_timesteps(31).tolist() == list(range(1, 1000, 33))
    assert len(ddim_timesteps(30)) == 30


def test_exactly_as_many_steps_as_asked_for() -> None:
    for steps in range(1, 1000):
        timesteps = ddim_timesteps(steps)
        assert len(timesteps) == steps
        assert timesteps[0] == 1
        assert (np.diff(timesteps) > 0).all()
        assert timesteps[-1] <= 999


@pytest.mark.parametrize("run", ["box", "shape"])
def test_schedule_of_a_recorded_run(run: str) -> None:
    with np.load(DRAWN) as case:
        recorded = {k: case[f"{run}_ddim_{k}"] for k in ("timesteps", "alphas", "alphas_prev", "sigmas")}
    schedule = ddim_schedule(ALPHAS, len(recorded["timesteps"]))
    np.testing.assert_array_equal(schedule.timesteps[::-1], recorded["timesteps"])
    now, after = recorded["alphas"][::-1], recorded["alphas_prev"][::-1]
    np.testing.assert_allclose(schedule.coefficients[:, 0], np.sqrt(after / now), rtol=1e-6)
    np.testing.assert_allclose(schedule.coefficients[:, 2], recorded["sigmas"][::-1])


@given(st.integers(1, 999), st.integers(0, 2**32 - 1))
def test_a_step_with_the_true_noise_leads_to_the_less_noisy_latent(steps: int, seed: int) -> None:
    """With eta 0 and the true epsilon, x_t becomes x_s of the same clean latent and the same noise."""
    rng = np.random.default_rng(seed)
    clean, epsilon = rng.standard_normal((2, 8))
    schedule = ddim_schedule(ALPHAS, steps)
    step = int(rng.integers(steps))
    timestep = schedule.timesteps[step]
    following = schedule.timesteps[step + 1] if step + 1 < steps else 0

    def noisy(t: int) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
        return np.sqrt(float(ALPHAS[t])) * clean + np.sqrt(1 - float(ALPHAS[t])) * epsilon

    from_latent, from_epsilon, from_noise = schedule.coefficients[step].astype(np.float64)
    assert from_noise == 0
    np.testing.assert_allclose(
        from_latent * noisy(timestep) + from_epsilon * epsilon, noisy(following), atol=2e-5
    )


@given(st.integers(2, 200), st.floats(0.01, 1))
def test_eta_trades_direction_for_noise_at_constant_variance(steps: int, eta: float) -> None:
    """However much of the remaining noise is drawn anew, its variance is what the schedule says."""
    schedule = ddim_schedule(ALPHAS, steps, eta)
    c = schedule.coefficients.astype(np.float64)
    now = ALPHAS[schedule.timesteps].astype(np.float64)
    after = np.append(now[1:], float(ALPHAS[0]))
    kept = c[:, 1] + c[:, 0] * np.sqrt(1 - now)
    np.testing.assert_allclose(kept**2 + c[:, 2] ** 2, 1 - after, atol=1e-5)


@pytest.mark.parametrize("sampler", list(SAMPLERS))
def test_a_background_is_as_noisy_as_the_latent_after_each_step(sampler: str) -> None:
    """And clean after the last one."""
    schedule = SAMPLERS[sampler](ALPHAS, 7, 0.0, None)
    signal, noise = schedule.background_coefficients.T
    np.testing.assert_allclose(signal[:-1], np.sqrt(ALPHAS[schedule.timesteps[1:]]), rtol=1e-6)
    np.testing.assert_allclose(noise[:-1], np.sqrt(1 - ALPHAS[schedule.timesteps[1:]]), rtol=1e-6)
    assert (signal[-1], noise[-1]) == (1, 0)


def test_explicit_timesteps_are_taken_as_they_are() -> None:
    schedule = ddim_schedule(ALPHAS, 50, timesteps=[1, 34, 991])
    assert schedule.timesteps.tolist() == [991, 34, 1]


@pytest.mark.parametrize("timesteps", [[], [5, 5], [9, 1], [-1, 3], [3, 1000]])
def test_timesteps_that_make_no_schedule(timesteps: list[int]) -> None:
    with pytest.raises(InputError, match="timesteps must"):
        ddim_schedule(ALPHAS, 10, timesteps=timesteps)


def test_preview_of_a_latent_is_the_clean_latent_when_epsilon_is_right() -> None:
    rng = np.random.default_rng(0)
    clean, epsilon = rng.standard_normal((2, 4, 8, 8), dtype=np.float32)
    alpha = float(ALPHAS[501])
    noisy = np.float32(np.sqrt(alpha)) * clean + np.float32(np.sqrt(1 - alpha)) * epsilon
    np.testing.assert_allclose(predicted_clean_latent(noisy, epsilon, alpha), clean, atol=1e-5)
