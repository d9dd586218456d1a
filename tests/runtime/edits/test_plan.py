"""Plans of edits: what the objects, their holes and the guesses behind them are."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from runtime.edits.plan import Plan, plan_edit
from runtime.imaging.boxes import Box
from runtime.request import Action, Edit, Remove, SwapPlaces, Where
from runtime.result import Stopwatch
from runtime.segmentation import Segmenter
from runtime.validation import LARGEST

SCENE = np.random.default_rng(0).integers(0, 256, (120, 160, 3), np.uint8)


def rectangle(x0: int, y0: int, x1: int, y1: int) -> NDArray[np.bool_]:
    mask = np.zeros(SCENE.shape[:2], bool)
    mask[y0:y1, x0:x1] = True
    return mask


CUP, VASE = rectangle(20, 30, 50, 60), rectangle(100, 20, 120, 80)


def plan_of(action: Action, mask: NDArray[np.bool_] = CUP, scene: NDArray[np.uint8] = SCENE) -> Plan:
    return plan_edit(Edit(scene, Where(mask=mask), action), Segmenter(), LARGEST, Stopwatch())


def test_the_boxes_of_holes_are_computed_once() -> None:
    plan = plan_of(SwapPlaces(Where(mask=VASE)))
    assert plan.hole_boxes == (Box(16, 26, 54, 64), Box(96, 16, 124, 84))
    assert plan.hole_boxes is plan.hole_boxes


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
