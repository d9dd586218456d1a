"""Holes of objects: larger than the object, filled with a soft edge, and nothing else changes."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from dataclasses import replace

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image, ImageCms

from runtime.errors import InputError
from runtime.imaging.boxes import Box, smallest_box
from runtime.imaging.guess_background import guess_background
from runtime.imaging.holes import check_hole, fade, filled, grow, hole_box, hole_of, room_around
from runtime.imaging.pictures import load_picture
from tests.support.picture_files import encoded, icc_profile

OBJECT = np.zeros((90, 120), bool)
OBJECT[30:60, 40:70] = True


def objects(most: int) -> st.SearchStrategy[NDArray[np.bool_]]:
    """Masks of one to three rectangles, which may overlap and lie at the border."""

    def mask_of(seed: int) -> NDArray[np.bool_]:
        rng = np.random.default_rng(seed)
        mask = np.zeros(rng.integers(1, most, 2), bool)
        for _ in range(rng.integers(1, 4)):
            y, x = rng.integers(0, mask.shape)
            height, width = rng.integers(1, most // 2, 2)
            mask[y : y + height, x : x + width] = True
        return mask

    return st.integers(0, 2**32 - 1).map(mask_of)


@given(objects(150))
def test_a_hole_is_the_object_dilated_and_its_fade_a_box_blur(mask: NDArray[np.bool_]) -> None:
    """As OpenCV has both."""

    def grown(pixels: int) -> NDArray[np.uint8]:
        return np.asarray(cv2.dilate(mask.view(np.uint8), np.ones((2 * pixels + 1,) * 2, np.uint8)), np.uint8)

    def sums(of: NDArray[np.uint8], radius: int) -> NDArray[np.int32]:
        side = 2 * radius + 1
        found = cv2.boxFilter(of, cv2.CV_32S, (side, side), normalize=False, borderType=cv2.BORDER_CONSTANT)
        return np.asarray(found, np.int32)

    room, hole, share = room_around(mask), hole_of(mask), fade(mask)
    np.testing.assert_array_equal(hole, grown(room) > 0)
    assert hole_box(mask) == smallest_box(hole)
    blur = room // 2
    expected = sums(grown(room - blur), blur) / sums(np.ones_like(mask, np.uint8), blur)
    np.testing.assert_array_equal(share, expected.astype(np.float32))
    np.testing.assert_array_equal(share > 0, hole)


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


def test_what_fills_a_hole_has_the_colours_of_the_scenes_profile() -> None:
    """Read again, they look as they were drawn; the scene that was given stays as it was."""
    pixels = np.random.default_rng(0).integers(0, 256, (90, 120, 3), np.uint8)
    picture = load_picture(encoded(pixels, icc_profile=icc_profile()), "the scene")
    drawn = np.full_like(pixels, (200, 60, 30))
    result = filled(picture, picture.rgb, drawn, fade(OBJECT))
    assert (result.rgb[OBJECT] == (200, 60, 30)).all()
    again = load_picture(encoded(result.own, icc_profile=icc_profile()), "the result")
    assert np.abs(again.rgb[OBJECT].astype(int) - (200, 60, 30)).max() <= 2
    np.testing.assert_array_equal(picture.own, pixels)


@pytest.mark.parametrize(("looks", "colour"), [(250, 0), (253, 153), (240, 0)])
def test_the_colour_of_what_is_hardly_opaque_is_that_which_looks_so_on_white(looks: int, colour: int) -> None:
    """At an opacity of 5 of 255; none looks like the last of them, and black comes nearest."""
    rgba = np.full((90, 120, 4), 255, np.uint8)
    rgba[0, 0, 3] = 0
    picture = load_picture(Image.fromarray(rgba), "the scene")
    drawn = np.full_like(rgba, looks)
    drawn[..., 3] = 5
    result = filled(picture, picture.rgb, drawn, fade(OBJECT))
    assert (result.pixels[OBJECT] == (colour, colour, colour, 5)).all()


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


def test_what_the_others_have_is_rounded_and_is_that_of_all_bands(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three corners of a cross are as bright as 91 and one as 82, which is 88.75 on average; the rows of a
    large scene are looked at in bands, here three at a time, or each alone where one is wider than a band."""
    cross = np.zeros((30, 30), bool)
    cross[10:20] = cross[:, 10:20] = True
    scene = np.full((30, 30, 3), 91, np.uint8)
    scene[:10, :10] = 82
    whole = guess_background(scene, cross)
    assert (whole[10:20, 10:20] == 89).all()
    for pixels in (3 * 30, 20):
        monkeypatch.setattr("runtime.imaging.guess_background._BAND", pixels)
        np.testing.assert_array_equal(guess_background(scene, cross), whole)


def test_without_a_hole_or_with_nothing_around_it_the_scene_stays() -> None:
    scene = np.random.default_rng(0).integers(0, 256, (9, 7, 3), np.uint8)
    for hole in (np.zeros((9, 7), bool), np.ones((9, 7), bool)):
        np.testing.assert_array_equal(guess_background(scene, hole), scene)


@given(objects(24))
def test_a_guess_is_the_mean_of_the_nearest_by_inverse_distance(hole: NDArray[np.bool_]) -> None:
    scene = np.random.default_rng(0).integers(0, 256, (*hole.shape, 4), np.uint8)
    guessed = guess_background(scene, hole)
    np.testing.assert_array_equal(guessed[~hole], scene[~hole])
    for y, x in np.argwhere(hole):
        nearest = []
        for dy, dx in ((0, -1), (0, 1), (-1, 0), (1, 0)):
            distance = 1
            while 0 <= (v := y + dy * distance) < len(hole) and 0 <= (u := x + dx * distance) < hole.shape[1]:
                if not hole[v, u]:
                    nearest.append((scene[v, u], 1 / distance))
                    break
                distance += 1
        if nearest:
            colours, weights = zip(*nearest)
            expected = np.average(colours, axis=0, weights=weights)
            assert np.abs(guessed[y, x] - expected).max() <= 0.5 + 1e-9


@pytest.mark.parametrize(
    ("work", "most"),
    [
        (lambda mask, _: hole_of(mask), 3),
        (lambda mask, _: fade(mask), 6),
        (lambda mask, scene: guess_background(scene, mask), 8),
    ],
    ids=["hole", "fade", "guess"],
)
def test_a_small_object_of_a_large_scene_takes_little_work(
    work: Callable[[NDArray[np.bool_], NDArray[np.uint8]], object], most: int
) -> None:
    """No more than a few bytes of each pixel of the scene are touched."""
    mask, scene = np.zeros((1000, 1000), bool), np.zeros((1000, 1000, 3), np.uint8)
    mask[500:520, 300:340] = True
    assert peak_memory(lambda: work(mask, scene)) < most * mask.size


def test_a_guess_takes_little_memory() -> None:
    """Of a hole that is nearly the whole scene."""
    scene, hole = np.zeros((1500, 1500, 3), np.uint8), np.ones((1500, 1500), np.bool_)
    hole[0, 0] = False
    assert peak_memory(lambda: guess_background(scene, hole)) < 32 * hole.size


def peak_memory(work: Callable[[], object]) -> int:
    """The most bytes that are allocated meanwhile."""
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
