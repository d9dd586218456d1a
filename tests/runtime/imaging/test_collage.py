"""Zoom-in crop, collage and shape mask."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.errors import InputError
from runtime.imaging.boxes import Box
from runtime.imaging.collage import collage, crop_scene, make_hint, shape_mask
from runtime.imaging.geometry import Geometry, Ratios, zoom_in
from runtime.imaging.modes import MODES
from runtime.imaging.reference import prepare_reference

GOLDEN = np.load(Path(__file__).parents[2] / "data" / "drawn.npz")
MODE_OF_RUN = {"box": "crop", "shape": "shape"}
"""Prefix of a recorded run -> the mode that it was recorded with."""
REFERENCE = prepare_reference(GOLDEN["ref_image"], GOLDEN["ref_mask"])


def scene_of(width, height):
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def filled_mask(box, width, height):
    mask = np.zeros((height, width), np.uint8)
    mask[box.slices] = 1
    return mask


@pytest.mark.parametrize("run", ["box", "shape"])
def test_equals_the_original(run):
    ratios = Ratios(*(float(ratio) for ratio in GOLDEN[f"{run}_ratios"]))
    reference = prepare_reference(GOLDEN["ref_image"], GOLDEN["ref_mask"], ratios.reference)
    hint = make_hint(GOLDEN["tar_image"], GOLDEN["tar_mask"], reference, ratios, MODES[MODE_OF_RUN[run]])

    crop = hint.geometry.crop
    assert [crop.y0, crop.y1, crop.x0, crop.x1] == GOLDEN[f"{run}_tar_box_yyxx_crop"].tolist()
    assert [crop.height, crop.width, *hint.geometry.padded_size] == GOLDEN[f"{run}_extra_sizes"].tolist()
    expected_rgb = GOLDEN[f"{run}_hint_rgb"].astype(np.float32) / 127.5 - 1
    np.testing.assert_array_equal(hint.hint[:3].transpose(1, 2, 0), expected_rgb)
    np.testing.assert_array_equal(hint.hint[3], GOLDEN[f"{run}_hint_mask"])


def test_the_expanded_box_of_the_original():
    ratios = Ratios(*(float(ratio) for ratio in GOLDEN["shape_ratios"]))
    box = zoom_in(GOLDEN["tar_mask"], (400, 300), ratios).box
    assert [box.y0, box.y1, box.x0, box.x1] == GOLDEN["shape_tar_box_yyxx"].tolist()


@pytest.mark.parametrize("mode", MODES)
def test_a_box_is_its_filled_mask(mode):
    scene, box = scene_of(120, 90), Box(30, 20, 71, 58)
    from_box = make_hint(scene, box, REFERENCE, Ratios(), MODES[mode], resolution=128)
    from_mask = make_hint(scene, filled_mask(box, 120, 90), REFERENCE, Ratios(), MODES[mode], resolution=128)
    assert from_box.geometry == from_mask.geometry
    np.testing.assert_array_equal(from_box.hint, from_mask.hint)


@pytest.mark.parametrize(
    "box", [Box(20, 10, 84, 74), Box(60, 40, 120, 120), Box(0, 0, 128, 128), Box(0, 0, 40, 30)]
)
def test_a_tile_shows_its_part_of_a_box_that_reaches_beyond_it(box):
    """At native scale: what the whole scene's collage has there."""
    scene, tile, whole = scene_of(128, 128), Box(40, 30, 104, 94), Box(0, 0, 128, 128)

    def picture(crop):
        mask = np.zeros((crop.height, crop.width), np.uint8)
        geometry = Geometry(crop, box)
        return collage(scene, geometry, REFERENCE.high_frequency_map, mask, MODES["shape"], crop.width)[:3]

    np.testing.assert_array_equal(picture(tile), picture(whole)[(slice(None), *tile.slices)])


def test_a_tiny_box_stays_where_it_is_and_a_tiny_mask_means_the_whole_scene():
    box = Box(50, 40, 52, 43)
    assert zoom_in(box, (120, 90), Ratios()).box.width < 5
    assert zoom_in(filled_mask(box, 120, 90), (120, 90), Ratios()).box == Box(0, 0, 120, 90)


def test_a_box_across_the_border_is_clipped():
    inside, across = Box(100, 0, 120, 40), Box(100, -10, 500, 40)
    assert zoom_in(across, (120, 90), Ratios()) == zoom_in(inside, (120, 90), Ratios())
    with pytest.raises(InputError, match="no pixel inside the scene of 120x90"):
        zoom_in(Box(120, 0, 130, 40), (120, 90), Ratios())


@pytest.mark.parametrize("ratios", [{"box": 0.9}, {"crop": 101}, {"reference": float("nan")}])
def test_ratios_have_a_range(ratios):
    with pytest.raises(InputError, match="expected 1 to 100"):
        Ratios(**ratios)


def test_padding_is_1_in_box_mode_and_minus_1_otherwise():
    scene, box = scene_of(300, 60), Box(100, 10, 220, 50)  # the crop cannot grow upwards: it is padded
    outside = {}
    for name, mode in MODES.items():
        hint = make_hint(scene, box, REFERENCE, Ratios(), mode, resolution=128).hint
        assert (hint[:3, 0] == -1).all()
        outside[name] = set(np.unique(hint[3, :2]))
    assert outside == {"crop": {1}, "shape": {-1}, "keep_background": {-1}}


def test_shape_control_keeps_the_shape():
    mask = np.zeros((90, 120), np.uint8)
    mask[20:60, 30:70] = np.tri(40)
    geometry = zoom_in(mask, (120, 90), Ratios())
    shape = shape_mask(mask, geometry, MODES["shape"])
    np.testing.assert_array_equal(shape, mask[geometry.crop.slices])
    assert (
        shape_mask(mask, geometry, MODES["keep_background"]).sum() == geometry.box.width * geometry.box.height
    )


def test_training_may_bring_its_own_shape_mask():
    scene = scene_of(120, 90)
    geometry = Geometry(crop=Box(10, 5, 74, 69), box=Box(30, 20, 50, 50))
    simulated = np.zeros((64, 64), np.uint8)
    simulated[32:] = 1
    hint = collage(scene, geometry, REFERENCE.high_frequency_map, simulated, MODES["shape"], resolution=64)
    assert hint.dtype == np.float32
    np.testing.assert_array_equal(hint[3], simulated)
    inside = np.zeros((64, 64), bool)
    inside[15:45, 20:40] = True
    scene_crop = crop_scene(scene, geometry, resolution=64)
    np.testing.assert_array_equal(hint[:3, ~inside], scene_crop[:, ~inside])
    np.testing.assert_allclose((scene_crop + 1) * 127.5, scene[5:69, 10:74].transpose(2, 0, 1), atol=1e-4)


@st.composite
def places(draw):
    """(scene size, box that overlaps the scene, ratios)."""
    width, height = draw(st.integers(1, 120)), draw(st.integers(1, 120))
    x0, y0 = draw(st.integers(-20, width - 1)), draw(st.integers(-20, height - 1))
    x1, y1 = draw(st.integers(max(x0, 0) + 1, width + 20)), draw(st.integers(max(y0, 0) + 1, height + 20))
    ratios = Ratios(box=draw(st.floats(1, 2)), crop=draw(st.floats(1, 4)))
    return (width, height), Box(x0, y0, x1, y1), ratios


@settings(max_examples=150)
@given(places(), st.sampled_from(sorted(MODES)), st.booleans())
def test_any_place_gives_a_hint(place, mode, as_mask):
    size, box, ratios = place
    target = filled_mask(box.clip(size), *size) if as_mask else box
    hint = make_hint(scene_of(*size), target, REFERENCE, ratios, MODES[mode], resolution=64)
    geometry = hint.geometry
    assert geometry.crop.union(geometry.box) == geometry.crop
    assert geometry.crop.clip(size) == geometry.crop
    assert not geometry.box.is_empty
    assert hint.hint.shape == (4, 64, 64)
    assert np.abs(hint.hint).max() <= 1
    assert set(np.unique(hint.hint[3])) <= {-1, 0, 1}
