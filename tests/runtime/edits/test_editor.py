"""Edits: nothing outside of holes and places changes, and the same seed gives the same bits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from engines.options import EngineOptions
from runtime.compositor import Compositor
from runtime.edits import Editor
from runtime.edits.fillers import GUESS
from runtime.errors import InputError, MissingModelError
from runtime.imaging.boxes import Box
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
from runtime.segmentation import Segmenter

CPU = EngineOptions(backend="onnxruntime", device="cpu", threads=1)
SCENE = np.random.default_rng(0).integers(0, 256, (120, 160, 3), np.uint8)
SHORT = Sampling(steps=1)


def rectangle(x0: int, y0: int, x1: int, y1: int) -> np.ndarray:
    mask = np.zeros(SCENE.shape[:2], bool)
    mask[y0:y1, x0:x1] = True
    return mask


CUP, VASE, TALL = rectangle(20, 30, 50, 60), rectangle(100, 20, 120, 80), rectangle(24, 10, 46, 64)
OBJECT = np.dstack([SCENE[:40, :40], np.pad(np.full((30, 30), 255, np.uint8), 5)])


@pytest.fixture(scope="module")
def editor(example_bundle: Path, segmenter_bundles: tuple[Path, Path]) -> Editor:
    segmenter = Segmenter.load(*segmenter_bundles, options=CPU)
    return Editor(Compositor.load(example_bundle, CPU, segmenter=segmenter))


def edit(action: Action, mask: np.ndarray = CUP, **others: object) -> Edit:
    sampling = Sampling() if isinstance(action, Remove) else SHORT
    given = {"seed": 3, "sampling": sampling, **others}
    return Edit(SCENE, Where(mask=mask), action, **given)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("action", "holes", "places"),
    [
        (Remove(), [CUP], 0),
        (Move((90, 60, 140, 110)), [CUP], 1),
        (Reshape(TALL), [CUP], 1),
        (Swap(Placement(OBJECT)), [CUP], 1),
        (Swap(Placement(OBJECT, mode="shape")), [CUP], 1),
        (SwapPlaces(Where(mask=VASE)), [CUP, VASE], 2),
        (TryOn(Placement(OBJECT)), [], 1),
    ],
    ids=["remove", "move", "reshape", "swap", "swap-shape", "swap-places", "try-on"],
)
def test_nothing_else_changes(editor: Editor, action: Action, holes: list[np.ndarray], places: int) -> None:
    steps: list[tuple[int, int]] = []
    first, second = (editor.run(edit(action), lambda *step: steps.append(step))[0] for _ in range(2))
    np.testing.assert_array_equal(first.image, second.image)
    assert len(first.regions) == len(holes) + places
    allowed = np.logical_or.reduce([np.zeros_like(CUP), *map(hole_of, holes)])
    for region in first.regions[len(holes) :]:
        allowed[region.slices] = True
    changed = (first.image != SCENE).any(axis=2)
    assert changed.any()
    assert not (changed & ~allowed).any()
    assert first.filler == (GUESS if holes else "")
    assert first.seed == 3
    assert steps == [(step, places) for step in range(1, places + 1)] * 2


def test_an_object_that_is_moved_is_that_of_the_scene(editor: Editor) -> None:
    moved = editor.run(edit(Move((90, 60, 140, 110))))[0].image
    removed = editor.run(edit(Remove()))[0].image
    placement = Placement(SCENE, reference_mask=CUP, box=(90, 60, 140, 110), mode="keep_background")
    by_hand = editor.compositor.composite(removed, placement, seed=3, sampling=SHORT)
    np.testing.assert_array_equal(moved, np.asarray(by_hand))


@pytest.mark.parametrize(
    ("action", "objects"),
    [
        (lambda strength: Move((90, 60, 140, 110), strength=strength), 1),
        (lambda strength: Reshape(TALL, strength=strength), 1),
        (lambda strength: SwapPlaces(Where(mask=VASE), strength=strength), 2),
    ],
    ids=["move", "reshape", "swap-places"],
)
def test_with_less_strength_fewer_steps_are_taken(
    editor: Editor, action: Callable[[float | np.float32], Action], objects: int
) -> None:
    steps: list[int] = []
    asked = edit(action(np.float32(0.25)), sampling=Sampling(steps=4))
    editor.run(asked, lambda done, _: steps.append(done))
    assert steps == list(range(1, objects + 1))  # one of four for each


def test_an_object_that_is_moved_is_refined(editor: Editor) -> None:
    scene = np.asarray(Image.fromarray(SCENE).resize((480, 360)))
    cup = np.kron(CUP, np.ones((3, 3), bool))
    steps: list[int] = []
    for refine in (0, 900):
        asked = Edit(scene, Where(mask=cup), Move((150, 60, 450, 340), refine), seed=3, sampling=SHORT)
        editor.run(asked, lambda _, total: steps.append(total))
    assert steps[-1] > steps[0] == 1


def test_objects_that_change_places_keep_their_proportions(editor: Editor) -> None:
    regions = editor.run(edit(SwapPlaces(Where(mask=VASE))))[0].regions
    cup, vase = regions[2], regions[3]
    # the box ratio of the model is 1.1, and up to 4 of its 96 pixels fade on either side
    for region, height, width in ((cup, 60, 60), (vase, 30, 10)):
        assert 0 <= region.height - 1.1 * height <= 11
        assert abs((region.height - 1.1 * height) - (region.width - 1.1 * width)) <= 2


def test_several_pictures_and_their_warnings(editor: Editor) -> None:
    transparent = Image.fromarray(np.dstack([SCENE, np.full(SCENE.shape[:2], 128, np.uint8)]))
    asked = Edit(transparent, Where(mask=CUP), Move((90, 60, 140, 110)), seed=5, sampling=SHORT, num_images=2)
    results = editor.run(asked)
    assert [result.seed for result in results] == [5, 6]
    assert results[0].image.shape == (120, 160, 4)
    assert (results[0].image != results[1].image).any()
    assert sum("partly transparent" in text for text in results[0].warnings) == 1


def test_the_object_is_found(editor: Editor) -> None:
    scene = np.zeros((120, 160, 3), np.uint8)
    scene[CUP], scene[VASE] = 255, 150
    clicked = editor.edit(scene, Where(clicks=[(35, 45)]), Remove())
    assert np.asarray(clicked)[45, 35].max() < 40
    assert np.asarray(clicked)[50, 110].min() == 150
    main = editor.edit(scene, Where(), Remove())  # the larger one
    assert np.asarray(main)[50, 110].max() < 40
    assert np.asarray(main)[45, 35].min() == 255


@pytest.mark.parametrize(
    ("asked", "field", "reason"),
    [
        (lambda: edit(Move((200, 0, 240, 40))), "move.to", "lies outside the scene of 160 x 120 pixels"),
        (lambda: edit(Move((9, 9, 9, 20))), "move.to", "has no area"),
        (lambda: edit(Move((9, 9, 49, 49), strength=0)), "move.strength", "a number above 0"),
        (lambda: edit(Move((9, 9, 49, 49), refine=1000)), "move.refine", "a timestep from 1 to 999"),
        (lambda: edit(Reshape(TALL, strength=2)), "reshape.strength", "a number above 0"),
        (lambda: edit(SwapPlaces(Where(mask=VASE), refine=-1)), "swap.refine", "a timestep from 1 to 999"),
        (lambda: edit(Remove(), np.ones((120, 160), bool)), "where", "nothing is left to fill it from"),
        (lambda: edit(Remove(), np.ones((12, 16), bool)), "where.mask", "they must have the same size"),
        (lambda: edit(Remove(), CUP & VASE), "where.mask", "the mask is empty"),
        (lambda: edit(SwapPlaces(Where(mask=CUP))), "swap.other", "both selections are the same object"),
        (lambda: edit(Reshape(np.ones((9, 9), bool))), "reshape.to", "they must have the same size"),
        (lambda: edit(Swap(Placement(OBJECT, box=(0, 0, 9, 9)))), "swap.placement", "leave out box and mask"),
        (
            lambda: edit(Move((90, 60, 140, 110)), sampling=Sampling(steps=0)),
            "sampling.steps",
            "steps must be",
        ),
        (lambda: edit(Remove(), sampling=SHORT), "sampling", "nothing is drawn when an object is removed"),
        (lambda: edit(Remove(), num_images=0), "num_images", "num_images must be"),
        (
            lambda: Edit(SCENE, Where(clicks=[(500, 3)]), Remove()),
            "where.clicks",
            "the click 500,3 lies outside",
        ),
        (
            lambda: Edit(SCENE, Where(clicks=[(3, 3)], mask=CUP), Remove()),
            "where",
            "give only one of box, mask and clicks",
        ),
    ],
)
def test_refusals(editor: Editor, asked: Callable[[], Edit], field: str, reason: str) -> None:
    with pytest.raises(InputError, match=reason) as caught:
        editor.run(asked())
    assert caught.value.field == field
    assert "\n" not in str(caught.value)


def test_two_objects_on_one_click_are_refused(editor: Editor) -> None:
    scene = np.zeros((120, 160, 3), np.uint8)
    scene[CUP] = 255
    asked = Edit(scene, Where(clicks=[(35, 45)]), SwapPlaces(Where(clicks=[(40, 50)])), sampling=SHORT)
    with pytest.raises(InputError, match="both selections are the same object"):
        editor.run(asked)


def test_a_filler_must_be_one(editor: Editor) -> None:
    with pytest.raises(InputError, match=r"cannot fill holes: a filler must see the scene"):
        Editor(editor.compositor, editor.compositor)
    with pytest.raises(MissingModelError, match="--filler BUNDLE") as caught:
        editor.run(edit(Remove(), fill=Fill("a desk")))
    assert caught.value.field == "fill"


def test_regions_of_holes_are_boxes(editor: Editor) -> None:
    assert editor.run(edit(Remove()))[0].regions == (Box(16, 26, 54, 64),)


def test_two_holes_that_cover_everything_are_refused(editor: Editor) -> None:
    left, right = np.zeros((2, 120, 160), bool)
    left[:, :78], right[:, 82:] = True, True
    with pytest.raises(InputError, match="the hole covers the whole picture") as caught:
        editor.run(Edit(SCENE, Where(mask=left), SwapPlaces(Where(mask=right)), sampling=SHORT))
    assert caught.value.field == "where"
