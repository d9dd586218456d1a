"""Pasting the generated picture back into the scene."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.errors import InputError
from runtime.imaging.boxes import Box
from runtime.imaging.collage import crop_scene
from runtime.imaging.geometry import Geometry, Ratios, zoom_in
from runtime.imaging.masked_scene import feathered_box
from runtime.imaging.modes import MODES
from runtime.imaging.paste_back import (
    TARGET_BOX,
    WHOLE_CROP,
    check_edge,
    feathered_region,
    paste_back,
    paste_feathered,
    pasted_region,
)

GOLDEN = np.load(Path(__file__).parents[2] / "data" / "drawn.npz")
RULES = {"box": WHOLE_CROP, "shape": TARGET_BOX}
"""Prefix of a recorded run -> the rule that it was recorded with."""


def scene_of(width, height):
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def as_picture(scene_crop):
    return (scene_crop.transpose(1, 2, 0) + 1) * np.float32(127.5)


@pytest.mark.parametrize("run", ["box", "shape"])
def test_equals_the_original_where_its_picture_is_known(run):
    """Of the decoded picture the file holds the middle, rows and columns 128 to 384 of 512, as float16."""
    ratios = Ratios(*(float(ratio) for ratio in GOLDEN[f"{run}_ratios"]))
    geometry = zoom_in(GOLDEN["tar_mask"], (400, 300), ratios)
    picture = np.zeros((512, 512, 3), np.float32)
    middle = GOLDEN[f"{run}_decoded_crop"][0].astype(np.float32).transpose(1, 2, 0)
    picture[128:384, 128:384] = (middle * 127.5 + 127.5).clip(0, 255)
    composite = paste_back(picture, GOLDEN["tar_image"], geometry, RULES[run])

    quarter = geometry.padded_size[0] // 4
    known = geometry.crop.shrink(quarter + 2).intersection(pasted_region(geometry, RULES[run]))
    difference = composite[known.slices].astype(int) - GOLDEN[f"{run}_composite"][known.slices]
    assert known.width * known.height > 5000
    assert np.abs(difference).max() <= 1


@pytest.mark.parametrize("run", ["box", "shape"])
def test_changes_the_pixels_that_the_original_changes(run):
    ratios = Ratios(*(float(ratio) for ratio in GOLDEN[f"{run}_ratios"]))
    region = pasted_region(zoom_in(GOLDEN["tar_mask"], (400, 300), ratios), RULES[run])
    rows, columns = np.nonzero((GOLDEN[f"{run}_composite"] != GOLDEN["tar_image"]).any(axis=-1))
    assert region == Box(columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)


def test_the_first_row_is_dropped_and_values_are_truncated():
    geometry = Geometry(crop=Box(0, 0, 64, 63), box=Box(10, 10, 40, 40))  # 64 x 64 after padding
    picture = np.full((65, 64, 3), 99.9, np.float32)
    picture[0] = 255
    composite = paste_back(picture, np.zeros((63, 64, 3), np.uint8), geometry, MODES["crop"].paste)
    assert set(np.unique(composite[5:-5, 5:-5])) == {99}


def test_the_mode_decides_what_is_pasted():
    geometry = Geometry(crop=Box(10, 20, 110, 120), box=Box(10, 50, 60, 90))
    assert pasted_region(geometry, MODES["crop"].paste) == Box(15, 25, 105, 115)
    assert pasted_region(geometry, MODES["shape"].paste) == Box(13, 50, 60, 90)


def test_a_small_crop_gets_a_smaller_margin():
    geometry = Geometry(crop=Box(3, 3, 8, 8), box=Box(3, 4, 4, 7))
    assert pasted_region(geometry, MODES["crop"].paste) == Box(5, 5, 6, 6)
    assert pasted_region(geometry, MODES["shape"].paste) == Box(3, 4, 4, 7)


@pytest.mark.parametrize("crop", [Box(20, 10, 84, 74), Box(20, 10, 84, 70), Box(31, 10, 84, 74)])
def test_what_was_cropped_at_native_scale_comes_back(crop):
    # Constant along columns, because the dropped first row moves rows by up to one.
    scene = np.broadcast_to(scene_of(100, 1), (80, 100, 3))
    geometry = Geometry(crop, box=Box(40, 30, 60, 50))
    rounded = np.rint(as_picture(crop_scene(scene, geometry, resolution=64))).astype(np.uint8)
    composite = paste_back(rounded, scene, geometry, MODES["crop"].paste)
    np.testing.assert_array_equal(composite, scene)


def test_a_smooth_scene_survives_the_way_there_and_back():
    x, y = np.meshgrid(np.arange(200), np.arange(150))
    scene = np.stack([x, y, (x + y) // 2], axis=-1).astype(np.uint8)
    geometry = zoom_in(Box(70, 50, 120, 110), (200, 150), Ratios())
    picture = as_picture(crop_scene(scene, geometry, resolution=256))
    composite = paste_back(picture, scene, geometry, MODES["crop"].paste)
    assert np.abs(composite.astype(int) - scene).max() <= 3


def test_a_large_crop_is_pasted_in_bands_without_seams():
    picture = np.random.default_rng(0).uniform(0, 255, (64, 64, 3)).astype(np.float32)
    geometry = Geometry(crop=Box(0, 0, 40, 700), box=Box(5, 100, 30, 600))
    scene = np.zeros((700, 40, 3), np.uint8)
    tall = paste_back(picture, scene, geometry, MODES["crop"].paste)
    short = paste_back(picture, scene, geometry, MODES["keep_background"].paste)
    np.testing.assert_array_equal(tall[100:600, 5:30], short[100:600, 5:30])


@settings(max_examples=150)
@given(st.data(), st.sampled_from(sorted(MODES)), st.sampled_from([np.uint8, np.float32]))
def test_only_the_region_changes(data, mode, dtype):
    width, height = data.draw(st.tuples(st.integers(1, 120), st.integers(1, 120)))
    x0, y0 = data.draw(st.tuples(st.integers(0, width - 1), st.integers(0, height - 1)))
    x1, y1 = data.draw(st.tuples(st.integers(x0 + 1, width), st.integers(y0 + 1, height)))
    ratios = Ratios(box=data.draw(st.floats(1, 2)), crop=data.draw(st.floats(1, 4)))
    geometry = zoom_in(Box(x0, y0, x1, y1), (width, height), ratios)
    scene = scene_of(width, height)
    scene.setflags(write=False)
    picture = np.random.default_rng(1).uniform(0, 255, (64, 64, 3)).astype(dtype)

    composite = paste_back(picture, scene, geometry, MODES[mode].paste)

    region = pasted_region(geometry, MODES[mode].paste)
    untouched = np.ones((height, width), bool)
    untouched[region.slices] = False
    assert not region.is_empty
    assert not np.shares_memory(composite, scene)
    np.testing.assert_array_equal(composite[untouched], scene[untouched])


# a soft edge


def test_another_edge_is_refused():
    with pytest.raises(InputError, match="no edge 'jagged': choose one of hard, soft"):
        check_edge("jagged")


def test_a_soft_edge_fades_from_the_picture_into_the_scene():
    geometry = Geometry(crop=Box(20, 20, 276, 276), box=Box(100, 90, 200, 210))
    weights = feathered_box(geometry.box, geometry, (256, 256))
    composite = paste_feathered(
        np.full((256, 256, 3), 200, np.uint8), np.zeros((300, 300, 3), np.uint8), geometry, weights
    )
    assert (composite[geometry.box.slices] == 200).all()
    across = composite[150, 200:, 0].astype(int)
    assert (np.diff(across) <= 0).all()
    assert {0, 200} < set(across)
    region = feathered_region(geometry, weights)
    assert geometry.box.union(region) == region
    # 4 of 256 pixels beyond the box, and 4 to fade
    assert region == Box(92, 82, 208, 218)


def test_a_soft_edge_leaves_what_was_drawn_at_its_place():
    """At native scale, with two rows of padding above and below the crop; values are rounded."""
    scene, drawn = scene_of(100, 80), 255 - scene_of(100, 80)
    geometry = Geometry(crop=Box(20, 10, 84, 70), box=Box(30, 20, 70, 30))
    picture = np.rint(as_picture(crop_scene(drawn, geometry, resolution=64))).astype(np.uint8)
    weights = np.zeros((64, 64), np.float32)
    weights[12:22, 10:50] = 0.75

    composite = paste_feathered(picture, scene, geometry, weights)

    expected = scene.copy()
    place = geometry.box.slices
    expected[place] = np.rint(0.25 * scene[place] + 0.75 * drawn[place])
    np.testing.assert_array_equal(composite, expected)


def test_a_crop_inside_the_scene_fades_over_a_sixty_fourth_of_the_networks_picture():
    """Of its shorter side: a pixel there, and four pixels here."""
    geometry = Geometry(crop=Box(8, 8, 520, 264), box=Box(100, 100, 200, 200), aspect=(128, 64))
    composite = paste_feathered(
        np.full((64, 128, 3), 200, np.uint8),
        np.zeros((300, 600, 3), np.uint8),
        geometry,
        np.ones((64, 128), np.float32),
    )[..., 0]
    fading = [25, 75, 125, 175, 200]
    assert composite[8:13, 300].tolist() == composite[130, 8:13].tolist() == fading
    assert composite[259:264, 300].tolist() == composite[130, 515:520].tolist() == fading[::-1]


@settings(max_examples=100)
@given(st.data(), st.booleans())
def test_only_the_region_of_a_soft_edge_changes(data, whole_crop):
    width, height = data.draw(st.tuples(st.integers(1, 120), st.integers(1, 120)))
    x0, y0 = data.draw(st.tuples(st.integers(0, width - 1), st.integers(0, height - 1)))
    x1, y1 = data.draw(st.tuples(st.integers(x0 + 1, width), st.integers(y0 + 1, height)))
    ratios = Ratios(box=data.draw(st.floats(1, 2)), crop=data.draw(st.floats(1, 4)))
    geometry = zoom_in(Box(x0, y0, x1, y1), (width, height), ratios)
    weights = feathered_box(geometry.crop if whole_crop else geometry.box, geometry, (64, 64))
    scene = scene_of(width, height)
    picture = np.random.default_rng(1).integers(0, 256, (64, 64, 3), dtype=np.uint8)

    composite = paste_feathered(picture, scene, geometry, weights)

    region = feathered_region(geometry, weights)
    untouched = np.ones((height, width), bool)
    untouched[region.slices] = False
    assert not region.is_empty
    assert region.intersection(geometry.crop) == region
    np.testing.assert_array_equal(composite[untouched], scene[untouched])
