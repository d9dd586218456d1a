"""OpenCV is the oracle: our resize must be the one that AnyDoor was trained with."""

import cv2
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from runtime.imaging.boxes import Box, Padding
from runtime.imaging.resize import resize_linear, resize_nearest

SIDES = st.integers(1, 70)
SIZES = st.tuples(SIDES, SIDES)
CHANNELS = st.sampled_from([(), (1,), (3,), (4,)])
PADDINGS = st.builds(Padding, *[st.integers(0, 9)] * 4)

# OpenCV builds without Intel's library keep coordinates in single precision.
FLOAT_TOLERANCE = 2e-3


def noise(size, channels=(), dtype=np.uint8, seed=0):
    width, height = size
    values = np.random.default_rng(seed).uniform(0, 255, (height, width, *channels))
    return values.astype(dtype)


def padded_by_hand(array, padding, fill):
    widths = [(padding.top, padding.bottom), (padding.left, padding.right)] + [(0, 0)] * (array.ndim - 2)
    return np.pad(array, widths, constant_values=fill)


@settings(max_examples=300)
@given(SIZES, SIZES, CHANNELS, PADDINGS)
@example((448, 224), (224, 224), (3,), Padding())
@example((1, 2), (5463, 3), (), Padding())
def test_uint8_is_bit_exact(old, new, channels, padding):
    image = noise(old, channels)
    expected = cv2.resize(padded_by_hand(image, padding, 77), new)
    actual = resize_linear(image, new, padding, 77)
    assert actual.dtype == np.uint8
    np.testing.assert_array_equal(actual, expected.reshape(actual.shape))


@given(SIZES, CHANNELS)
def test_exact_halving_is_a_mean_of_four(new, channels):
    image = noise((2 * new[0], 2 * new[1]), channels)
    actual = resize_linear(image, new)
    np.testing.assert_array_equal(actual, cv2.resize(image, new).reshape(actual.shape))


@given(SIZES, SIZES, CHANNELS, st.sampled_from([np.float32, np.float64]))
def test_floats_agree_closely(old, new, channels, dtype):
    image = noise(old, channels, dtype)
    actual = resize_linear(image, new)
    assert actual.dtype == dtype
    expected = cv2.resize(image, new).reshape(actual.shape)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=FLOAT_TOLERANCE)


@given(SIZES, SIZES, CHANNELS, PADDINGS)
def test_nearest_is_exact(old, new, channels, padding):
    image = noise(old, channels)
    expected = cv2.resize(padded_by_hand(image, padding, 2), new, interpolation=cv2.INTER_NEAREST)
    actual = resize_nearest(image, new, padding, 2)
    np.testing.assert_array_equal(actual, expected.reshape(actual.shape))


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_a_window_is_a_part_of_the_whole(dtype):
    image, window = noise((40, 30), (3,), dtype), Box(5, 17, 60, 33)
    whole = resize_linear(image, (90, 70))
    np.testing.assert_array_equal(resize_linear(image, (90, 70), window=window), whole[window.slices])


def test_a_window_of_a_halved_picture():
    image, window = noise((40, 30)), Box(5, 7, 19, 12)
    whole = resize_linear(image, (20, 15))
    np.testing.assert_array_equal(resize_linear(image, (20, 15), window=window), whole[window.slices])


@pytest.mark.parametrize("dtype", [np.uint8, np.float32, np.float64])
def test_the_same_size_changes_nothing(dtype):
    image = noise((33, 21), (3,), dtype)
    np.testing.assert_array_equal(resize_linear(image, (33, 21)), image)
