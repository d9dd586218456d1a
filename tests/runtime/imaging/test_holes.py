"""Holes of objects: larger than the object, filled with a soft edge, and nothing else changes."""

from __future__ import annotations

import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image, ImageCms

from runtime.errors import InputError
from runtime.imaging.boxes import Box, smallest_box
from runtime.imaging.guess_background import guess_background
from runtime.imaging.holes import check_hole, fade, filled, grow, hole_of, room_around
from runtime.imaging.pictures import load_picture

OBJECT = np.zeros((90, 120), bool)
OBJECT[30:60, 40:70] = True


def test_a_mask_grows_at_each_side() -> None:
    assert smallest_box(grow(OBJECT, 7)) == Box(33, 23, 77, 67)
    assert smallest_box(hole_of(OBJECT)) == Box(36, 26, 74, 64)
    assert grow(OBJECT, 500).all()


def test_a_large_object_has_more_room() -> None:
    large = np.zeros((900, 900), bool)
    large[100:700, 100:200] = True
    assert (room_around(OBJECT), room_around(large)) == (4, 18)


def test_what_fills_a_hole_is_all_that_is_seen_at_the_object_and_nothing_outside() -> None:
    share = fade(OBJECT)
    assert share[OBJECT].min() == 1
    assert share[~hole_of(OBJECT)].max() == 0
    assert 0 < share[28, 55] < 1


@pytest.mark.parametrize("place", [np.s_[60:, 30:70], np.s_[:40, :50], np.s_[20:80, :]])
def test_an_object_at_the_border_is_replaced_as_a_whole(place: tuple[slice, slice]) -> None:
    mask = np.zeros((100, 100), bool)
    mask[place] = True
    share = fade(mask)
    assert share[mask].min() == 1
    assert share.max() == 1
    assert share[~hole_of(mask)].max() == 0


def test_a_hole_of_the_whole_picture_is_refused() -> None:
    with pytest.raises(InputError, match="nothing is left to fill it from"):
        check_hole(hole_of(np.ones((40, 40), bool)))


def test_a_picture_keeps_its_colours_and_its_transparency_outside_of_the_hole() -> None:
    rgba = np.random.default_rng(0).integers(0, 256, (90, 120, 4), np.uint8)
    image = Image.fromarray(rgba)
    lab_like = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))
    picture = load_picture(image, "the scene")
    # colours of its own, which differ from sRGB everywhere
    picture = replace(
        picture, own=255 - picture.rgb, metadata=replace(picture.metadata, icc_profile=lab_like.tobytes())
    )
    result = filled(picture, picture.rgb, np.full_like(picture.rgb, 77), fade(OBJECT))
    outside = ~hole_of(OBJECT)
    np.testing.assert_array_equal(result.pixels[outside], picture.pixels[outside])
    assert (result.rgb[OBJECT] == 77).all()
    assert np.abs(result.own[OBJECT].astype(int) - 77).max() <= 1
    assert (result.pixels[OBJECT][:, 3] == 255).all()


def test_the_background_is_guessed_from_row_and_column() -> None:
    ramp = np.tile(np.arange(120, dtype=np.uint8)[None, :, None], (90, 1, 3))
    holed = ramp.copy()
    holed[OBJECT] = 255
    guessed = guess_background(holed, OBJECT)
    np.testing.assert_array_equal(guessed[~OBJECT], ramp[~OBJECT])
    assert np.abs(guessed.astype(int) - ramp).max() <= 16  # what is above and below counts as much
    np.testing.assert_array_equal(guess_background(holed, smallest_box(OBJECT)), guessed)


def test_a_pixel_without_anything_in_row_and_column_gets_what_the_others_have() -> None:
    cross = np.zeros((30, 30), bool)
    cross[10:20] = cross[:, 10:20] = True
    scene = np.full((30, 30, 3), 90, np.uint8)
    scene[cross] = 0
    assert (guess_background(scene, cross) == 90).all()


def test_a_guess_takes_little_memory() -> None:
    """Of a hole that is nearly the whole scene."""
    scene, hole = np.zeros((1500, 1500, 3), np.uint8), np.ones((1500, 1500), np.bool_)
    hole[0, 0] = False
    tracemalloc.start()
    try:
        guess_background(scene, hole)
        most = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert most < 32 * hole.size
