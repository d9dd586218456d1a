"""Which value a parameter has: the request's, else the quality's, else the manifest's, else the system's."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engines.errors import BundleError
from engines.manifest import MANIFEST
from engines.options import EngineOptions
from runtime import Compositor, Placement, Request, Sampling
from runtime.diffusion.presets import QUALITIES
from runtime.parameters import (
    PLACEMENT_PARAMETERS,
    SAMPLING_PARAMETERS,
    placement_parameters,
    sampling_parameters,
)
from runtime.systems import imprint
from runtime.systems.anydoor import DEFAULTS
from tests.support.pictures import SCENE, Pixels, cutout

CPU = EngineOptions(backend="onnxruntime", device="cpu")

PARAMETERS = (*SAMPLING_PARAMETERS, *PLACEMENT_PARAMETERS)


def some(names: tuple[str, ...]) -> st.SearchStrategy[set[str]]:
    return st.sets(st.sampled_from(names))


def labelled(source: str, names: set[str] | tuple[str, ...]) -> dict[str, Any]:
    """Parameter -> a value that says where it comes from."""
    return {name: f"{name} of the {source}" for name in names}


@given(
    request=some(SAMPLING_PARAMETERS),
    manifest=some(SAMPLING_PARAMETERS),
    quality=st.one_of(st.none(), st.sampled_from(sorted(QUALITIES))),
)
def test_a_sampling_parameter_comes_from_the_first_that_sets_it(
    request: set[str], manifest: set[str], quality: str | None
) -> None:
    layers = [
        labelled("request", request),
        QUALITIES[quality] if quality else {},
        labelled("manifest", manifest),
        labelled("system", SAMPLING_PARAMETERS),
    ]
    found = sampling_parameters(Sampling(quality, **layers[0]), {**layers[3], **layers[2]})
    if any("steps" in layer for layer in layers[:2]):
        # they take the place of the timesteps that a manifest names
        layers = [layers[0], {"timesteps": None}, *layers[1:]]
    for name in SAMPLING_PARAMETERS:
        assert getattr(found, name) == next(layer[name] for layer in layers if name in layer)


@given(request=some(PLACEMENT_PARAMETERS), manifest=some(PLACEMENT_PARAMETERS))
def test_a_placement_parameter_comes_from_the_first_that_sets_it(
    request: set[str], manifest: set[str]
) -> None:
    layers = [
        labelled("request", request),
        labelled("manifest", manifest),
        labelled("system", PLACEMENT_PARAMETERS),
    ]
    given = {name: layers[0].get(name) for name in PLACEMENT_PARAMETERS}
    found = placement_parameters(given, {**layers[2], **layers[1]})
    for name in PLACEMENT_PARAMETERS:
        assert getattr(found, name) == next(layer[name] for layer in layers if name in layer)


def test_a_number_of_steps_takes_the_place_of_the_timesteps_of_a_manifest() -> None:
    defaults = {**DEFAULTS, "timesteps": (1, 500, 999)}
    assert sampling_parameters(Sampling(), defaults).timesteps == (1, 500, 999)
    assert sampling_parameters(Sampling(steps=8), defaults).timesteps is None
    assert sampling_parameters(Sampling(quality="fast"), defaults).timesteps is None


def test_a_value_that_is_false_is_a_value() -> None:
    sampling = Sampling(quality="fast", guidance_scale=0.0, eta=0.0)
    found = sampling_parameters(sampling, {**DEFAULTS, "guidance_scale": 5.0, "eta": 1.0})
    assert (found.guidance_scale, found.eta) == (0.0, 0.0)


def test_every_parameter_can_be_left_open_in_a_request() -> None:
    for of in (Sampling, Placement):
        open_fields = {field.name for field in fields(of) if field.default is None}
        names = SAMPLING_PARAMETERS if of is Sampling else PLACEMENT_PARAMETERS
        assert set(names) <= open_fields
    assert {*DEFAULTS, *imprint.DEFAULTS} == set(PARAMETERS)


# --- from end to end --------------------------------------------------------------------------------------

TRAINED_FOR: Mapping[str, Any] = {
    "steps": 4,
    "guidance_scale": 2.5,
    "control_scale": 0.7,
    "sampler": "dpm_solver_2m",
    "guidance_interval": [400, 999],
    "map_steps": 2,
    "mode": "keep_background",
    "reference_ratio": 1.4,
    "box_ratio": 1.3,
    "crop_ratio": 1.6,
}
"""Defaults of a manifest, none of them the system's."""

BOX = (30, 20, 80, 70)


@pytest.fixture
def with_defaults(tiny_bundle: Path, tmp_path: Path) -> Callable[[Mapping[str, Any]], Path]:
    """Makes a copy of a bundle whose manifest has other defaults."""

    def copied(defaults: Mapping[str, Any]) -> Path:
        bundle = Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
        content = json.loads((bundle / MANIFEST).read_text())
        assert content["defaults"] == {}
        (bundle / MANIFEST).write_text(json.dumps(content | {"defaults": defaults}))
        return bundle

    return copied


def draw(compositor: Compositor, placement: Placement, sampling: Sampling) -> Pixels:
    (result,) = compositor.run(Request(SCENE, [placement], 7, sampling))
    return result.image


def given_in_a_request(parameters: Mapping[str, Any]) -> tuple[Placement, Sampling]:
    placement = {name: parameters[name] for name in PLACEMENT_PARAMETERS if name in parameters}
    sampling = {name: parameters[name] for name in SAMPLING_PARAMETERS if name in parameters}
    return Placement(cutout(), box=BOX, **placement), Sampling(**sampling)


def test_defaults_of_the_manifest_change_the_picture_as_giving_them_does(
    tiny_bundle: Path, with_defaults: Callable[[Mapping[str, Any]], Path]
) -> None:
    plain, trained = (Compositor.load(path, CPU) for path in (tiny_bundle, with_defaults(TRAINED_FOR)))
    everything = DEFAULTS | TRAINED_FOR
    nothing_given = draw(trained, *given_in_a_request({}))
    np.testing.assert_array_equal(nothing_given, draw(plain, *given_in_a_request(TRAINED_FOR)))
    np.testing.assert_array_equal(nothing_given, draw(plain, *given_in_a_request(everything)))
    # with everything given, the manifest's defaults do not matter
    other = {**DEFAULTS, "steps": 3, "map_steps": 999}
    np.testing.assert_array_equal(*(draw(c, *given_in_a_request(other)) for c in (plain, trained)))
    # and every one of them matters by itself
    for name in TRAINED_FOR:
        changed = draw(plain, *given_in_a_request({**everything, name: {**DEFAULTS, "steps": 5}[name]}))
        assert not np.array_equal(changed, nothing_given), name


def test_a_request_overrides_the_quality_and_the_quality_the_manifest(
    with_defaults: Callable[[Mapping[str, Any]], Path],
) -> None:
    compositor = Compositor.load(with_defaults(TRAINED_FOR), CPU)

    def accepted(sampling: Sampling) -> dict[str, Any]:
        job = compositor.accept(Request(SCENE, [Placement(cutout(), box=BOX)], 7, sampling))
        return asdict(job.passes[0][1].sampling)

    manifest = {**DEFAULTS, **TRAINED_FOR}
    expected = {name: manifest[name] for name in SAMPLING_PARAMETERS}
    assert accepted(Sampling()) == expected
    assert accepted(Sampling(quality="exact")) == expected
    assert accepted(Sampling(quality="fast")) == expected | QUALITIES["fast"]
    assert accepted(Sampling(quality="fast", steps=9)) == {**expected, **QUALITIES["fast"], "steps": 9}
    assert accepted(Sampling(steps=9, map_steps=9)) == {**expected, "steps": 9, "map_steps": 9}


def test_a_default_of_the_manifest_that_is_out_of_range_is_refused(
    with_defaults: Callable[[Mapping[str, Any]], Path],
) -> None:
    bundle = with_defaults({"steps": 0})
    with pytest.raises(
        BundleError, match="unusable defaults: steps must be a whole number from 1 to 999, not 0"
    ):
        Compositor.load(bundle, CPU)


@pytest.mark.parametrize("name", ["freedom", "seed", "quality"])
def test_a_default_for_something_that_is_no_parameter(
    with_defaults: Callable[[Mapping[str, Any]], Path], name: str
) -> None:
    bundle = with_defaults({"steps": 3, name: 1})
    with pytest.raises(BundleError) as caught:
        Compositor.load(bundle, CPU)
    assert (
        str(caught.value) == f"the bundle at '{bundle}' has unusable defaults: there is no parameter '{name}'"
    )
