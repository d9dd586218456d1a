"""Specks of a mask are left out with a warning; parts of the object are not."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.errors import InputError, InputWarning
from runtime.imaging.reference import load_reference
from runtime.imaging.specks import _connected, _runs, without_specks
from runtime.imaging.target import load_target

OBJECT = np.zeros((200, 300), np.bool_)
OBJECT[20:90, 30:110] = True  # 5600 pixels: a speck has less than 6 of them, and is more than 40 away


def with_piece(y: int, x: int, side: int = 1) -> np.ndarray[tuple[int, int], np.dtype[np.bool_]]:
    mask = OBJECT.copy()
    mask[y : y + side, x : x + side] = True
    return mask


def test_far_pixel_is_left_out() -> None:
    with pytest.warns(InputWarning, match=r"specks, 1 of its pixels, .* --keep-specks"):
        np.testing.assert_array_equal(without_specks(with_piece(190, 290), "the mask"), OBJECT)


@pytest.mark.parametrize(
    "mask",
    [with_piece(100, 50), with_piece(190, 290, side=3), with_piece(90, 110), OBJECT, np.ones((9, 9), bool)],
    ids=["near", "large", "touching by a corner", "none", "everything"],
)
def test_parts_of_the_object_stay(mask: np.ndarray[tuple[int, int], np.dtype[np.bool_]]) -> None:
    assert without_specks(mask, "the mask") is mask


@given(st.integers(0, 2**32 - 1), st.floats(0.05, 0.95))
def test_pieces_are_those_of_opencv(seed: int, density: float) -> None:
    rng = np.random.default_rng(seed)
    mask = rng.random(tuple(rng.integers(1, 24, 2))) < density
    rows, starts, ends = _runs(mask)
    labels = _connected(rows, starts, ends)
    count, expected = cv2.connectedComponents(mask.astype(np.uint8), connectivity=8)
    assert len(np.unique(labels)) == count - 1
    of_runs = expected[rows, starts]
    assert len({*zip(labels.tolist(), of_runs.tolist())}) == count - 1
    assert (ends - starts).sum() == mask.sum()


def test_scene_masks_and_references_lose_their_specks_unless_told() -> None:
    stray = with_piece(190, 290)
    scene = np.zeros((200, 300, 3), np.uint8)
    cutout = np.dstack([scene, stray * np.uint8(255)])
    with pytest.warns(InputWarning, match="the scene mask has specks"):
        np.testing.assert_array_equal(load_target(None, stray, scene), OBJECT)
    with pytest.warns(InputWarning, match="the reference mask has specks"):
        np.testing.assert_array_equal(load_reference(scene, stray)[1], OBJECT)
    with pytest.warns(InputWarning, match="the reference's opaque part has specks"):
        np.testing.assert_array_equal(load_reference(cutout, None)[1], OBJECT)
    np.testing.assert_array_equal(load_target(None, stray, scene, keep_specks=True), stray)
    np.testing.assert_array_equal(load_reference(cutout, None, keep_specks=True)[1], stray)


def test_glass_is_told_its_opacity() -> None:
    glass = np.full((20, 20, 4), 127, np.uint8)
    with pytest.raises(InputError, match="opacity is above 128, and it is 127 everywhere"):
        load_reference(glass, None)
