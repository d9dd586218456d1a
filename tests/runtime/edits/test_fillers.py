"""Holes are filled by Stable Diffusion for inpainting, by IMPRINT without an object, or by a guess."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from engines.options import EngineOptions
from runtime import Compositor
from runtime.edits import Editor
from runtime.edits.fillers import GUESS
from runtime.errors import InputError
from runtime.imaging.holes import hole_of
from runtime.request import (
    Action,
    Edit,
    Fill,
    Move,
    Placement,
    Remove,
    Reshape,
    Sampling,
    Swap,
    SwapPlaces,
    TryOn,
    Where,
)
from tests.support.imprint import tiny_imprint_bundle
from tests.support.serving import object_array, scene_array
from tests.support.stable_diffusion import tiny_stable_diffusion_bundle

CPU = EngineOptions(backend="onnxruntime", device="cpu", threads=1)
SCENE = scene_array(width=96, height=64)
CUP, VASE, TALL = np.zeros((3, 64, 96), bool)
CUP[20:40, 10:30] = VASE[14:50, 66:76] = TALL[10:42, 14:26] = True
FILLERS = ("stable_diffusion", "imprint", GUESS)
STEPS = {"stable_diffusion": 2, "imprint": 2, GUESS: 0}
ACTIONS = {
    "remove": (Remove(), [CUP], 0),
    "move": (Move((50, 20, 90, 50)), [CUP], 1),
    "reshape": (Reshape(TALL), [CUP], 1),
    "swap": (Swap(Placement(object_array())), [CUP], 1),
    "swap-places": (SwapPlaces(Where(mask=VASE)), [CUP, VASE], 2),
    "try-on": (TryOn(Placement(object_array())), [], 1),
}


@pytest.fixture(scope="module")
def editors(tiny_bundle: Path) -> dict[str, Editor]:
    compositor = Compositor.load(tiny_bundle, CPU)
    fillers = {"stable_diffusion": tiny_stable_diffusion_bundle(9), "imprint": tiny_imprint_bundle()}
    loaded = {name: Editor(compositor, Compositor.load(path, CPU)) for name, path in fillers.items()}
    return {**loaded, GUESS: Editor(compositor)}


def edit(action: Action, filler: str, **others: object) -> Edit:
    fill = Fill() if filler == GUESS else Fill(sampling=Sampling(steps=2))
    sampling = Sampling() if isinstance(action, Remove) else Sampling(steps=2)
    given = {"seed": 3, "fill": fill, "sampling": sampling, **others}
    return Edit(SCENE, Where(mask=CUP), action, **given)  # type: ignore[arg-type]


@pytest.mark.parametrize("filler", FILLERS)
@pytest.mark.parametrize("name", ACTIONS)
def test_nothing_but_holes_and_places_changes(editors: dict[str, Editor], name: str, filler: str) -> None:
    action, objects, places = ACTIONS[name]
    steps: list[tuple[int, int]] = []
    first = editors[filler].run(edit(action, filler), lambda *step: steps.append(step))[0]
    again = editors[filler].run(edit(action, filler))[0]
    np.testing.assert_array_equal(first.image, again.image)
    allowed = np.logical_or.reduce([np.zeros_like(CUP), *map(hole_of, objects)])
    for region in first.regions[len(objects) :]:
        allowed[region.slices] = True
    changed = (first.image != SCENE).any(axis=2)
    assert not (changed & ~allowed).any()
    assert changed[hole_of(CUP)].any()
    assert first.filler == (filler if objects else "")
    count = 2 * places + (STEPS[filler] if objects else 0)
    assert steps == [(step, count) for step in range(1, count + 1)]


def test_each_filler_fills_otherwise_and_each_seed(editors: dict[str, Editor]) -> None:
    filled = {name: editors[name].run(edit(Remove(), name))[0].image[CUP] for name in FILLERS}
    assert len({picture.tobytes() for picture in filled.values()}) == 3
    for name in ("stable_diffusion", "imprint"):
        two = editors[name].run(edit(Remove(), name, num_images=2))
        assert [each.seed for each in two] == [3, 4]
        np.testing.assert_array_equal(two[0].image[CUP], filled[name])
        assert (two[1].image[CUP] != filled[name]).any()


def test_a_prompt_says_what_is_there(editors: dict[str, Editor]) -> None:
    plain, told = (
        editors["stable_diffusion"].run(
            edit(Remove(), "stable_diffusion", fill=Fill(prompt, Sampling(steps=2)))
        )[0]
        for prompt in ("", "a cat")
    )
    assert (plain.image != told.image).any()
    with pytest.raises(InputError, match="IMPRINT fills holes here, and takes no prompt") as caught:
        editors["imprint"].run(edit(Remove(), "imprint", fill=Fill("a cat")))
    assert caught.value.field == "fill.prompt"


def test_a_model_that_can_fills_its_own_holes(editors: dict[str, Editor]) -> None:
    imprint = editors["imprint"].filler
    assert imprint is not None
    moved = Editor(imprint).run(edit(Move((50, 20, 90, 50)), "imprint"))[0]
    assert moved.filler == "imprint"
    # with the settings of a model that is told nothing: without guidance, which would change nothing
    removed, guided = (
        Editor(imprint).run(edit(Remove(), "imprint", fill=Fill(sampling=Sampling(steps=2, **more))))[0]
        for more in ({}, {"guidance_scale": 3.0})
    )
    assert np.abs(removed.image.astype(int) - guided.image).max() <= 1


@pytest.mark.parametrize("stop", [1, 3], ids=["while-filling", "while-drawing"])
def test_an_edit_that_is_left_leaves_nothing_behind(editors: dict[str, Editor], stop: int) -> None:
    asked = edit(Move((50, 20, 90, 50)), "stable_diffusion")
    before = editors["stable_diffusion"].run(asked)[0]

    def leave(done: int, total: int) -> None:
        if done == stop:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        editors["stable_diffusion"].run(asked, leave)
    np.testing.assert_array_equal(editors["stable_diffusion"].run(asked)[0].image, before.image)


def test_tiles_of_a_refined_place_are_counted_from_the_first_step_on(editors: dict[str, Editor]) -> None:
    swap = Swap(Placement(object_array(), refine=600, mode="shape", crop_ratio=3.0))
    large = np.zeros((150, 160), bool)
    large[20:130, 20:130] = True
    scene = scene_array(width=160, height=150)
    asked = Edit(scene, Where(mask=large), swap, Fill(sampling=Sampling(steps=2)), 3, Sampling(steps=4))
    steps: list[tuple[int, int]] = []
    editors["stable_diffusion"].run(asked, lambda *step: steps.append(step))
    assert len(steps) > 2 + 4
    assert steps == [(step, len(steps)) for step in range(1, len(steps) + 1)]


@pytest.mark.parametrize(
    ("action", "field", "reason"),
    [
        (Swap(Placement(SCENE)), "swap.placement.reference_mask", "has no transparency"),
        (Swap(Placement(object_array(), refine=-3)), "swap.placement.refine", "must be a timestep"),
        (TryOn(Placement(object_array(), prompt="a")), "try_on.prompt", "takes no prompt"),
        (Swap(Placement()), "swap.placement.reference", "give a reference"),
    ],
    ids=["no mask", "no timestep", "prompt", "nothing"],
)
def test_what_cannot_be_placed_is_refused_before_the_hole_is_filled(
    editors: dict[str, Editor], action: Action, field: str, reason: str
) -> None:
    steps: list[tuple[int, int]] = []
    with pytest.raises(InputError, match=reason) as caught:
        editors["stable_diffusion"].run(edit(action, "stable_diffusion"), lambda *step: steps.append(step))
    assert caught.value.field == field
    assert not steps


def test_a_model_of_prompts_draws_instead_of_an_object_but_moves_none(editors: dict[str, Editor]) -> None:
    painter = editors["stable_diffusion"].filler
    assert painter is not None
    swapped = Editor(painter).run(edit(Swap(Placement(prompt="a cat", mode="shape")), "stable_diffusion"))[0]
    assert (swapped.image != SCENE).any(axis=2)[CUP].mean() > 0.9
    with pytest.raises(InputError, match="draws from prompts, and cannot place an object") as caught:
        Editor(painter).run(edit(Move((50, 20, 90, 50)), "stable_diffusion"))
    assert caught.value.field == "action"


@pytest.mark.parametrize(
    ("fill", "field", "reason"),
    [
        (Fill(sampling=Sampling(steps=0)), "fill.sampling.steps", "steps must be"),
        (Fill(sampling=Sampling(control_scale=0.5)), "fill.sampling.control_scale", "has no control_scale"),
        (Fill("cat " * 80), "fill.prompt", "longer than the 75 tokens"),
    ],
)
def test_refusals(editors: dict[str, Editor], fill: Fill, field: str, reason: str) -> None:
    with pytest.raises(InputError, match=reason) as caught:
        editors["stable_diffusion"].run(edit(Remove(), "stable_diffusion", fill=fill))
    assert caught.value.field == field


def test_a_filler_sees_the_scene(tiny_bundle: Path) -> None:
    """A model without channels for the scene, and one that places objects alone, are none."""
    refused: list[Callable[[], Path]] = [lambda: tiny_stable_diffusion_bundle(4), lambda: tiny_bundle]
    for bundle in refused:
        compositor = Compositor.load(bundle(), CPU)
        with pytest.raises(InputError, match="cannot fill holes: a filler must see the scene"):
            Editor(compositor, compositor)


def test_what_the_filler_warns_of_is_told(editors: dict[str, Editor]) -> None:
    """It draws 64 pixels for a hole that is many times as large."""
    scene = np.random.default_rng(0).integers(0, 256, (700, 900, 3), np.uint8)
    mask = np.zeros((700, 900), bool)
    mask[200:500, 300:700] = True
    asked = Edit(scene, Where(mask=mask), Remove(), seed=3, fill=Fill(sampling=Sampling(steps=2)))
    (removed,) = editors["stable_diffusion"].run(asked)
    assert any("enlarged" in text for text in removed.warnings), removed.warnings
