"""Ranges and limits: every parameter out of range is refused, and the refusal names it."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest

from runtime.errors import InputError
from runtime.parameters import SamplingParameters, sampling_parameters
from runtime.request import Sampling
from runtime.systems.anydoor import DEFAULTS
from runtime.validation import (
    MAX_CONTROL_SCALE,
    MAX_GUIDANCE_SCALE,
    MAX_SEED,
    Limits,
    check_defaults,
    check_initial_noise,
    check_placement_count,
    check_sampling,
    check_seeds,
)

USUAL = sampling_parameters(Sampling(), DEFAULTS)
NAN, INF = float("nan"), float("inf")


def refusal(**changed: Any) -> InputError:
    with pytest.raises(InputError) as caught:
        check_sampling(replace(USUAL, **changed))
    return caught.value


@pytest.mark.parametrize("sampler", ["ddim", "dpm_solver_2m"])
@pytest.mark.parametrize("steps", [0, -1, 1000, 10_000, 2.0, True, "12", None])
def test_steps_out_of_range(sampler: str, steps: Any) -> None:
    error = refusal(sampler=sampler, steps=steps)
    assert str(error) == f"steps must be a whole number from 1 to 999, not {steps!r}"
    assert error.field == "steps"


@pytest.mark.parametrize("eta", [-0.1, 1.1, NAN, "1", True])
def test_eta_out_of_range(eta: Any) -> None:
    error = refusal(eta=eta)
    assert str(error) == f"eta must be a number from 0 to 1, not {eta!r}"
    assert error.field == "eta"


def test_only_ddim_adds_noise() -> None:
    error = refusal(sampler="dpm_solver_2m", eta=0.5)
    assert str(error) == "the sampler dpm_solver_2m adds no noise: eta must be 0 with it, not 0.5"
    assert error.field == "eta"


@pytest.mark.parametrize(
    ("field", "values", "sentence"),
    [
        ("guidance_scale", [-1, 100.5, NAN, INF, 10**400, "5"], "must be a number from 0 to 100"),
        ("control_scale", [-0.5, 11, NAN, INF, "1"], "must be a number from 0 to 10"),
        ("sampler", ["heun", "", None], "choose one of ddim, dpm_solver_2m"),
        ("guidance_interval", [(5, 1000), (-1, 5)], "must be a whole number from 0 to 999"),
        ("guidance_interval", [(7, 5), (7,), (1, 2, 3), ()], "must be a lower and a higher timestep"),
        ("map_steps", [0, -3, 1000, 1.5], "must be a whole number from 1 to 999"),
    ],
)
def test_other_sampling_parameters_out_of_range(field: str, values: list[Any], sentence: str) -> None:
    for value in values:
        error = refusal(**{field: value})
        assert sentence in str(error)
        assert error.field == field


@pytest.mark.parametrize(
    "within",
    [
        {"steps": 1},
        {"steps": np.int64(999)},
        {"guidance_scale": 0},
        {"guidance_scale": np.float32(MAX_GUIDANCE_SCALE)},
        {"control_scale": MAX_CONTROL_SCALE},
        {"eta": 1},
        {"sampler": "dpm_solver_2m"},
        {"guidance_interval": (0, 0)},
        {"guidance_interval": [200, 999]},
        {"map_steps": 1},
        {"map_steps": 999},
    ],
)
def test_the_ends_of_every_range_are_within_it(within: dict[str, Any]) -> None:
    check_sampling(replace(USUAL, **within))


def test_every_parameter_has_a_range() -> None:
    for name in {field.name for field in fields(SamplingParameters)}:
        assert refusal(**{name: "nonsense"}).field == name


@pytest.mark.parametrize("timesteps", [5, ("a",), (None,), (1.5, 3), (10**30,), (-1, 4), (True, 4)])
def test_exact_timesteps_are_whole_numbers_of_the_training(timesteps: Any) -> None:
    assert refusal(timesteps=timesteps).field == "timesteps"


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("steps", [0]),
        ("refine", [-1, 1000, 0.5]),
        ("strength", [0, -0.5, 1.01, NAN, True]),
        ("mode", ["abacus"]),
        ("edge", ["jagged"]),
        ("mask_level", [4]),
        ("crop_ratio", [0.5]),
        ("abacus", [1]),
    ],
)
def test_defaults_of_a_bundle_have_the_same_ranges(name: str, values: list[Any]) -> None:
    check_defaults({**DEFAULTS, "refine": 999, "strength": 1.0})
    for value in values:
        with pytest.raises(InputError, match=name.partition("_ratio")[0].replace("_", ".")):
            check_defaults({**DEFAULTS, name: value})


def test_a_server_may_allow_less() -> None:
    limits = Limits(steps=20, images=2, placements=1)
    check_sampling(replace(USUAL, steps=20), limits)
    with pytest.raises(InputError, match="steps must be a whole number from 1 to 20, not 21"):
        check_sampling(replace(USUAL, steps=21), limits)
    check_seeds(0, 2, limits)
    with pytest.raises(InputError, match="num_images must be a whole number from 1 to 2, not 3"):
        check_seeds(0, 3, limits)
    check_placement_count(1, limits)
    with pytest.raises(InputError, match="2 placements are given; at most 1 are allowed"):
        check_placement_count(2, limits)


@pytest.mark.parametrize("num_images", [0, -1, 65, 1.0, True])
def test_number_of_pictures_out_of_range(num_images: Any) -> None:
    with pytest.raises(InputError, match=f"num_images must be a whole number from 1 to 64, not {num_images}"):
        check_seeds(7, num_images)


def test_the_seed_of_every_picture_exists() -> None:
    check_seeds(MAX_SEED - 3, 3)
    for seed in (-1, MAX_SEED - 2, 0.5):
        with pytest.raises(InputError, match="seed must be a whole number from 0"):
            check_seeds(seed, 3)  # type: ignore[arg-type]


def test_something_must_be_placed() -> None:
    with pytest.raises(InputError, match="nothing to place: give at least one placement") as caught:
        check_placement_count(0)
    assert caught.value.field == "placements"


def test_initial_noise_has_one_latent_per_picture() -> None:
    noise = np.ones((2, 4, 8, 8), np.float64)
    assert check_initial_noise(noise, (2, 4, 8, 8)).dtype == np.float32  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"must have the shape \(1, 4, 8, 8\), not \(2, 4, 8, 8\)"):
        check_initial_noise(noise, (1, 4, 8, 8))  # type: ignore[arg-type]
    for other in ("noise", [[1], [1, 2]], {"a": 1}):
        with pytest.raises(InputError, match="initial_noise must be an array of numbers"):
            check_initial_noise(other, (1, 4, 8, 8))  # type: ignore[arg-type]
    noise[0, 0, 0, 0] = 1e300
    with pytest.raises(InputError, match="values that are not finite numbers"):
        check_initial_noise(noise, (2, 4, 8, 8))  # type: ignore[arg-type]
