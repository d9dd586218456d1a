"""Requests of Python callers: NumPy's numbers are numbers; what is no placement, view or click is named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runtime import Compositor, EngineOptions, InputError, Placement, Request, Sampling
from runtime.edits import Editor
from runtime.request import Edit, Remove, Where
from tests.support.pictures import PLACEMENT, SCENE, cutout


@pytest.fixture(scope="module")
def compositor(tiny_bundle: Path) -> Compositor:
    return Compositor.load(tiny_bundle, EngineOptions(backend="onnxruntime", device="cpu"))


def test_numbers_of_numpy_are_numbers(compositor: Compositor) -> None:
    sampling = Sampling(steps=np.uint8(50), guidance_scale=np.float16(5), map_steps=np.int8(5))  # type: ignore[arg-type]
    placement = Placement(cutout(), box=np.array([30, 20, 80, 70]), refine=np.uint8(0))  # type: ignore[arg-type]
    request = Request.of(SCENE, placement, np.uint8(255), sampling, np.int32(2))  # type: ignore[arg-type]
    assert compositor.steps_of(request) == (100, 0)
    job = compositor.accept(request)
    assert job.seeds == [255, 256]
    assert {type(seed) for seed in job.seeds} == {int}


@pytest.mark.parametrize(
    ("placements", "field", "sentence"),
    [
        ("cup.png", "placements[0]", "a Placement is expected, not str"),
        ([PLACEMENT, None], "placements[1]", "a Placement is expected, not NoneType"),
        (Placement(cutout(), views=["b.png"]), "placements[0].views", "a list of View is expected"),  # type: ignore[list-item]
        (
            Placement(cutout(), reference_clicks=(120, 80)),  # type: ignore[arg-type]
            "placements[0].reference_clicks",
            "a click must be .* in whole pixels, not 120",
        ),
        (
            Placement(cutout(), reference_clicks=[{"x": 1, "y": 2}]),  # type: ignore[list-item]
            "placements[0].reference_clicks",
            "a click must be .* in whole pixels",
        ),
    ],
)
def test_what_is_no_placement_is_named(
    compositor: Compositor, placements: Any, field: str, sentence: str
) -> None:
    with pytest.raises(InputError, match=sentence) as caught:
        compositor.composite(SCENE, placements)
    assert caught.value.field == field


def test_a_quality_that_is_no_name(compositor: Compositor) -> None:
    with pytest.raises(InputError, match="there is no quality"):
        compositor.composite(SCENE, PLACEMENT, sampling=Sampling(quality=["fast"]))  # type: ignore[arg-type]


@pytest.mark.parametrize("seed", ["", 0.0, False, []])
def test_the_seed_of_an_edit_is_a_whole_number(compositor: Compositor, seed: Any) -> None:
    with pytest.raises(InputError, match="seed must be a whole number"):
        Editor(compositor).run(Edit(SCENE, Where(), Remove(), seed=seed))
