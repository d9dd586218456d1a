"""The qualities: what each saves, and that parameters of the request override them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engines.options import EngineOptions
from runtime import Compositor, InputError, Request, Sampling
from runtime.diffusion.ddim import ddim_timesteps
from runtime.diffusion.presets import EXACT, QUALITIES
from runtime.parameters import SAMPLING_PARAMETERS, sampling_parameters
from runtime.systems.anydoor import DEFAULTS
from tests.support.anydoor import CONTROL, DENOISE
from tests.support.observers import RunCounter
from tests.support.pictures import PLACEMENT, SCENE, Pixels

SHORTENED = {
    "balanced": Sampling(quality="balanced", steps=4, map_steps=2),
    "fast": Sampling(quality="fast", steps=3, map_steps=2),
}
"""The qualities with the fewest steps that still use all they are made of."""


@pytest.fixture
def compositor(tiny_bundle: Path) -> Compositor:
    return Compositor.load(tiny_bundle, EngineOptions(backend="onnxruntime", device="cpu"))


def rows(compositor: Compositor, sampling: Sampling, seed: int = 7) -> Mapping[str, list[int]]:
    """Rows of every call of the control and denoise graphs for one picture."""
    compositor.engine.observer = counter = RunCounter()
    draw(compositor, sampling, seed)
    return counter.rows


def draw(compositor: Compositor, sampling: Sampling, seed: int = 7) -> Pixels:
    (result,) = compositor.run(Request(SCENE, [PLACEMENT], seed, sampling))
    return result.image


# --- what is saved ----------------------------------------------------------------------------------------


def test_exact_is_the_default_and_leaves_nothing_out(compositor: Compositor) -> None:
    exact = sampling_parameters(Sampling(quality=EXACT), DEFAULTS)
    assert sampling_parameters(Sampling(), DEFAULTS) == exact
    assert rows(compositor, Sampling()) == {CONTROL: [2] * 50, DENOISE: [2] * 50}


def test_exact_visits_the_timesteps_of_the_original(compositor: Compositor) -> None:
    job = compositor.accept(Request(SCENE, [PLACEMENT], 7, Sampling(quality=EXACT)))
    assert job.passes[0][1].schedule.timesteps.tolist() == ddim_timesteps(50)[::-1].tolist()
    assert not job.passes[0][1].schedule.multistep


def test_outside_the_interval_only_the_conditional_half_is_computed(compositor: Compositor) -> None:
    sampling = Sampling(timesteps=(101, 301, 501, 701, 901), guidance_interval=(301, 701))
    assert rows(compositor, sampling) == {CONTROL: [1, 2, 2, 2, 1], DENOISE: [1, 2, 2, 2, 1]}


def test_an_interval_without_steps_is_sampling_without_guidance(compositor: Compositor) -> None:
    found = draw(compositor, Sampling(steps=3, guidance_interval=(998, 999)))
    np.testing.assert_array_equal(found, draw(compositor, Sampling(steps=3, guidance_scale=1.0)))


def test_detail_maps_at_some_timesteps(compositor: Compositor) -> None:
    assert rows(compositor, Sampling(steps=6, map_steps=2)) == {CONTROL: [2, 2], DENOISE: [2] * 6}


def test_as_many_map_steps_as_steps_change_nothing(compositor: Compositor) -> None:
    found = draw(compositor, Sampling(steps=3, map_steps=999))
    np.testing.assert_array_equal(found, draw(compositor, Sampling(steps=3)))


def test_maps_that_a_guided_and_an_unguided_step_share_have_both_halves(compositor: Compositor) -> None:
    sampling = Sampling(timesteps=(101, 301, 501, 701), guidance_interval=(301, 999), map_steps=2)
    assert rows(compositor, sampling) == {CONTROL: [2, 2], DENOISE: [2, 2, 2, 1]}


@pytest.mark.parametrize("quality", ["balanced", "fast"])
def test_a_reroll_needs_no_control_net(compositor: Compositor, quality: str) -> None:
    assert CONTROL in rows(compositor, SHORTENED[quality])
    assert CONTROL not in rows(compositor, SHORTENED[quality], seed=8)


def test_a_multistep_sampler_follows_the_path_more_closely_than_ddim(compositor: Compositor) -> None:
    """Against 200 steps of DDIM from the same noise, over the same few timesteps."""
    few = (99, 199, 299, 399, 499, 599, 699, 799, 899, 999)
    many = tuple(range(4, 1000, 5))
    ddim, dpm_solver_2m, limit = (
        draw(compositor, Sampling(timesteps=timesteps, sampler=sampler, guidance_scale=1.0)).astype(float)
        for timesteps, sampler in ((few, "ddim"), (few, "dpm_solver_2m"), (many, "ddim"))
    )
    assert np.abs(dpm_solver_2m - limit).mean() < np.abs(ddim - limit).mean()


# --- overriding -------------------------------------------------------------------------------------------


def test_qualities_set_parameters_that_there_are() -> None:
    for parameters in QUALITIES.values():
        assert parameters.keys() <= set(SAMPLING_PARAMETERS)


@pytest.mark.parametrize("quality", QUALITIES)
@pytest.mark.parametrize(
    "override",
    [
        {"steps": 33},
        {"map_steps": 7},
        {"sampler": "ddim"},
        {"guidance_interval": (5, 6)},
        {"guidance_scale": 3.0},
    ],
)
def test_parameters_of_the_request_override_the_quality(quality: str, override: dict[str, Any]) -> None:
    expected = replace(sampling_parameters(Sampling(quality=quality), DEFAULTS), **override)
    assert sampling_parameters(Sampling(quality=quality, **override), DEFAULTS) == expected


def test_a_quality_that_does_not_exist(compositor: Compositor) -> None:
    sentence = "there is no quality 'superb': choose one of exact, balanced, fast"
    with pytest.raises(InputError, match=sentence) as caught:
        compositor.accept(Request(SCENE, [PLACEMENT], 7, Sampling(quality="superb")))
    assert caught.value.field == "sampling.quality"


@pytest.mark.parametrize(
    ("sampling", "sentence"),
    [
        (Sampling(sampler="heun"), "there is no sampler 'heun': choose one of ddim, dpm_solver_2m"),
        (
            Sampling(sampler="dpm_solver_2m", eta=0.5),
            "the sampler dpm_solver_2m adds no noise: eta must be 0 with it, not 0.5",
        ),
        (
            Sampling(quality="fast", eta=0.5),
            "the sampler dpm_solver_2m adds no noise: eta must be 0 with it, not 0.5",
        ),
        (Sampling(guidance_interval=(5, 1000)), "guidance_interval must be a whole number from 0 to 999"),
        (Sampling(guidance_interval=(7, 5)), "must be a lower and a higher timestep, not 7, 5"),
        (Sampling(guidance_interval=(7,)), "must be a lower and a higher timestep, not 7"),  # type: ignore[arg-type]
        (Sampling(map_steps=0), "map_steps must be a whole number from 1 to 999, not 0"),
    ],
)
def test_sampling_that_cannot_be_used(compositor: Compositor, sampling: Sampling, sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        compositor.run(Request(SCENE, [PLACEMENT], sampling=sampling))
