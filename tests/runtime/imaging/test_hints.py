"""What a caller should know before a result disappoints: with the numbers."""

from __future__ import annotations

import numpy as np
import pytest

from runtime.errors import collecting_warnings
from runtime.imaging.boxes import Box
from runtime.imaging.geometry import Ratios, warn_of_enlargement, zoom_in
from runtime.imaging.reference import load_reference


@pytest.mark.parametrize(("side", "hints"), [(50, 1), (127, 1), (128, 0)])
def test_an_object_of_few_pixels(side: int, hints: int) -> None:
    mask = np.zeros((300, 300), bool)
    mask[10 : 10 + side, 20:60] = True
    with collecting_warnings() as told:
        load_reference(np.zeros((300, 300, 3), np.uint8) + np.uint8(90), mask)
    assert len(told) == hints
    assert all(f"the object has 40 x {side} pixels in the reference" in text for text in told)


@pytest.mark.parametrize(("side", "hints"), [(1700, 1), (1500, 0)])
def test_a_crop_that_is_enlarged_much(side: int, hints: int) -> None:
    geometry = zoom_in(Box(50, 50, 50 + side, 50 + side), (4000, 4000), Ratios(box=1, crop=1))
    with collecting_warnings() as told:
        warn_of_enlargement(geometry, (512, 512))
    assert len(told) == hints
    assert all("but the model draws 512 x 512: enlarged 3.3 times" in text for text in told)
