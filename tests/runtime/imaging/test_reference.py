"""Preparing the reference."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.imaging.high_frequency_map import high_frequency_map
from runtime.imaging.reference import load_reference, prepare_reference

GOLDEN = np.load(Path(__file__).parents[2] / "data" / "drawn.npz")


@pytest.mark.parametrize("run", ["box", "shape"])
def test_equals_the_original(run):
    expand_ratio = float(GOLDEN[f"{run}_ratios"][0])
    prepared = prepare_reference(GOLDEN["ref_image"], GOLDEN["ref_mask"], expand_ratio)
    np.testing.assert_array_equal(prepared.image, GOLDEN[f"{run}_ref"])


def test_the_object_is_centred_on_white():
    image = np.full((100, 300, 3), 40, np.uint8)
    mask = np.zeros((100, 300), np.uint8)
    mask[20:80, 100:200] = 1  # its last row and column are left out: 59 x 99 pixels remain
    prepared = prepare_reference(image, mask, expand_ratio=1.2, size=118)
    assert prepared.image.shape == (118, 118, 3)
    np.testing.assert_array_equal(prepared.mask == 255, (prepared.image == 40).all(axis=-1))
    rows, columns = np.nonzero(prepared.mask)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (29, 87, 9, 107)
    assert (prepared.image[0] == 255).all()


def test_a_mask_of_a_transparent_reference_shows_no_hidden_colours():
    """Around an object of opacity, a rough mask marks pixels that are black and cannot be seen."""
    rgba = np.zeros((300, 300, 4), np.uint8)
    rgba[100:250, 100:250] = (200, 120, 40, 255)
    rough = np.zeros((300, 300), bool)
    rough[80:270, 80:270] = True
    image, inside = load_reference(rgba, rough)
    np.testing.assert_array_equal(inside, rough)
    np.testing.assert_array_equal(image[~rgba[..., 3].astype(bool)], 255)
    # what is opaque has the colours of the file, also where it is nearly transparent at its edge
    rgba[100, 100:250] = (200, 120, 40, 130)
    image, inside = load_reference(rgba, None)
    np.testing.assert_array_equal(image[inside], np.tile([200, 120, 40], (150 * 150, 1)))


def test_the_callers_arrays_stay_as_they_are():
    image, mask = GOLDEN["ref_image"], GOLDEN["ref_mask"]
    image.setflags(write=False)
    mask.setflags(write=False)
    prepare_reference(image, mask)


def test_the_high_frequency_map_is_computed_once():
    prepared = prepare_reference(GOLDEN["ref_image"], GOLDEN["ref_mask"])
    edges = prepared.high_frequency_map
    assert edges is prepared.high_frequency_map
    np.testing.assert_array_equal(edges, high_frequency_map(prepared.image, prepared.mask))


@settings(max_examples=60)
@given(st.data())
def test_any_mask_gives_a_reference(data):
    height, width = data.draw(st.tuples(st.integers(1, 60), st.integers(1, 60)))
    image = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    mask = np.zeros((height, width), bool)
    y, x = data.draw(st.tuples(st.integers(0, height - 1), st.integers(0, width - 1)))
    mask[y : y + data.draw(st.integers(0, 60)), x : x + data.draw(st.integers(0, 60))] = True
    prepared = prepare_reference(image, mask, data.draw(st.floats(1, 100)), size=64)
    assert prepared.image.shape == (64, 64, 3)
    assert prepared.mask.shape == (64, 64)
    assert prepared.high_frequency_map.shape == (64, 64, 3)
