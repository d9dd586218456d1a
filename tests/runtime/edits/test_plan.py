"""Plans of edits: what the objects, their holes and the guesses behind them are."""

from __future__ import annotations

from contextlib import nullcontext

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from runtime.edits.plan import Plan, plan_edit
from runtime.errors import InputError, collecting_warnings
from runtime.imaging.boxes import Box, smallest_box
from runtime.imaging.decoding import UPRIGHT
from runtime.imaging.picture import Picture
from runtime.request import Action, Edit, Move, Placement, Remove, Reshape, Swap, SwapPlaces, TryOn, Where
from runtime.result import Stopwatch
from runtime.segmentation import Segmenter
from runtime.validation import LARGEST
from tests.support.picture_files import encoded

SCENE = np.random.default_rng(0).integers(0, 256, (120, 160, 3), np.uint8)


def rectangle(x0: int, y0: int, x1: int, y1: int) -> NDArray[np.bool_]:
    mask = np.zeros(SCENE.shape[:2], bool)
    mask[y0:y1, x0:x1] = True
    return mask


CUP, VASE, TALL = rectangle(20, 30, 60, 60), rectangle(100, 20, 120, 80), rectangle(24, 10, 46, 64)
OBJECT = np.dstack([SCENE[:40, :40], np.pad(np.full((30, 30), 255, np.uint8), 5)])


def with_speck(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """With the last pixel of the scene."""
    return mask | rectangle(159, 119, 160, 120)


def place_of(placement: Placement) -> Box:
    if placement.box is not None:
        return Box(*placement.box)
    assert isinstance(placement.mask, np.ndarray)
    return smallest_box(placement.mask)


def plan_of(action: Action, mask: NDArray[np.bool_] = CUP, scene: NDArray[np.uint8] = SCENE) -> Plan:
    return plan_edit(Edit(scene, Where(mask=mask), action), Segmenter(), LARGEST, Stopwatch())


def test_the_boxes_of_holes_are_computed_once() -> None:
    plan = plan_of(SwapPlaces(Where(mask=VASE)))
    assert plan.hole_boxes == (Box(16, 26, 64, 64), Box(96, 16, 124, 84))
    assert plan.hole_boxes is plan.hole_boxes


@pytest.mark.parametrize(
    ("action", "mask", "named"),
    [
        (Remove(), with_speck(CUP), "the object's mask"),
        (Move((90, 60, 140, 110)), with_speck(CUP), "the object's mask"),
        (Swap(Placement(OBJECT)), with_speck(CUP), "the object's mask"),
        (TryOn(Placement(OBJECT)), with_speck(CUP), "the object's mask"),
        (SwapPlaces(Where(mask=VASE)), with_speck(CUP), "the object's mask"),
        (SwapPlaces(Where(mask=with_speck(VASE))), CUP, "the other object's mask"),
        (Reshape(with_speck(TALL)), CUP, "the new outline"),
    ],
    ids=["remove", "move", "swap", "try-on", "swap-places", "other", "outline"],
)
def test_specks_are_dropped_with_a_warning(action: Action, mask: NDArray[np.bool_], named: str) -> None:
    """A stray pixel would take the hole or the place across the scene."""
    with collecting_warnings() as warnings:
        plan = plan_of(action, mask)
    (text,) = warnings
    assert text.startswith(f"{named} has specks, 1 of its pixels")
    assert ("--keep-specks" in text) == isinstance(action, Swap | TryOn)
    assert not plan.hole[-1, -1]
    assert all(place_of(placement).x1 < 160 for placement in plan.placements)


@pytest.mark.parametrize("action", [Swap, TryOn])
def test_specks_stay_if_the_placement_keeps_them(
    action: type[Swap | TryOn], recwarn: pytest.WarningsRecorder
) -> None:
    plan = plan_of(action(Placement(OBJECT, keep_specks=True)), with_speck(CUP))
    assert place_of(plan.placements[0]) == Box(20, 30, 160, 120)
    assert not recwarn.list


def test_objects_that_change_places_take_their_own_masks_along() -> None:
    """Each as high as the other was; what is thin keeps a pixel of width."""
    thin = rectangle(100, 20, 101, 100)
    cup, other = plan_of(SwapPlaces(Where(mask=thin))).placements
    np.testing.assert_array_equal(cup.reference_mask, CUP)
    np.testing.assert_array_equal(other.reference_mask, thin)
    assert (cup.box, other.box) == (Box(47, 20, 154, 100), Box(39, 30, 40, 60))


@pytest.mark.parametrize(
    ("other", "is_same"),
    [
        (rectangle(39, 30, 79, 60), True),  # most of the cup
        (rectangle(41, 30, 81, 60), False),  # less than half of it
        (rectangle(30, 35, 40, 45), True),  # lies in it, and is a fraction of its size
        (rectangle(0, 0, 150, 110), True),
    ],
)
def test_selections_are_one_object_if_they_share_more_than_half_of_the_smaller(
    other: NDArray[np.bool_], is_same: bool
) -> None:
    refusal = pytest.raises(InputError, match="both selections are the same object")
    with refusal if is_same else nullcontext():
        plan_of(SwapPlaces(Where(mask=other)))


@pytest.mark.parametrize(("asked", "mode"), [(None, "keep_background"), ("crop", "crop"), ("shape", "shape")])
def test_another_object_keeps_the_background_unless_another_mode_is_given(
    asked: str | None, mode: str
) -> None:
    """In the box of the old object, or in its shape."""
    (placement,) = plan_of(Swap(Placement(OBJECT, mode=asked))).placements
    assert placement.mode == mode
    assert (placement.box is None) == (asked == "shape")
    assert place_of(placement) == smallest_box(CUP)


@pytest.mark.parametrize(("asked", "ratio"), [(None, 1.3), (1.7, 1.7)])
def test_clothes_get_little_room_unless_more_is_given(asked: float | None, ratio: float) -> None:
    (placement,) = plan_of(TryOn(Placement(OBJECT, crop_ratio=asked))).placements
    assert (placement.crop_ratio, placement.mode) == (ratio, "shape")
    np.testing.assert_array_equal(placement.mask, CUP)


@pytest.mark.parametrize(
    "action",
    [
        Move((90, 60, 140, 110), refine=300, strength=0.4),
        Reshape(TALL, refine=300, strength=0.4),
        SwapPlaces(Where(mask=VASE), refine=300, strength=0.4),
    ],
    ids=["move", "reshape", "swap-places"],
)
def test_an_object_of_the_scene_is_drawn_as_the_edit_says(action: Action) -> None:
    assert {(each.refine, each.strength) for each in plan_of(action).placements} == {(300, 0.4)}


def test_a_scene_that_was_turned_is_upright_in_the_plan() -> None:
    """As are the masks of its objects, which nobody must turn again."""
    exif = Image.Exif()
    exif[0x0112] = 6
    stored = encoded(Image.fromarray(SCENE).transpose(Image.Transpose.ROTATE_90), exif=exif)
    (moved,) = plan_edit(
        Edit(stored, Where(mask=CUP), Move((90, 60, 140, 110))), Segmenter(), LARGEST, Stopwatch()
    ).placements
    assert isinstance(moved.reference, Picture)
    assert moved.reference.orientation == UPRIGHT
    np.testing.assert_array_equal(moved.reference.rgb, SCENE)
    np.testing.assert_array_equal(moved.reference_mask, CUP)


def test_seed_zero_is_that_of_the_plan() -> None:
    edit = Edit(SCENE, Where(mask=CUP), Remove(), seed=0)
    assert plan_edit(edit, Segmenter(), LARGEST, Stopwatch()).seed == 0


@pytest.mark.filterwarnings("ignore:the scene is partly transparent")
@pytest.mark.parametrize("around", [(255, 0, 255, 0), (30, 90, 200, 100)], ids=["nothing", "glass"])
def test_a_guess_is_as_transparent_as_what_is_around_the_object(around: tuple[int, ...]) -> None:
    expected = np.full((120, 160, 4), around, np.uint8)
    scene = expected.copy()
    scene[CUP] = (200, 10, 10, 255)
    result = plan_of(Remove(), scene=scene).fill()
    assert result.alpha is not None
    np.testing.assert_array_equal(result.alpha, expected[..., 3])
    if around[3]:
        assert np.abs(result.rgb.astype(int) - around[:3]).max() <= 2
