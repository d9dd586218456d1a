"""Specks of a mask are left out with a warning; parts of the object are not."""

from __future__ import annotations

from contextlib import nullcontext

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.errors import InputError, InputWarning
from runtime.imaging.reference import load_reference
from runtime.imaging.specks import _connected, _runs, large_pieces, reached_from_border, without_specks
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


@pytest.mark.parametrize(
    ("y", "x", "is_speck"),
    [(50, 150, False), (50, 151, True), (118, 138, False), (120, 140, True)],
    ids=["40 away", "41 away", "39.6 away across", "42.4 away across"],
)
def test_a_speck_is_farther_away_than_half_the_longer_side(y: int, x: int, is_speck: bool) -> None:
    mask = with_piece(y, x)
    with pytest.warns(InputWarning) if is_speck else nullcontext():
        assert (without_specks(mask, "the mask") is not mask) == is_speck


def test_a_speck_is_less_than_a_thousandth_of_the_largest_piece() -> None:
    """That has 5000 pixels here."""
    mask = np.zeros((300, 300), np.bool_)
    mask[:50, :100] = True
    for pixels, is_speck in ((4, True), (5, False)):
        mask[290, 290 : 290 + pixels] = True
        with pytest.warns(InputWarning) if is_speck else nullcontext():
            assert (without_specks(mask, "the mask") is not mask) == is_speck


def test_large_pieces_have_their_share_of_the_largest() -> None:
    mask = np.zeros((150, 250), np.bool_)
    mask[:100, :100] = mask[120:130, :10] = mask[:9, 200:211] = True
    largest = np.zeros_like(mask)
    largest[:100, :100] = True
    np.testing.assert_array_equal(large_pieces(mask), largest)
    largest[120:130, :10] = True  # a hundredth; the other piece has 99 pixels
    np.testing.assert_array_equal(large_pieces(mask, 0.01), largest)


def test_what_touches_the_border_by_a_corner_is_not_reached_from_it() -> None:
    mask = np.array([[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0]], np.bool_)
    expected = mask.copy()
    expected[2, 2] = False
    np.testing.assert_array_equal(reached_from_border(mask), expected)


def test_noise_is_taken_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whose pieces would take long to find."""
    monkeypatch.setattr("runtime.imaging.specks._MOST_RUNS", 70)
    mask = with_piece(190, 290)  # 71 runs
    assert without_specks(mask, "the mask") is large_pieces(mask) is reached_from_border(mask) is mask


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
