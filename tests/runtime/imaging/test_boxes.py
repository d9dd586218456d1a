"""The box arithmetic, held against what the original returned (data/geometry.npz)."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.imaging.boxes import (
    Box,
    Padding,
    aspect_padding,
    bounding_box,
    box_extent,
    box_in_box,
    expand,
    expansion_padding,
    mask_extent,
    square,
    square_padding,
)

GOLDEN = np.load(Path(__file__).parents[2] / "data" / "geometry.npz")


def from_yyxx(numbers):
    y0, y1, x0, x1 = (int(number) for number in numbers)
    return Box(x0, y0, x1, y1)


def pad(image, padding, value):
    widths = [(padding.top, padding.bottom), (padding.left, padding.right)] + [(0, 0)] * (image.ndim - 2)
    return np.pad(image, widths, constant_values=value)


def test_a_box_names_its_pixels():
    box = Box(2, 1, 5, 3)
    picture = np.zeros((4, 6))
    picture[box.slices] = 1
    assert (box.width, box.height, picture.sum()) == (3, 2, 6)
    assert box.clip((4, 2)) == Box(2, 1, 4, 2)
    assert box.union(Box(0, 2, 1, 4)) == Box(0, 1, 5, 4)
    assert box.shrink(1).is_empty


def test_the_last_row_and_column_of_a_mask_are_left_out():
    mask = np.zeros((10, 20), np.uint8)
    mask[2:8, 5:15] = 1
    assert bounding_box(mask) == mask_extent(mask) == box_extent(Box(5, 2, 15, 8)) == Box(5, 2, 14, 7)


@pytest.mark.parametrize("pixels", [0, 9])
def test_a_mask_of_fewer_than_ten_pixels_means_the_whole_picture(pixels):
    mask = np.zeros((10, 20), bool)
    mask.flat[:pixels] = True
    assert bounding_box(mask) == Box(0, 0, 20, 10)


def test_a_mask_one_row_high_still_gives_a_box():
    mask = np.zeros((10, 20), np.uint8)
    mask[9, 3:17] = 1
    assert mask_extent(mask).is_empty
    assert bounding_box(mask) == Box(3, 9, 16, 10)


@pytest.mark.parametrize("case", range(12))
def test_bounding_boxes_of_the_original(case):
    mask = GOLDEN[f"bbox{case:02d}_mask"]
    assert mask_extent(mask) == from_yyxx(GOLDEN["bbox_out"][case])


@pytest.mark.parametrize("case", range(len(GOLDEN["box_box"])))
def test_boxes_of_the_original(case):
    height, width = (int(side) for side in GOLDEN["box_hw"][case])
    box = from_yyxx(GOLDEN["box_box"][case])
    expanded = from_yyxx(GOLDEN["box_expand"][case])
    squared = from_yyxx(GOLDEN["box_square"][case])
    if GOLDEN["box_min_crop"][case] == 0:  # a parameter that AnyDoor never uses
        assert expand(box, float(GOLDEN["box_ratio"][case]), (width, height)) == expanded
    assert square(expanded, (width, height)) == squared
    assert box_in_box(box, squared) == from_yyxx(GOLDEN["box_inbox"][case])


@pytest.mark.parametrize("case", range(6))
def test_padding_to_a_square(case):
    image, value = GOLDEN[f"pad{case}_in"], int(GOLDEN[f"pad{case}_value"])
    padding = square_padding(image.shape[1], image.shape[0])
    np.testing.assert_array_equal(pad(image, padding, value), GOLDEN[f"pad{case}_out"])


@pytest.mark.parametrize(
    ("size", "aspect", "padding"),
    [
        ((10, 7), (3, 2), Padding(0, 0, 1, 0)),
        ((7, 10), (2, 3), Padding(0, 0, 0, 1)),
        ((12, 4), (3, 2), Padding(0, 2, 0, 2)),
    ],
)
def test_padding_to_other_sides_loses_nothing(size, aspect, padding):
    """Sides that do not come out even are rounded up."""
    assert aspect_padding(*size, aspect) == padding


@pytest.mark.parametrize("case", range(5))
def test_room_around_the_reference(case):
    image, mask = GOLDEN[f"exp{case}_image"], GOLDEN[f"exp{case}_mask"]
    padding = expansion_padding(image.shape[1], image.shape[0], float(GOLDEN[f"exp{case}_ratio"]))
    np.testing.assert_array_equal(pad(image, padding, 255), GOLDEN[f"exp{case}_out_image"])
    np.testing.assert_array_equal(pad(mask, padding, 0), GOLDEN[f"exp{case}_out_mask"])


@given(st.data())
def test_no_box_is_ever_empty_or_outside(data):
    width, height = data.draw(st.tuples(st.integers(1, 90), st.integers(1, 90)))
    x0, y0 = data.draw(st.tuples(st.integers(0, width - 1), st.integers(0, height - 1)))
    x1, y1 = data.draw(st.tuples(st.integers(x0 + 1, width), st.integers(y0 + 1, height)))
    ratio = data.draw(st.floats(1, 10))
    picture = Box(0, 0, width, height)
    for box in (Box(x0, y0, x1, y1), box_extent(Box(x0, y0, x1, y1))):
        expanded = expand(box, ratio, (width, height))
        squared = square(expanded, (width, height))
        for result in (expanded, squared):
            assert not result.is_empty
            assert result.union(picture) == picture
